"""Where the command line writes: results to standard output, everything else to standard error."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

out = Console()
err = Console(stderr=True)


def complain(line: str, word: str = "error") -> None:
    """Say one line on standard error.

    Args:
        line: What is wrong; line breaks become spaces.
        word: What kind of line it is.
    """
    style = "bold red" if word == "error" else "yellow"
    err.print(f"[{style}]{word}:[/]", end=" ")
    err.print(" ".join(line.split()), markup=False, highlight=False, soft_wrap=True)


def facts(rows: Mapping[str, str]) -> Table:
    """Lay out names and values in two columns.

    Args:
        rows: Name -> value.

    Returns:
        A table for `Console.print`.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def scores(metrics: Mapping[str, float]) -> Table:
    """Lay out a run's metrics: a row for the validation data and for each test, a column for each measure.

    Args:
        metrics: As in `summary.json`: `val_loss`, `accuracy@length_512`, and so on.

    Returns:
        A table for `Console.print`.
    """
    cells: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        measure, at, test = key.partition("@")
        if not at:
            measure, test = measure.removeprefix("val_"), "validation"
        cells.setdefault(test, {})[measure] = value
    measures = list(dict.fromkeys(measure for row in cells.values() for measure in row))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for measure in measures:
        table.add_column(measure.replace("_", " "), justify="right")
    for test, row in cells.items():
        table.add_row(
            test, *(number(measure, row[measure]) if measure in row else "" for measure in measures)
        )
    return table


def number(measure: str, value: float) -> str:
    """Write a metric the way it is usually read: accuracies in percent, the rest with four decimals."""
    if "accuracy" in measure:
        return f"{100 * value:.2f}%"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Write seconds as `12.3 s`, `4 min 05 s` or `2 h 07 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: float, unit: str = "") -> str:
    """Write a large number with three digits: `1.55 M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"
