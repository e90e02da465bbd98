"""The quiz bank: keys are computable, two ways to a number agree, and graded forms hold no key."""

from __future__ import annotations

import itertools

import pytest
import yaml
from coursekit import quizzes

SECRET = b"a secret of the tests"
ITEMS = [item for module in quizzes.modules() for item in quizzes.bank(module).values()]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["id"])
def test_keys_are_right_by_two_ways(item):
    assert quizzes.disagreements(item) == []


@pytest.mark.parametrize("module", quizzes.modules())
def test_every_student_gets_questions_of_their_own_and_the_right_answers_score(module):
    one, other = (quizzes.personal(module, student, SECRET) for student in ("ada", "grace"))
    assert [question.id for question in one] != [question.id for question in other]
    form = quizzes.form(module, "ada", SECRET)
    assert yaml.safe_load(form)["answers"] == dict.fromkeys(question.id for question in one)
    filled = {"quiz": module, "student": "ada", "answers": {q.id: as_written(q.key) for q in one}}
    _, student, right = quizzes.mark(yaml.safe_dump(filled), SECRET)
    assert student == "ada" and all(right.values()), right
    _, _, empty = quizzes.mark(form, SECRET)
    assert not any(empty.values())


def as_written(key):
    return list(key) if isinstance(key, tuple) else key


def test_wrong_answers_do_not_score():
    for item in ITEMS:
        question = quizzes.ask(item, quizzes.first_values(item))
        if question.type == "number":
            assert not question.is_right(1.05 * question.key + 0.01 * (question.key == 0))
            assert question.is_right(question.key * 1.0001)
        elif question.type == "choice":
            every = range(len(question.choices))
            subsets = itertools.chain.from_iterable(
                itertools.combinations(every, size) for size in range(len(question.choices) + 1)
            )
            assert [subset for subset in subsets if question.is_right(subset)] == [question.key]
        else:
            assert not question.is_right(f"{question.key} or not")


def test_numbers_are_rounded_as_javascript_does():
    assert [quizzes.rounded(x) for x in (0.0, 138.629, -0.00012345, 6.02e23)] == [
        "0.00e+0",
        "1.39e+2",
        "-1.23e-4",
        "6.02e+23",
    ]


def test_a_form_of_somebody_else_scores_nothing(tmp_path):
    from coursekit import grading

    questions = quizzes.personal("m1", "ada", SECRET)
    filled = {"quiz": "m1", "student": "ada", "answers": {q.id: as_written(q.key) for q in questions}}
    for student in ("ada", "bob"):
        (tmp_path / student).mkdir()
        (tmp_path / student / "m1.quiz.yaml").write_text(yaml.safe_dump(filled))
    ada, bob = grading.grade(tmp_path, seed=0, secret=SECRET)
    assert (ada.reached, bob.reached, bob.possible) == (len(questions), 0, len(questions))
    assert bob.details == ["this is the form of ada"]
