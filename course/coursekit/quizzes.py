"""The quiz bank: questions as data, keys computed by the library.

`quizzes/m1.yaml` is a list of items:

    - id: m1-half-life              module and name
      anchor: m1-discretisation     what of the curriculum it belongs to
      type: number                  number, choice or text
      draw: {A: [-0.5, -2], dt: [0.01, 0.1]}     parameters; a reader's own values in graded mode
      given: "steps = math.log(2) / (-A * dt)"   Python that runs before the key, optional
      ask: A state decays with $A = {A}$ ... how many steps of {dt} ...?
      key: "steps"                  a Python expression
      again: "math.log(0.5) / math.log(math.exp(A * dt))"   the same by another way, for numbers
      why: what is behind the answer

A choice has `choices`, each with `text`, `holds` (true, false, or a Python expression) and `why`. Python sees
`math`, `torch`, `mambakit`, `ops`, `hippo` and the parameters.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import hmac
import itertools
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import mambakit
from coursekit.lessons import COURSE
from mambakit import ops
from mambakit.layers import hippo

TYPES = ("number", "choice", "text")
DIGITS = 3
"""Significant digits to which a number is asked for."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the answers to choose from.

    Attributes:
        text: Markdown.
        holds: Whether it is right.
        why: What to say to a reader who looked at it.
    """

    text: str
    holds: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Question:
    """An item with its parameters filled in.

    Attributes:
        id: The item's name.
        type: `number`, `choice` or `text`.
        ask: Markdown.
        key: A number, a text, or the sorted indices of the right choices.
        why: What is behind the answer.
        choices: Of a choice.
    """

    id: str
    type: str
    ask: str
    key: float | str | tuple[int, ...]
    why: str
    choices: tuple[Choice, ...] = ()

    def normal(self, answer: Any) -> str:
        """An answer as it is compared: numbers to three digits, texts without spaces and case."""
        if self.type == "number":
            return rounded(float(answer))
        if self.type == "choice":
            return ",".join(str(index) for index in sorted(int(index) for index in answer))
        return re.sub(r"\s+", "", str(answer)).lower()

    def is_right(self, answer: Any) -> bool:
        """Whether an answer is the key; of a number, within one unit of the third digit."""
        try:
            given = self.normal(answer)
        except (TypeError, ValueError):
            return False
        if self.type == "number":
            return given in neighbours(float(self.key))
        return given == self.normal(self.key)


def rounded(value: float) -> str:
    """A number to three significant digits, as JavaScript's `toExponential(2)` writes it."""
    mantissa, _, exponent = f"{value:.{DIGITS - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent):+d}"


def neighbours(value: float) -> tuple[str, str, str]:
    """The number to three digits, and one unit of the third digit below and above."""
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - DIGITS + 1) if value else 0.0
    return rounded(value - unit), rounded(value), rounded(value + unit)


def bank(module: str) -> dict[str, dict[str, Any]]:
    """The items of a module.

    Args:
        module: As `m1`, or `midterm` for the questions that stand in the midterm only.

    Raises:
        ValueError: Two items have one name, or an item lacks what it needs.
    """
    path = COURSE / ("midterm/questions.yaml" if module == "midterm" else f"quizzes/{module}.yaml")
    items = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    found: dict[str, dict[str, Any]] = {}
    for item in items or []:
        _complete(item, module)
        if item["id"] in found:
            raise ValueError(f"{path.name}: there are two items {item['id']}")
        found[item["id"]] = item
    return found


def _complete(item: Mapping[str, Any], module: str) -> None:
    needed = {
        "id",
        "anchor",
        "type",
        "ask",
        *(("choices",) if item.get("type") == "choice" else ("key", "why")),
    }
    if missing := needed - set(item):
        raise ValueError(f"quiz item {item.get('id', item)}: it has no {', '.join(sorted(missing))}")
    if item["type"] not in TYPES:
        raise ValueError(
            f"quiz item {item['id']}: type is {item['type']!r}, expected one of {', '.join(TYPES)}"
        )
    if not item["id"].startswith(f"{module}-"):
        raise ValueError(f"quiz item {item['id']}: its name should begin with {module}-")


def modules() -> list[str]:
    """The modules that have a bank."""
    return sorted(path.stem for path in Path(COURSE / "quizzes").glob("*.yaml"))


def ask(item: Mapping[str, Any], values: Mapping[str, Any]) -> Question:
    """Fill an item's parameters in and compute its key.

    Args:
        item: One of `bank`.
        values: A value of every parameter.
    """
    scope = {"math": math, "torch": torch, "mambakit": mambakit, "ops": ops, "hippo": hippo, **values}
    if "given" in item:
        exec(compile(item["given"], item["id"], "exec"), scope)
    choices = tuple(
        Choice(
            _filled(choice["text"], values),
            bool(_value(choice["holds"], scope)),
            _filled(choice["why"], values),
        )
        for choice in item.get("choices", [])
    )
    key: Any
    if item["type"] == "choice":
        key = tuple(index for index, choice in enumerate(choices) if choice.holds)
    else:
        key = _value(item["key"], scope)
        key = float(key) if item["type"] == "number" else str(key)
    return Question(
        item["id"],
        item["type"],
        _filled(item["ask"], values),
        key,
        _filled(item.get("why", ""), values),
        choices,
    )


def _value(expression: Any, scope: dict[str, Any]) -> Any:
    return eval(expression, scope) if isinstance(expression, str) else expression


def _filled(text: str, values: Mapping[str, Any]) -> str:
    """Parameters in braces replaced; other braces, as of formulas, left alone."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), text)


def first_values(item: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that the page shows: the first of each."""
    return {name: options[0] for name, options in item.get("draw", {}).items()}


def all_values(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of an item's parameters."""
    draw = item.get("draw", {})
    return [dict(zip(draw, chosen, strict=True)) for chosen in itertools.product(*draw.values())]


def disagreements(item: Mapping[str, Any]) -> list[str]:
    """What is wrong with an item's keys, over every combination of its parameters."""
    wrong = []
    for values in all_values(item):
        question = ask(item, values)
        if question.type == "number":
            if not math.isfinite(float(question.key)):
                wrong.append(f"{values}: the key is {question.key}")
            elif "again" not in item:
                wrong.append("a number needs a second way to its key: again")
            elif not question.is_right(ask({**item, "key": item["again"]}, values).key):
                wrong.append(f"{values}: the two ways to the key disagree")
        elif question.type == "choice" and not 0 < len(question.key) < len(question.choices):
            wrong.append(f"{values}: {len(question.key)} of {len(question.choices)} choices hold")
        if question.type == "choice" and not all(choice.why for choice in question.choices):
            wrong.append("a choice has no why")
    return wrong


# ---------------------------------------------------------------------------------------------------------
# Graded mode: every student gets parameters of their own, and the key is computed again when it is needed


def personal(module: str, student: str, secret: bytes) -> list[Question]:
    """A student's questions: parameters and order follow from their name and the instructor's secret.

    Args:
        module: As `m1`.
        student: Their name or number.
        secret: Known to the instructor only; with it the keys are computed, and no file holds them.
    """
    digest = hmac.new(secret, f"{module}|{student}".encode(), hashlib.sha256).digest()
    rng = random.Random(digest)
    items = list(bank(module).values())
    rng.shuffle(items)
    return [
        ask(item, {name: rng.choice(options) for name, options in item.get("draw", {}).items()})
        for item in items
    ]


def form(module: str, student: str, secret: bytes) -> str:
    """A student's questions as a YAML file to fill in, without the keys."""
    return written(personal(module, student, secret), quiz=module, student=student)


def written(questions: list[Question], **head: str) -> str:
    """Questions as a YAML file to fill in, without the keys.

    Args:
        questions: What to ask.
        head: What stands above the answers.
    """
    lines = [f"{name}: {_quoted(value)}" for name, value in head.items()] + ["answers:"]
    for question in questions:
        lines += [f"  # {line}" for line in question.ask.strip().splitlines()]
        lines += [f"  #   {index}: {choice.text.strip()}" for index, choice in enumerate(question.choices)]
        kind = {
            "number": "a number, three digits",
            "choice": "numbers of what holds, as [0, 2]",
            "text": "a text",
        }
        lines += [f"  {question.id}:   # {kind[question.type]}", ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=1000).strip()


def mark(text: str, secret: bytes) -> tuple[str, str, dict[str, bool]]:
    """Mark a form that was filled in.

    Args:
        text: The file.
        secret: As for `form`.

    Returns:
        Module, student, and which questions were answered rightly; one left out counts as wrong.

    Raises:
        ValueError: It is not a form.
    """
    filled = read_form(text)
    questions = personal(filled["quiz"], filled["student"], secret)
    return filled["quiz"], filled["student"], judged(questions, filled["answers"] or {})


def read_form(text: str) -> dict[str, Any]:
    """A form as it was handed in.

    Raises:
        ValueError: It is not a form.
    """
    filled = yaml.safe_load(text)
    if not isinstance(filled, dict) or not {"quiz", "student", "answers"} <= set(filled):
        raise ValueError("a quiz form has quiz, student and answers")
    if not isinstance(filled["answers"] or {}, dict):
        raise ValueError("the answers of a quiz form are lines like `m1-half-life: 3.5`")
    return filled


def judged(questions: list[Question], answers: Mapping[str, Any]) -> dict[str, bool]:
    """Which questions were answered rightly; one left out counts as wrong."""
    return {
        question.id: answers.get(question.id) is not None
        and question.is_right(_literal(answers[question.id]))
        for question in questions
    }


def _literal(answer: Any) -> Any:
    """`[0, 2]` written as a text, or a single number of a choice, as a list."""
    if isinstance(answer, str) and answer.strip().startswith("["):
        try:
            return ast.literal_eval(answer.strip())
        except (SyntaxError, ValueError):
            return answer
    return [answer] if isinstance(answer, int) and not isinstance(answer, bool) else answer
