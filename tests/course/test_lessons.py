"""A lesson's source gives the right page and the right notebook, and keeps its solutions to itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from coursekit import exercises, figures, grading, lessons, notebooks

NAMES = lessons.names()
CELLS = lessons.exercise_cells()
CANARY = re.compile(r"canary-[0-9a-f]{8}")
COLUMNS = 88  # of code; beyond that a reader has to scroll


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_has_what_every_lesson_has(name):
    text = lessons.source(name)
    head = lessons.front_matter(text)["lesson"]
    assert {"module", "topic", "anchors", "minutes", "cpu_seconds", "needs", "goal"} <= set(head)
    assert head["cpu_seconds"] <= lessons.BUDGET
    assert set(head["needs"]) <= set(NAMES)
    code = "\n".join(cell.code for cell in lessons.cells(text))
    assert re.search(r"^\s*assert ", code, re.MULTILINE), (
        "no assertion holds the lesson's own code to the library"
    )
    assert "figure(" in code or "plotly(" in code or "plt." in code, "no picture"
    assert "## Exercises" in text and "{quiz}" in text
    if head["topic"] != "paper":
        assert "mambakit" in code
    for cell in lessons.cells(text):
        ast.parse(cell.code)
        wide = [line for line in cell.code.splitlines() if len(line) > COLUMNS]
        assert not wide, wide


@pytest.mark.parametrize("name", NAMES)
def test_the_page_and_the_notebook_hold_no_solution_of_a_graded_exercise(name):
    text = lessons.source(name)
    page = lessons.page(text, lambda exercise: exercises.find(exercise).graded, lambda lesson: "")
    hidden = re.findall(
        r"^```\{code-cell\} python\n:tags: \[remove-input\]\n.*?^```$", page, re.MULTILINE | re.DOTALL
    )
    shown = page
    for cell in hidden:
        shown = shown.replace(cell, "")
    assert not CANARY.search(shown)
    assert "BEGIN SOLUTION" not in page
    notebook = json.dumps(notebooks.notebook(name))
    assert not CANARY.search(notebook)
    for exercise, (where, cell) in CELLS.items():
        if where == name:
            assert "NotImplementedError" in lessons.stub(cell.code)
            assert json.dumps(lessons.stub(cell.code).strip())[1:-1] in notebook, exercise


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_no_markup_of_the_site(name):
    for cell in notebooks.notebook(name).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"^:::|\{[a-z:]+\}`|^\([\w-]+\)=$", cell.source, re.MULTILINE), cell.source


def test_a_notebook_that_is_handed_in_is_graded(tmp_path):
    """The reference gets every point, the empty one none; what crashes or is broken loses its own only."""
    name = "m1/discretisation"
    solved = notebooks.notebook(name, solved=True)
    empty = notebooks.notebook(name)
    broken = notebooks.notebook(name, solved=True)
    for cell in broken.cells:
        if cell.metadata.get("exercise") == "m1-bilinear":
            cell.source = "this is no Python"
    for student, notebook in {"ada": solved, "bob": empty, "eve": broken}.items():
        (tmp_path / student).mkdir()
        (tmp_path / student / "m1-discretisation.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "zoe").mkdir()
    (tmp_path / "zoe" / "m1-discretisation.ipynb").write_text("{")
    assert solved.metadata["lesson"] == name
    marks = {mark.student: mark for mark in grading.grade(tmp_path, seed=7, secret=None)}
    points = exercises.find("m1-bilinear").points
    assert {student: (mark.reached, mark.possible) for student, mark in marks.items()} == {
        "ada": (points, points),
        "bob": (0, points),
        "eve": (0, points),
        "zoe": (0, points),
    }
    assert marks["bob"].details[0].endswith("not written yet")
    assert "does not run: SyntaxError" in marks["eve"].details[0]
    assert "is not a notebook" in marks["zoe"].details[0]
    table = grading.as_csv(list(marks.values())).splitlines()
    assert table[0] == f"student,m1-bilinear / {points},total" and table[1] == f"ada,{points},{points}"
    assert json.loads(grading.as_json(list(marks.values())))[1]["student"] == "bob"
    assert "not written yet" in grading.as_html(list(marks.values()))


def test_figures_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match=r"no figure 'pie'.*discretisation"):
        figures.figure("pie", {}, label="", caption="")
    with pytest.raises(ValueError, match="not finite"):
        figures.figure("discretisation", {"x": [float("nan")]}, label="", caption="")


def test_a_figure_outside_the_site_brings_its_script(monkeypatch):
    monkeypatch.delenv("COURSE_SITE", raising=False)
    drawn = figures.figure("discretisation", {"x": [1.0]}, label="a", caption="b")._repr_html_()
    assert 'CourseFigures.register("discretisation"' in drawn and "mountAll()" in drawn


@pytest.mark.parametrize("name", figures.available())
def test_scripts_are_scripts(name):
    """Where node is installed, it parses them."""
    path = figures.STATIC / "figures" / f"{name}.js"
    try:
        done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("node is not installed")
    assert done.returncode == 0, done.stderr


def test_modules_of_the_course_are_found_by_the_command(tmp_path, monkeypatch, capsys):
    from mambakit.cli import course, main

    assert course.find_course(lessons.COURSE / "m1") == lessons.COURSE
    assert course.find_course(tmp_path) is None
    monkeypatch.setattr(course, "find_course", lambda *places: None)
    assert main(["course", "build"]) == 2
    assert "inside a checkout" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    import coursekit

    from mambakit.cli import main

    monkeypatch.chdir(Path(__file__).parent)  # in the checkout, also where the package is installed elsewhere
    monkeypatch.setitem(sys.modules, "jupytext", None)
    monkeypatch.delitem(sys.modules, "coursekit.notebooks")
    monkeypatch.delattr(coursekit, "notebooks")
    assert main(["course", "notebooks"]) == 2
    assert "pip install -c constraints.txt '.[course]'" in capsys.readouterr().err
