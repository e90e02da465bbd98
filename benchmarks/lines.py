"""The JSON lines of a run: reading them, and choosing from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]

ATTENTION = "attention"
CLOCKS = ("graph", "events", "host")
"""The first of these that a variant was measured with is the one shown."""


def newest(results: Path) -> Path:
    """The newest folder with lines.

    Raises:
        SystemExit: There is none.
    """
    folders = sorted({path.parent for path in results.glob("*/*.jsonl")}, key=lambda f: f.name)
    if not folders:
        raise SystemExit(f"no results in {results}; python -m benchmarks run operators makes some")
    return folders[-1]


def read(folder: Path) -> list[Line]:
    """The lines of a folder; of work that was measured again the newest run's only.

    Raises:
        SystemExit: There are none.
    """
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    if not lines:
        raise SystemExit(f"no results in {folder}")
    last: dict[tuple[str, str, str], str] = {}
    for line in lines:
        key = work_of(line)
        last[key] = max(line["date"], last.get(key, ""))
    return [line for line in lines if line["date"] == last[work_of(line)]]


def measured(lines: Iterable[Line]) -> list[Line]:
    """One line for each variant of each case: that of the clock which shows the device's own time."""
    best: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        if line["status"] == "measured":
            kept = best.get(work_of(line))
            if kept is None or CLOCKS.index(line["clock"]) < CLOCKS.index(kept["clock"]):
                best[work_of(line)] = line
    return list(best.values())


def work_of(line: Line) -> tuple[str, str, str]:
    """What was measured: suite, case, variant."""
    return line["suite"], line["name"], line["variant"]


def curves(lines: Iterable[Line], axis: str, value: str = "median") -> dict[str, dict[int, float]]:
    """Variant -> place on the axis -> value, as measured."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if axis in line["at"] and value in line:
            found.setdefault(short(line["variant"]), {})[line["at"][axis]] = line[value]
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def short(variant: str) -> str:
    """A variant's name where all are ours; attention has but one backend here, PyTorch's fused one."""
    name = variant.removeprefix("mambakit ")
    return ATTENTION if name.split()[0] == ATTENTION else name
