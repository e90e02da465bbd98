"""Every check is itself checked: the reference passes, the empty cell and every listed wrong answer fail."""

from __future__ import annotations

import re

import pytest
from coursekit import exercises, grading, lessons

EXERCISES = exercises.load_all()
CELLS = lessons.exercise_cells()
SEEDS = range(5)


def passed(outcomes: list[exercises.Outcome]) -> bool:
    return all(outcome.passed for outcome in outcomes)


def test_every_exercise_stands_in_a_lesson_and_every_cell_has_a_check():
    assert set(CELLS) == set(EXERCISES)


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_a_check_tells_right_from_wrong(name):
    exercise, (_, cell) = EXERCISES[name], CELLS[name]
    right = lessons.solved(cell.code)
    for seed in SEEDS:
        outcomes = grading.judge(exercise, right, seed)
        assert passed(outcomes), (seed, outcomes)
    empty = grading.judge(exercise, lessons.stub(cell.code), 0)
    assert not any(outcome.passed for outcome in empty), empty
    assert len(exercise.wrong_answers) >= 2, "list the mistakes that a reader will make"
    for mistake, code in exercise.wrong_answers.items():
        for seed in SEEDS:
            assert not passed(grading.judge(exercise, code, seed)), f"{mistake} is accepted (seed {seed})"


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_every_part_of_a_check_refuses_something(name):
    """A part that every wrong answer passes tests nothing that the others do not, unless it is the stub's."""
    exercise = EXERCISES[name]
    for part in exercise.parts:
        refused = [
            mistake
            for mistake, code in exercise.wrong_answers.items()
            for outcome in grading.judge(exercise, code, 1)
            if outcome.title == part.title and not outcome.passed
        ]
        assert refused, f"no wrong answer fails {part.title!r}"


def test_graded_solutions_carry_canaries_of_their_own():
    canaries = [canary for name in CELLS for canary in canaries_of(name)]
    assert len(canaries) == len(set(canaries))


def canaries_of(name: str) -> list[str]:
    """The canaries of an exercise: one in every graded solution, none in practice."""
    solutions = re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", CELLS[name][1].code, re.DOTALL)
    assert solutions, f"{name} has no solution"
    found = [re.findall(r"# (canary-[0-9a-f]{8})$", solution, re.MULTILINE) for solution in solutions]
    if not EXERCISES[name].graded:
        assert not any(found), f"{name} is practice and needs no canary"
        return []
    assert all(len(each) == 1 for each in found), (
        f"{name} is graded: its solutions need '# canary-' and 8 digits"
    )
    return [each[0] for each in found]


def test_an_answer_cannot_import_what_is_banned():
    exercise = EXERCISES["m1-bilinear"]
    code = "def bilinear(dt, A, B):\n    import scipy.signal\n    return scipy.signal.cont2discrete\n"
    messages = [outcome.message for outcome in grading.judge(exercise, code, 0)]
    assert all("scipy.signal may not be used" in message for message in messages), messages
