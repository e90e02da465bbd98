"""Exercises: what a reader is to write, and the properties by which it is judged.

A check is made of parts; each is a property or a comparison with something independent, takes the reader's
function and a random generator, and says what is wrong by an assertion. Nothing in it is a copy of the
answer, so it can be public; grading runs it with other seeds. Every exercise also lists wrong answers, and
the tests of the course hold that its reference passes on several seeds while the empty cell and every wrong
answer fail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

Body = Callable[[Any, torch.Generator], None]

REGISTRY: dict[str, Exercise] = {}
"""Every exercise that has been loaded."""

BANNED = ("mambakit", "scipy", "importlib", "coursekit")
"""What a graded answer may not import unless its exercise says otherwise."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One property.

    Attributes:
        title: What it demands, in a few words; the reader sees it.
        points: What it counts.
        body: The check itself.
    """

    title: str
    points: int
    body: Body


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        title: As in `Part`.
        points: As in `Part`.
        passed: Whether the property holds.
        message: What is wrong, empty where it passed.
    """

    title: str
    points: int
    passed: bool
    message: str = ""


@dataclasses.dataclass
class Exercise:
    """One exercise; making it registers it.

    Attributes:
        id: Module and name, `m1-zoh`.
        function: The name that the reader's cell defines.
        title: What it is about.
        stars: Difficulty, 1 to 3.
        minutes: How long it takes.
        graded: Whether it counts, so that its solution is shown nowhere.
        banned: Packages that a graded answer may not import.
    """

    id: str
    function: str
    title: str
    stars: int
    minutes: int
    graded: bool = False
    banned: tuple[str, ...] = BANNED
    parts: list[Part] = dataclasses.field(default_factory=list)
    wrong_answers: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Register it."""
        if self.id in REGISTRY:
            raise ValueError(f"there are two exercises {self.id}")
        REGISTRY[self.id] = self

    def part(self, title: str, points: int = 1) -> Callable[[Body], Body]:
        """Add the decorated function as a property."""

        def add(body: Body) -> Body:
            self.parts.append(Part(title, points, body))
            return body

        return add

    def wrong(self, mistake: str, code: str) -> None:
        """Add an answer that the check must refuse.

        Args:
            mistake: The misunderstanding behind it.
            code: A whole cell.
        """
        self.wrong_answers[mistake] = code

    @property
    def points(self) -> int:
        """What it counts in all."""
        return sum(part.points for part in self.parts)

    def judge(self, function: Any, seed: int = 0) -> list[Outcome]:
        """Run every part.

        Args:
            function: What the reader wrote.
            seed: Seed of the inputs; with another one they differ.
        """
        return [_outcome(self.id, part, function, seed) for part in self.parts]


def _outcome(exercise: str, part: Part, function: Any, seed: int) -> Outcome:
    digest = hashlib.sha256(f"{exercise}/{part.title}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    try:
        part.body(function, generator)
    except NotImplementedError:
        return Outcome(part.title, part.points, False, "not written yet")
    except Exception as error:  # the reader's code may raise anything, and every part is to be judged
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome(part.title, part.points, False, f"{kind}{error}".strip() or "it does not hold")
    return Outcome(part.title, part.points, True)


def find(exercise: str) -> Exercise:
    """The exercise of that name.

    Raises:
        ValueError: There is none.
    """
    load_all()
    if exercise not in REGISTRY:
        raise ValueError(f"there is no exercise {exercise!r}; there are {', '.join(sorted(REGISTRY))}")
    return REGISTRY[exercise]


def load_all() -> dict[str, Exercise]:
    """Every exercise of the course."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return REGISTRY


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check shows: a line per part."""

    exercise: Exercise
    outcomes: list[Outcome]

    def __str__(self) -> str:
        """As plain text."""
        reached = sum(outcome.points for outcome in self.outcomes if outcome.passed)
        lines = [f"{self.exercise.title}: {reached} of {self.exercise.points} points"]
        for outcome in self.outcomes:
            mark = "passed" if outcome.passed else "FAILED"
            lines.append(f"  {mark}  {outcome.title}" + (f": {outcome.message}" if outcome.message else ""))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        reached = sum(outcome.points for outcome in self.outcomes if outcome.passed)
        rows = "".join(
            f'<li class="{"passed" if outcome.passed else "failed"}">{html.escape(outcome.title)}'
            + (f": <em>{html.escape(outcome.message)}</em>" if outcome.message else "")
            + "</li>"
            for outcome in self.outcomes
        )
        head = f"{html.escape(self.exercise.title)}: {reached} of {self.exercise.points} points"
        return f'<div class="check"><p>{head}</p><ul>{rows}</ul></div>'


def check(exercise: str, function: Any) -> Report:
    """Check what you wrote for an exercise.

    Args:
        exercise: Its name.
        function: Your function.

    Returns:
        A line per property, for the end of a cell.
    """
    found = find(exercise)
    return Report(found, found.judge(function))


def close(got: Any, expected: torch.Tensor, what: str, tolerance: float = 1e-6) -> None:
    """Assert that a result is near an expected one, and say how far off it is.

    Args:
        got: What the reader's function returned.
        expected: What it should be.
        what: Its name in the message.
        tolerance: Largest difference allowed, relative to the largest expected value or to 1.
    """
    assert isinstance(got, torch.Tensor), f"{what} is a {type(got).__name__}, expected a tensor"
    assert got.shape == expected.shape, (
        f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    assert bool(torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all()), (
        f"{what} is not finite"
    )
    off = (got - expected).abs().max().item() if got.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert off <= tolerance * scale, f"{what} is off by {off:.1e}, expected at most {tolerance * scale:.0e}"
