"""The midterm over modules 1 to 4: for every student another one, and no file with the keys.

What a student gets follows from their name and the instructor's secret: questions of the midterm's own
(`midterm/questions.yaml`), questions from the banks of the modules with other values than the pages show, the
midterm's own coding tasks (`midterm/tasks.md`) and a graded exercise from every module. A bank that is not
written yet is left out, and the others give more.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext

from coursekit import exercises, lessons, quizzes

MODULES = ("m1", "m2", "m3", "m4")
QUESTIONS = 20
"""As many, as far as the banks have them."""
WEIGHTS = {"questions": 40, "tasks": 60}
"""Points of the two halves."""
NOTEBOOK, FORM = "midterm.ipynb", "midterm.quiz.yaml"


def _rng(part: str, student: str, secret: bytes) -> random.Random:
    return random.Random(hmac.new(secret, f"midterm|{part}|{student}".encode(), hashlib.sha256).digest())


def questions(student: str, secret: bytes) -> list[quizzes.Question]:
    """A student's questions, in an order of their own.

    Args:
        student: Their name or number.
        secret: Known to the instructor only.
    """
    rng = _rng("questions", student, secret)
    own = list(quizzes.bank("midterm").values())
    banks = [list(quizzes.bank(module).values()) for module in MODULES]
    drawn = own + _spread(banks, QUESTIONS - len(own), rng)
    rng.shuffle(drawn)
    return [quizzes.ask(item, _values(item, rng)) for item in drawn]


def _spread(banks: list[list[dict[str, Any]]], number: int, rng: random.Random) -> list[dict[str, Any]]:
    """Items of all banks in turn, each time from the topic that was asked about least."""
    banks = [rng.sample(bank, len(bank)) for bank in banks if bank]
    asked: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    while any(banks) and len(found) < number:
        for bank in filter(None, banks):
            if len(found) < number:
                item = min(bank, key=lambda item: asked.get(item["anchor"], 0))
                bank.remove(item)
                asked[item["anchor"]] = asked.get(item["anchor"], 0) + 1
                found.append(item)
    return found


def _values(item: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Values that no page shows, where there are any."""
    shown = quizzes.first_values(item)
    return rng.choice([values for values in quizzes.all_values(item) if values != shown] or [shown])


def tasks(student: str, secret: bytes) -> list[str]:
    """A student's coding tasks: the midterm's own, and a graded exercise of every module that has one.

    Args:
        student: Their name or number.
        secret: Known to the instructor only.
    """
    rng = _rng("tasks", student, secret)
    drawn = []
    for module in ("midterm", *MODULES):
        graded = [
            name
            for name, (where, _) in lessons.exercise_cells().items()
            if where.startswith(f"{module}/") and exercises.find(name).graded
        ]
        drawn += graded if module == "midterm" else [rng.choice(graded)] if graded else []
    return drawn


def version() -> str:
    """Fingerprint of everything that is drawn from: a midterm is marked by the course that made it."""
    digest = hashlib.sha256()
    for module in ("midterm", *MODULES):
        digest.update(json.dumps(quizzes.bank(module), sort_keys=True).encode())
    for name, (_, cell) in sorted(lessons.exercise_cells().items()):
        digest.update(f"{name} {exercises.find(name).graded} {lessons.stub(cell.code)}".encode())
    return digest.hexdigest()[:12]


def form(student: str, secret: bytes) -> str:
    """The questions as a YAML file to fill in, without the keys."""
    return quizzes.written(questions(student, secret), quiz="midterm", student=student, course=version())


def notebook(student: str, secret: bytes) -> jupytext.jupytext.NotebookNode:
    """The coding tasks as a notebook with empty cells."""
    names = tasks(student, secret)
    parts = [
        f"# Midterm: coding tasks of {student}\n\nComplete the cells. The cell below each says "
        "which properties hold; grading runs "
        "the same checks on other inputs. Hand in this file and `midterm.quiz.yaml`."
    ]
    for number, name in enumerate(names, start=1):
        exercise, (where, cell) = exercises.find(name), lessons.exercise_cells()[name]
        text = lessons.statement(lessons.source(where), name)
        parts += [
            f"## {number}. {exercise.title} ({exercise.points} points)\n\n{text}",
            f"```{{code-cell}} python\n:exercise: {name}\n{lessons.stub(cell.code)}```",
            "```{code-cell} python\nfrom coursekit import check\n\n"
            f'check("{name}", {exercise.function})\n```',
        ]
    made = jupytext.reads("\n\n".join(parts), fmt="md:myst")
    made.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "lesson": lessons.MIDTERM,
        "student": student,
        "exercises": names,
    }
    return made


def write(folder: Path, student: str, secret: bytes) -> list[Path]:
    """Write a student's midterm.

    Args:
        folder: Of the class; the student's folder is made in it.
        student: Their name or number, and their folder's.
        secret: Known to the instructor only.

    Returns:
        The notebook and the form.

    Raises:
        ValueError: The name is no name of a folder, or they have a midterm already.
    """
    if not student or Path(student).name != student:
        raise ValueError(f"{student!r} is no name of a folder")
    own = folder / student
    for name in (NOTEBOOK, FORM):
        if (own / name).exists():
            raise ValueError(f"{own / name} exists already; it may hold answers")
    own.mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook(student, secret), own / NOTEBOOK, fmt="ipynb")
    (own / FORM).write_text(form(student, secret), encoding="utf-8")
    return [own / NOTEBOOK, own / FORM]


def marked(student: str, text: str, secret: bytes) -> dict[str, bool]:
    """Mark the questions.

    Args:
        student: Whose folder the form lay in.
        text: The form as it was handed in.
        secret: What the midterm was made with.

    Returns:
        Question -> whether it was answered rightly.

    Raises:
        ValueError: It is no form, somebody else's, or was made by another version of the course.
    """
    filled = quizzes.read_form(text)
    if str(filled["student"]) != student:
        raise ValueError(f"this is the form of {filled['student']}")
    if filled.get("course") != version():
        raise ValueError(
            f"this form was made by the course in its version {filled.get('course')}, "
            f"and this is {version()}: "
            "mark it with the checkout that made it"
        )
    return quizzes.judged(questions(student, secret), filled["answers"] or {})
