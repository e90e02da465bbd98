"""What the course covers (`curriculum.yaml`), and what of it is written."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import yaml

from coursekit.lessons import COURSE


@dataclasses.dataclass(frozen=True)
class Entry:
    """A topic, hands-on exercise or paper.

    Attributes:
        module: As `m1`.
        anchor: The name of its place in a lesson.
        topic: Number in the syllabus.
        text: What it is.
        lesson: Where it is taught.
        is_written: Whether it is.
        kind: `topic`, `hands-on` or `paper`.
        checks: Exercises that test it.
        discussion: Why there is nothing to check, where there is not.
    """

    module: str
    anchor: str
    topic: str
    text: str
    lesson: str
    is_written: bool
    kind: str = "topic"
    checks: tuple[str, ...] = ()
    discussion: str = ""


@functools.cache
def _load() -> tuple[Entry, ...]:
    data: dict[str, Any] = yaml.safe_load((COURSE / "curriculum.yaml").read_text(encoding="utf-8"))
    planned = set(data.pop("planned") or [])
    return tuple(
        Entry(
            module=module,
            is_written=item["anchor"] not in planned,
            **{**item, "checks": tuple(item.get("checks", ()))},
        )
        for module, items in data.items()
        for item in items
    )


def entries(module: str | None = None) -> list[Entry]:
    """Everything, or a module's part of it, in the order of the syllabus."""
    return [entry for entry in _load() if module in (None, entry.module)]


def find(anchor: str) -> Entry:
    """The entry of that anchor.

    Raises:
        ValueError: There is none.
    """
    for entry in _load():
        if entry.anchor == anchor:
            return entry
    raise ValueError(f"curriculum.yaml has no anchor {anchor!r}")


def written(module: str) -> list[str]:
    """The lessons of a module that exist, in the order of the syllabus."""
    return list(dict.fromkeys(entry.lesson for entry in entries(module) if entry.is_written))
