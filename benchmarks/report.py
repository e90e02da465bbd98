"""From JSON lines to a page: report.md with its plots, beside the lines that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.lines import ATTENTION, Line, curves, measured, read, work_of
from mambakit.testing import timing

Row = Sequence[str]

SECTIONS = {
    "operators": "Operators",
    "modules": "Modules",
    "models": "Models",
    "compat": "transformers' models, with and without our kernels",
}
"""Suite -> title of its table; `scaling` has plots of its own."""


def render(folder: Path) -> Path:
    """Write the report of a folder.

    Args:
        folder: With files of JSON lines.

    Returns:
        The path of report.md.
    """
    lines = read(folder)
    parts = [_head(lines), _peers(lines)]
    for suite, title in SECTIONS.items():
        if mine := [line for line in lines if line["suite"] == suite]:
            parts += [f"## {title}", _results(mine)]
            if suite == "models":
                parts += plots.throughput(mine, folder)
    if mine := [line for line in lines if line["suite"] == "scaling"]:
        parts += _scaling(mine, folder)
    parts += _left_out(lines)
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------
# Parts of the page


def _head(lines: Sequence[Line]) -> str:
    one = lines[-1]
    dates = sorted({line["date"][:10] for line in lines})
    commits = sorted({str(line["commit"])[:12] for line in lines})
    loads = [line["load"] for line in lines if line.get("load") is not None]
    toy = (
        "\n\n**Toy sizes: this shows that the suites run, not how fast anything is.**" if one["quick"] else ""
    )
    rows = [
        ("date", ", ".join(dates)),
        ("device", one.get("gpu") or f"{one['cpu']}, {one['cores']} cores, {one['threads']} threads"),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{name} {v}" for name, v in _own_versions(one).items())),
    ]
    if loads and not one.get("gpu"):
        busy = max(loads) > 1.5 * one["cores"]
        said = "; other programs wanted the same cores, so trust ratios and processor times" if busy else ""
        rows.append(("load average", f"{min(loads):.1f} to {max(loads):.1f}{said}"))
    if clocks := [line for line in lines if "sm_mhz" in line]:
        seen = [line["sm_mhz"] for line in clocks]
        rows.append(("clock", f"{min(seen):.0f} to {max(seen):.0f} of {clocks[0]['sm_mhz_max']:.0f} MHz"))
    for dtype, best in sorted(_limits(lines).items()):
        reach = f"copies {best.copy / 1e9:.4g} GB/s, multiplies {best.matmul / 1e12:.4g} TFLOP/s"
        rows.append((f"limits, {dtype}", reach))
    title = f"# Benchmarks of {dates[-1]} on {one.get('gpu') or one['cpu']}{toy}"
    return "\n".join([title, "", _table(("", ""), rows), "", _HOW])


_HOW = """Every variant was checked before it was timed (`error`: largest relative error of outputs and
gradients, against the float64 reference on a small case and the plain backend at full size). Variants took
turns in one process; medians of the turns, quartiles in brackets. `times as long` compares with the first
variant, turn by turn. `roofline` is the share of what the limits above allow for the bytes that must move and
the operations of the formula; it exceeds 100% where data stayed in a cache, or where an algorithm needs fewer
operations. Processor time is that of all threads; on a busy machine it is the one to be compared."""


def _limits(lines: Iterable[Line]) -> dict[str, timing.Ceilings]:
    """Type -> the best that the machine showed at any time, which earlier lines did not know yet."""
    found: dict[str, timing.Ceilings] = {}
    for line in lines:
        if "ceilings" in line:
            seen = timing.Ceilings(**line["ceilings"])
            found[line["dtype"]] = seen.or_better(found.get(line["dtype"], seen))
    return found


def _own_versions(line: Line) -> Mapping[str, str]:
    return {name: v for name, v in line["versions"].items() if name in ("mambakit", "python", "torch")}


def _peers(lines: Sequence[Line]) -> str:
    own = _own_versions(lines[-1])
    rows = [
        (name, version or "not installed: not compared with")
        for name, version in lines[-1]["versions"].items()
        if name not in own and name not in ("numpy", "safetensors")
    ]
    return _table(("peer", "version"), rows)


def _results(lines: Sequence[Line]) -> str:
    """One row per variant, grouped by case."""
    on_gpu = any(line.get("clock") == "graph" for line in lines)
    title, clock, value = (
        ("with launches", "events", "median") if on_gpu else ("processor time", "host", "cpu_seconds")
    )
    others = {work_of(line): line[value] for line in lines if line.get("clock") == clock and value in line}
    head = ("work", "variant", "median", title, "tokens/s", "times as long", "roofline", "error")
    rows, before, limits = [], None, _limits(lines)
    for line in measured(lines):
        over = line.get("over")
        memory = f", {line['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in line else ""
        rows.append(
            (
                line["name"] if line["name"] != before else "",
                line["variant"] + memory,
                f"{_time(line['median'])} ({_quartiles(line)})",
                _other(line, others),
                _count(line["tokens"] / line["median"]) if line["tokens"] else "",
                f"{over['median']:.2f} ({over['lower']:.2f} to {over['upper']:.2f})" if over else "1",
                _share(line, limits[line["dtype"]]),
                f"{line['error']:.1g}",
            )
        )
        before = line["name"]
    return _table(head, rows)


def _other(line: Line, others: Mapping[tuple[str, str, str], float]) -> str:
    """The variant's time by another clock, and how many times as long as the first variant's."""
    if work_of(line) not in others:
        return ""
    time, base = others[work_of(line)], None
    if "over" in line:
        base = others.get((line["suite"], line["name"], line["over"]["variant"]))
    return _time(time) + (f" ({time / base:.2f}x)" if base else "")


def _scaling(lines: Sequence[Line], folder: Path) -> list[str]:
    return _operators_by_length(lines, folder) + _decoding_by_context(lines, folder)


def _operators_by_length(lines: Sequence[Line], folder: Path) -> list[str]:
    shown = [line for line in measured(lines) if "length" in line["at"]]
    if not shown:
        return []
    layer = "The operator of one layer of {width} channels (the scans have twice as many), one sequence."
    parts = ["## Time against length", layer.format_map(shown[0]["at"])]
    for backward in (False, True):
        mine = [line for line in shown if line["at"]["backward"] is backward]
        if mine:
            parts += [f"### {'With gradients' if backward else 'Forward'}", _by_length(mine, "length")]
            parts += [_slopes(mine), _crossovers(mine)]
    return parts + plots.time_against_length(shown, folder)


def _decoding_by_context(lines: Sequence[Line], folder: Path) -> list[str]:
    shown = [line for line in measured(lines) if "context" in line["at"]]
    if not shown:
        return []
    model = "Models of {layers} layers of {width} channels; time of one token of one sequence:"
    return [
        "## Decoding against context",
        model.format_map(shown[0]["at"]),
        _by_length(shown, "context"),
        "Bytes of its state:",
        _by_length(shown, "context", "state_bytes"),
        *plots.decoding(shown, folder),
    ]


def _by_length(lines: Sequence[Line], axis: str, value: str = "median") -> str:
    found = curves(lines, axis, value)
    places = sorted({place for points in found.values() for place in points})
    write = _time if value == "median" else _bytes
    rows = [
        (f"{place:,}", *(write(points[place]) if place in points else "" for points in found.values()))
        for place in places
    ]
    return _table((axis, *found), rows)


def _slopes(lines: Sequence[Line]) -> str:
    """Slope over the whole range and its upper half, which launches and caches do not bend."""
    found, processor = curves(lines, "length"), curves(lines, "length", "cpu_seconds")
    rows = []
    for name, points in found.items():
        half = {k: v for k, v in points.items() if k * k >= min(points) * max(points)}
        if len(half) > 1:
            cpu = [processor[name][k] for k in points]
            row = (points, points.values()), (half, half.values()), (points, cpu)
            rows.append((name, *(f"{timing.slope(list(x), list(y)):.2f}" for x, y in row)))
    if not rows:
        return ""
    return "Slope of log time against log length (1 is linear, 2 quadratic):\n\n" + _table(
        ("", "all lengths", "longer half", "processor time"), rows
    )


def _crossovers(lines: Sequence[Line]) -> str:
    """From which length on each scan is faster than attention."""
    found = curves(lines, "length")
    rival = found.get(ATTENTION)
    if rival is None:
        return ""
    said = []
    for name, points in found.items():
        shared = sorted(points.keys() & rival.keys())
        if name == ATTENTION or not shared:
            continue
        both = [points[k] for k in shared], [rival[k] for k in shared]
        said.append(f"- {name}: {timing.crossover_in_words(shared, *both)}")
    return "\n".join(said)


def _left_out(lines: Sequence[Line]) -> list[str]:
    """What was not measured, by reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        if line["status"] != "measured":
            key = line["status"], line["variant"] or "everything", line.get("reason", "")
            groups.setdefault(key, []).append(line["name"])
    rows = [
        (status, variant, reason, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more")
        for (status, variant, reason), names in sorted(groups.items())
    ]
    return ["## Not measured", _table(("", "variant", "why", "work"), rows)] if rows else []


# ---------------------------------------------------------------------------------------------------------
# Words


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return (
                f"{seconds / scale:.3g} {unit}" if seconds < 100 * scale else f"{seconds / scale:.0f} {unit}"
            )
    raise AssertionError


def _quartiles(line: Line) -> str:
    return f"{_time(line['lower'])} to {_time(line['upper'])}" if line["runs"] > 1 else "once"


def _count(value: float) -> str:
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def _share(line: Line, limits: timing.Ceilings) -> str:
    share = limits.floor(line["bytes"], line["flops"]) / line["median"]
    return f"{100 * share:.{0 if share > 0.1 else 1}f}%" if share else ""
