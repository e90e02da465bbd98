"""The three pictures of a report; each function writes a PNG and gives the line of Markdown that shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import ATTENTION, Line, curves, measured
from mambakit.testing import timing

COLOURS = {
    "selective_scan": "#2b6cb0",
    "mamba1": "#2b6cb0",
    "ssd": "#2f855a",
    "mamba2": "#2f855a",
    "attention": "#d97706",
}
CYCLE = ("#2b6cb0", "#2f855a", "#d97706", "#805ad5", "#b83280", "#718096", "#975a16", "#0987a0")


def time_against_length(lines: Sequence[Line], folder: Path) -> list[str]:
    """Forward and with gradients, with the points where scans overtake attention."""
    panels = {
        title: curves([line for line in lines if line["at"].get("backward") is backward], "length")
        for title, backward in (("forward", False), ("forward and backward", True))
    }
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return []
    figure, axes = _figure(len(panels))
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        rival = found.get(ATTENTION, {})
        for name, points in found.items():
            _curve(axis, name, points)
            shared = sorted(points.keys() & rival.keys())
            both = [points[k] for k in shared], [rival[k] for k in shared]
            if points is not rival and shared and (length := timing.crossover(shared, *both)):
                axis.plot(length, _between(rival, length), "o", color="black", fillstyle="none", markersize=9)
        axis.set_title(f"one layer's operator, {title}")
        axis.set_ylabel("seconds")
        _logarithmic(axis, "length, tokens")
    return _save(
        figure, folder, "time-length", "Time against length; rings: from here on faster than attention"
    )


def decoding(lines: Sequence[Line], folder: Path) -> list[str]:
    """Bytes of the state, and time of a token, against what has been read."""
    figure, axes = _figure(2)
    for axis, value, label in zip(
        axes, ("state_bytes", "median"), ("bytes of one sequence's state", "seconds per token"), strict=True
    ):
        for name, points in curves(lines, "context", value).items():
            _curve(axis, name, points)
        axis.set_ylabel(label)
        _logarithmic(axis, "tokens read before")
    return _save(figure, folder, "decoding", "Memory and time of decoding against context")


def throughput(lines: Sequence[Line], folder: Path) -> list[str]:
    """Tokens per second of decoding against batch: a panel per model, for those measured at several."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for line in measured(lines):
        at = line["at"]
        if at["verb"] == "write":
            panel = panels.setdefault(f"{at['kind']} {at['size']}, {line['dtype']}", {})
            panel.setdefault(line["variant"], {})[at["b"]] = line["tokens"] / line["median"]
    for found in panels.values():
        for name in [name for name, points in found.items() if len(points) < 2]:
            del found[name]
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return []
    names = dict.fromkeys(name for found in panels.values() for name in found)
    colours = dict(zip(names, itertools.cycle(CYCLE), strict=False))
    figure, axes = _figure(len(panels))
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        for name, points in found.items():
            _curve(axis, name, dict(sorted(points.items())), colours[name])
        axis.set_title(f"decoding, {title}")
        axis.set_ylabel("tokens per second, all sequences together")
        _logarithmic(axis, "sequences at once")
        axis.xaxis.set_major_formatter("{x:.0f}")
    return _save(figure, folder, "throughput", "Throughput of decoding against batch")


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _curve(axis: Any, name: str, points: Mapping[int, float], colour: str | None = None) -> None:
    """One curve; operators have colours of their own, what runs without kernels is dashed."""
    known = [colour for word, colour in COLOURS.items() if word in name.split()]
    axis.plot(
        list(points),
        list(points.values()),
        "--" if name.split()[-1] == "chunked" else "-",
        marker="o",
        markersize=3.5,
        color=colour or (known[0] if known else None),
        label=name,
    )


def _between(points: Mapping[int, float], place: float) -> float:
    """The height of a curve between two of its points, in logarithms as it is drawn."""
    left = max(k for k in points if k <= place * (1 + 1e-9))
    right = min((k for k in points if k > left), default=left)
    if right == left:
        return points[left]
    part = math.log(place / left) / math.log(right / left)
    return points[left] ** (1 - part) * points[right] ** part


def _logarithmic(axis: Any, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, folder: Path, name: str, caption: str) -> list[str]:
    """Write the figure with one legend for all panels, below them."""
    curves = [curve for axis in figure.axes for curve in axis.get_legend_handles_labels()[0]]
    shown = {curve.get_label(): curve for curve in curves}
    place = {"loc": "outside lower center", "ncols": min(5, len(shown))}
    figure.legend(shown.values(), shown, frameon=False, fontsize=9, **place)
    figure.savefig(folder / f"{name}.png", dpi=90)
    return [f"![{caption}]({name}.png)"]
