"""The midterm: drawn per student, marked without a key file; the reference gets all, a stub nothing."""

from __future__ import annotations

import json

import pytest
import yaml
from coursekit import exercises, grading, lessons, midterm, quizzes

SECRET = b"a secret of the tests"
OWN = list(quizzes.bank("midterm").values())


@pytest.mark.parametrize("item", OWN, ids=lambda item: item["id"])
def test_its_own_questions_have_two_ways_to_their_key_and_join_modules(item):
    assert quizzes.disagreements(item) == []
    anchors = [item["anchor"], *item["also"]]
    assert len({anchor.partition("-")[0] for anchor in anchors}) >= 2


def test_it_is_large_enough():
    assert len(OWN) >= 6
    own = [name for name in midterm.tasks("ada", SECRET) if name.startswith("midterm-")]
    assert len(own) >= 2 and all(exercises.find(name).graded for name in own)


def test_every_student_has_another_one_and_always_the_same():
    ada, bob = (midterm.questions(name, SECRET) for name in ("ada", "bob"))
    assert ada == midterm.questions("ada", SECRET)
    assert [question.ask for question in ada] != [question.ask for question in bob]
    assert len({question.id for question in ada}) == len(ada) <= midterm.QUESTIONS
    assert midterm.questions("ada", b"another") != ada


def test_it_draws_from_every_bank_that_exists_and_shows_other_values_than_the_pages():
    drawn = midterm.questions("ada", SECRET)
    banks = {module: quizzes.bank(module) for module in midterm.MODULES}
    for module, bank in banks.items():
        if bank:
            assert any(question.id in bank for question in drawn), module
    for question in drawn:
        item = {**banks, "midterm": quizzes.bank("midterm")}[question.id.partition("-")[0]][question.id]
        if item.get("draw") and "{" in item["ask"]:
            assert question.ask != quizzes.ask(item, quizzes.first_values(item)).ask, question.id


def test_banks_that_are_added_are_drawn_from(monkeypatch):
    """Nothing is listed by name: a bank and an exercise that appear are used."""
    real = quizzes.bank
    new = {
        f"m4-new-{i}": {"id": f"m4-new-{i}", "anchor": f"m4-x{i}", "type": "number", "ask": "?", "key": i,
                        "again": i, "why": "."}
        for i in range(1, 8)
    }  # fmt: skip
    monkeypatch.setattr(quizzes, "bank", lambda module: new if module == "m4" else real(module))
    assert sum(question.id in new for question in midterm.questions("ada", SECRET)) >= 3


def test_tasks_are_drawn_from_the_graded_exercises_of_every_module():
    for module in midterm.MODULES:
        graded = {
            name
            for name, (where, _) in lessons.exercise_cells().items()
            if where.startswith(f"{module}/") and exercises.find(name).graded
        }
        drawn = {name for student in "abcdefghijkl" for name in midterm.tasks(student, SECRET)}
        assert bool(graded) == bool(graded & drawn)
        assert len(graded) < 2 or len(graded & drawn) > 1, "always the same one"


def hand_in(folder, student, *, code, answers):
    """Write a midterm and fill it in."""
    notebook_path, form_path = midterm.write(folder, student, SECRET)
    notebook = json.loads(notebook_path.read_text())
    for cell in notebook["cells"]:
        name = cell["metadata"].get("exercise")
        if name is not None:
            cell["source"] = code(name, "".join(cell["source"]))
    notebook_path.write_text(json.dumps(notebook))
    filled = yaml.safe_load(form_path.read_text())
    filled["answers"] = {question.id: answers(question) for question in midterm.questions(student, SECRET)}
    form_path.write_text(yaml.safe_dump(filled))


def solution(name, stub):
    return lessons.solved(lessons.exercise_cells()[name][1].code)


def wrong(name, stub):
    return next(iter(exercises.find(name).wrong_answers.values()))


def key(question):
    return list(question.key) if isinstance(question.key, tuple) else question.key


def test_a_class_is_graded(tmp_path):
    """Reference 100, stub 0; wrong answers lose parts; another's form counts nothing."""
    hand_in(tmp_path, "ada", code=solution, answers=key)
    hand_in(tmp_path, "bob", code=lambda name, stub: stub, answers=lambda question: None)
    hand_in(tmp_path, "eve", code=wrong, answers=key)
    hand_in(tmp_path, "dan", code=solution, answers=key)
    (tmp_path / "dan" / midterm.FORM).write_text((tmp_path / "ada" / midterm.FORM).read_text())
    marks = {mark.student: mark for mark in grading.grade(tmp_path, seed=11, secret=SECRET)}
    assert {mark.work for mark in marks.values()} == {"midterm"}
    assert (marks["ada"].reached, marks["ada"].possible) == (100, 100), marks["ada"].details
    assert marks["bob"].reached == 0
    assert 40 < marks["eve"].reached < 100
    assert marks["dan"].reached == 60 and "questions: this is the form of ada" in marks["dan"].details
    assert "midterm / 100" in grading.as_csv(list(marks.values()))


def test_a_task_that_was_taken_out_or_half_a_midterm_costs_its_points(tmp_path):
    hand_in(tmp_path, "ada", code=solution, answers=key)
    path = tmp_path / "ada" / midterm.NOTEBOOK
    notebook = json.loads(path.read_text())
    notebook["cells"] = [
        cell for cell in notebook["cells"] if cell["metadata"].get("exercise") != "midterm-box"
    ]
    notebook["metadata"]["exercises"] = []
    path.write_text(json.dumps(notebook))
    (tmp_path / "ada" / midterm.FORM).unlink()
    [mark] = grading.grade(tmp_path, seed=1, secret=SECRET)
    assert 0 < mark.reached < 60
    assert any(line.startswith("midterm-box") and line.endswith("not handed in") for line in mark.details)
    assert f"{midterm.FORM} was not handed in" in mark.details


def test_a_form_of_another_version_is_refused_and_no_answers_are_overwritten(tmp_path):
    [_, form] = midterm.write(tmp_path, "ada", SECRET)
    with pytest.raises(ValueError, match="made by the course"):
        midterm.marked("ada", form.read_text().replace(midterm.version(), "0" * 12), SECRET)
    with pytest.raises(ValueError, match="may hold answers"):
        midterm.write(tmp_path, "ada", SECRET)
    with pytest.raises(ValueError, match="no name of a folder"):
        midterm.write(tmp_path, "../ada", SECRET)


def test_what_students_get_holds_no_solution(tmp_path):
    paths = midterm.write(tmp_path, "ada", SECRET)
    text = "".join(path.read_text() for path in paths)
    assert "canary-" not in text and "BEGIN SOLUTION" not in text
    assert text.count("NotImplementedError") == len(midterm.tasks("ada", SECRET))
    tasks = (lessons.COURSE / f"{lessons.MIDTERM}.md").read_text()
    assert "midterm" in (lessons.COURSE / "conf.py").read_text() and "canary-" in tasks
