"""The picture of a run: loss, accuracy and learning rate over the steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a `metrics.jsonl`; a last line torn by a crash is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Draw a run's curves into a PNG.

    Args:
        metrics: The run's `metrics.jsonl`.
        picture: The file to write.
        title: Shown on top.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(read(metrics))
    training = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    validation += [line for line in lines if line["kind"] == "final" and _after(line, validation)]
    panels = ["loss (nats)", "accuracy", "learning rate"]
    if not any(line.get("val_accuracy") for line in validation):
        panels.remove("accuracy")
    figure = Figure(figsize=(8, 3 + 2 * (len(panels) - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2 if panel != "learning rate" else 1 for panel in panels]
    axes = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True, height_ratios=heights), strict=True))
    figure.suptitle(title)
    for panel, axis in axes.items():
        axis.set_ylabel(panel)
        axis.grid(alpha=0.3)
    for key, panel in (("loss", "loss (nats)"), ("accuracy", "accuracy")):
        if panel in axes:
            _panel(axes[panel], training, validation, key)
    rates = axes["learning rate"]
    rates.plot([line["step"] for line in training], [line["lr"] for line in training], color="tab:gray")
    rates.set_xlabel("optimiser step")
    figure.savefig(picture, dpi=120, format="png")


def _after(line: dict[str, Any], validation: list[dict[str, Any]]) -> bool:
    return not validation or line["step"] > validation[-1]["step"]


def _panel(axis: Any, training: list[dict[str, Any]], validation: list[dict[str, Any]], key: str) -> None:
    """Training values, faint and smoothed, and the validation points."""
    steps, values = [line["step"] for line in training], [line[key] for line in training]
    axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth(values, max(len(values) // 40, 1)), color="tab:blue", label="training")
    points = [(line["step"], line[f"val_{key}"]) for line in validation if f"val_{key}" in line]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
        axis.annotate(
            f"{points[-1][1]:.4g}",
            points[-1],
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            color="tab:orange",
        )
    axis.legend(loc="best", frameon=False)
