"""Grading: run the checks on what students handed in, with seeds that they have not seen.

A folder holds a folder per student with notebooks (`m1-discretisation.ipynb`), quiz forms (`*.quiz.yaml`),
the two files of the midterm, and projects (a folder with `project.yaml`). Of a notebook only the cells of
exercises are executed, each by itself, in a process of its own; which exercises count is read from the
course, not from the notebook, so a deleted or crashed cell costs its points and nothing else.

Limits: this stops mistakes and shortcuts, not an attacker, since answer and check share a process.
"""

from __future__ import annotations

import builtins
import csv
import dataclasses
import html
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from coursekit import exercises, lessons, midterm, projects, quizzes

TIMEOUT = 300.0
"""Seconds for one notebook."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """One graded thing of one student.

    Attributes:
        student: Their folder's name.
        work: Exercise or quiz.
        reached: Points.
        possible: Points that it has.
        details: A line per part that was lost, with the reason.
    """

    student: str
    work: str
    reached: int
    possible: int
    details: list[str]


# ---------------------------------------------------------------------------------------------------------
# One answer


def namespace(code: str, banned: Iterable[str] = ()) -> dict[str, Any]:
    """Execute a cell by itself and return what it defined.

    Args:
        code: The cell.
        banned: Packages that it, and the functions it defines, cannot import.
    """
    refused = set(banned)
    real = builtins.__import__

    def guarded(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] in refused:
            raise ImportError(f"{name} may not be used in this answer")
        return real(name, *arguments, **keywords)

    scope: dict[str, Any] = {
        "__name__": "answer",
        "__builtins__": {**vars(builtins), "__import__": guarded},
    }
    exec(compile(code, "answer", "exec"), scope)
    return scope


def judge(exercise: exercises.Exercise, code: str | None, seed: int) -> list[exercises.Outcome]:
    """Run an exercise's checks on a cell.

    Args:
        exercise: Which.
        code: The cell, or None where it was not handed in.
        seed: Seed of the inputs.
    """

    def lost(reason: str) -> list[exercises.Outcome]:
        return [exercises.Outcome(part.title, part.points, False, reason) for part in exercise.parts]

    if code is None:
        return lost("not handed in")
    try:
        scope = namespace(code, exercise.banned if exercise.graded else ())
    except Exception as error:  # the student's code may raise anything
        return lost(f"the cell does not run: {type(error).__name__}: {error}")
    if exercise.function not in scope:
        return lost(f"the cell does not define {exercise.function}")
    return exercise.judge(scope[exercise.function], seed)


def answers(notebook: Mapping[str, Any]) -> dict[str, str]:
    """Exercise -> cell, of a notebook as it was handed in."""
    found = {}
    for cell in notebook.get("cells", []):
        exercise = cell.get("metadata", {}).get("exercise")
        if exercise is not None and cell.get("cell_type") == "code":
            found[exercise] = "".join(cell["source"])
    return found


def check_notebook(
    path: Path, seed: int, *, graded_only: bool = False, only: Iterable[str] | None = None
) -> list[tuple[str, list[exercises.Outcome]]]:
    """Judge every exercise of a notebook's lesson, or of a midterm's own list.

    Args:
        path: The notebook.
        seed: Seed of the inputs.
        graded_only: Leave practice out.
        only: These exercises, whatever the notebook says that it is.

    Raises:
        ValueError: It is not a notebook of a lesson.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a notebook: {error}") from error
    lesson = notebook.get("metadata", {}).get("lesson")
    if only is not None:
        names = list(only)
    elif lesson == lessons.MIDTERM:
        names = [str(name) for name in notebook["metadata"].get("exercises", [])]
    elif lesson in lessons.names():
        cells = lessons.cells(lessons.source(lesson))
        names = [cell.exercise for cell in cells if cell.exercise is not None]
    else:
        raise ValueError(f"{path} is not a notebook of a lesson")
    found = answers(notebook)
    wanted = [exercise for exercise in map(exercises.find, names) if exercise.graded or not graded_only]
    return [(exercise.id, judge(exercise, found.get(exercise.id), seed)) for exercise in wanted]


# ---------------------------------------------------------------------------------------------------------
# A class


def grade(folder: Path, seed: int, secret: bytes | None) -> list[Mark]:
    """Grade everything in a folder of students' folders.

    Args:
        folder: A folder per student.
        seed: Seed of the inputs; keep it to yourself until the marks are out.
        secret: The instructor's secret, for quiz forms; without it there may be none.

    Raises:
        ValueError: There is nothing to grade, or quiz forms and no secret.
    """
    marks: list[Mark] = []
    for student in sorted(path for path in folder.iterdir() if path.is_dir()):
        for notebook in sorted(student.glob("*.ipynb")):
            if notebook.name != midterm.NOTEBOOK:
                marks += _grade_notebook(student.name, notebook, seed)
        forms = sorted(student.glob("*.quiz.yaml"))
        has_midterm = any((student / name).exists() for name in (midterm.NOTEBOOK, midterm.FORM))
        if secret is None and (forms or has_midterm):
            raise ValueError(f"the forms of {student} need the secret they were made with: --secret-file")
        marks += [_grade_form(student.name, form, secret) for form in forms if form.name != midterm.FORM]
        if has_midterm:
            marks.append(_grade_midterm(student, seed, secret))
        for project in sorted(student.glob("*/project.yaml")):
            marks.append(_grade_project(student.name, project.parent))
    if not marks:
        raise ValueError(
            f"{folder} has no folder with notebooks (*.ipynb), quiz forms (*.quiz.yaml) or projects in it"
        )
    return marks


def _grade_notebook(student: str, path: Path, seed: int) -> list[Mark]:
    judged = _judged_apart(path, seed)
    if isinstance(judged, str):
        return _all_lost(student, path, judged)
    return [_mark(student, name, outcomes) for name, outcomes in judged]


def _judged_apart(
    path: Path, seed: int, only: Iterable[str] = ()
) -> list[tuple[str, list[exercises.Outcome]]] | str:
    """Outcomes, or why there are none. In a process of its own: a crash costs this notebook only."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "coursekit.grading", str(path.resolve()), str(seed), *only]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {TIMEOUT:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    judged = json.loads(done.stdout.splitlines()[-1])
    return [(name, [exercises.Outcome(**one) for one in outcomes]) for name, outcomes in judged]


def _grade_midterm(folder: Path, seed: int, secret: bytes) -> Mark:
    """Both halves, each with its weight; one that is not there has no points."""
    student, details = folder.name, []
    names = midterm.tasks(student, secret)
    share = dict.fromkeys(midterm.WEIGHTS, 0.0)
    if (folder / midterm.FORM).exists():
        try:
            right = midterm.marked(student, (folder / midterm.FORM).read_text(encoding="utf-8"), secret)
            share["questions"] = sum(right.values()) / len(right)
            details += [f"{name}: not right" for name, passed in right.items() if not passed]
        except (ValueError, yaml.YAMLError) as error:
            details.append(f"questions: {error}")
    else:
        details.append(f"{midterm.FORM} was not handed in")
    if (folder / midterm.NOTEBOOK).exists():
        judged = _judged_apart(folder / midterm.NOTEBOOK, seed, names)
        if isinstance(judged, str):
            details.append(f"tasks: {judged}")
        else:
            marks = [_mark(student, name, outcomes) for name, outcomes in judged]
            share["tasks"] = sum(m.reached for m in marks) / sum(m.possible for m in marks)
            details += [f"{mark.work}: {line}" for mark in marks for line in mark.details]
    else:
        details.append(f"{midterm.NOTEBOOK} was not handed in")
    points = sum(midterm.WEIGHTS[half] * share[half] for half in share)
    return Mark(student, "midterm", round(points), sum(midterm.WEIGHTS.values()), details)


def _grade_project(student: str, folder: Path) -> Mark:
    findings = projects.verify(folder)
    return Mark(
        student,
        "project, by machine",
        sum(finding.points for finding in findings if finding.passed),
        projects.POINTS,
        [f"{finding.title}: {finding.message}" for finding in findings if not finding.passed],
    )


def _all_lost(student: str, path: Path, reason: str) -> list[Mark]:
    """A notebook that could not be judged: the exercises of the lesson that its name says."""
    module, _, rest = path.stem.partition("-")
    lesson = f"{module}/{rest}"
    if lesson not in lessons.names():
        return [Mark(student, path.name, 0, 0, [reason])]
    graded = [
        exercises.find(cell.exercise)
        for cell in lessons.cells(lessons.source(lesson))
        if cell.exercise is not None and exercises.find(cell.exercise).graded
    ]
    return [Mark(student, exercise.id, 0, exercise.points, [reason]) for exercise in graded]


def _mark(student: str, work: str, outcomes: list[exercises.Outcome]) -> Mark:
    return Mark(
        student,
        work,
        sum(outcome.points for outcome in outcomes if outcome.passed),
        sum(outcome.points for outcome in outcomes),
        [f"{outcome.title}: {outcome.message}" for outcome in outcomes if not outcome.passed],
    )


def _grade_form(student: str, path: Path, secret: bytes) -> Mark:
    try:
        module, owner, right = quizzes.mark(path.read_text(encoding="utf-8"), secret)
    except (ValueError, yaml.YAMLError) as error:
        return Mark(student, path.name, 0, 0, [f"this is no quiz form: {error}"])
    if owner != student:
        return Mark(student, f"quiz {module}", 0, len(right), [f"this is the form of {owner}"])
    wrong = [f"{name}: not right" for name, passed in right.items() if not passed]
    return Mark(student, f"quiz {module}", sum(right.values()), len(right), wrong)


# ---------------------------------------------------------------------------------------------------------
# Reports


def as_json(marks: list[Mark]) -> str:
    """Everything."""
    return json.dumps([dataclasses.asdict(mark) for mark in marks], indent=2) + "\n"


def as_csv(marks: list[Mark]) -> str:
    """A row per student, a column per work, for a spreadsheet."""
    works = list(dict.fromkeys(mark.work for mark in marks))
    possible = {mark.work: mark.possible for mark in marks}
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["student", *(f"{work} / {possible[work]}" for work in works), "total"])
    for student in dict.fromkeys(mark.student for mark in marks):
        own = {mark.work: mark.reached for mark in marks if mark.student == student}
        table.writerow([student, *(own.get(work, 0) for work in works), sum(own.values())])
    return out.getvalue()


def as_html(marks: list[Mark]) -> str:
    """A page with a section per student and the reasons of lost points."""
    sections = []
    for student in dict.fromkeys(mark.student for mark in marks):
        rows = "".join(
            f"<tr><td>{html.escape(mark.work)}</td><td>{mark.reached} of {mark.possible}</td>"
            f"<td>{'<br>'.join(html.escape(line) for line in mark.details)}</td></tr>"
            for mark in marks
            if mark.student == student
        )
        sections.append(
            f"<h2>{html.escape(student)}</h2><table><tr><th>work</th><th>points</th><th>lost</th></tr>{rows}</table>"
        )
    style = (
        "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{text-align:left;"
    )
    style += "vertical-align:top;padding:.3em 1em .3em 0;border-top:1px solid #ccc}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Marks</title><style>{style}</style>'
        f"<h1>Marks</h1>{''.join(sections)}</html>\n"
    )


if __name__ == "__main__":
    judged = check_notebook(Path(sys.argv[1]), int(sys.argv[2]), graded_only=True, only=sys.argv[3:] or None)
    result = [[name, [dataclasses.asdict(outcome) for outcome in outcomes]] for name, outcomes in judged]
    sys.stdout.write("\n" + json.dumps(result) + "\n")
