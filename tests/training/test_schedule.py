"""Learning rates, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mambakit.training.schedule import ScheduleConfig, factor, same_so_far


def test_warmup_is_linear_and_its_first_step_already_learns():
    config = ScheduleConfig(name="constant", warmup=4)
    assert [factor(s, 10, config) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_float_is_a_share_of_the_run_and_an_integer_counts_steps():
    assert factor(0, 200, ScheduleConfig(name="constant", warmup=0.1)) == 1 / 20
    assert factor(0, 200, ScheduleConfig(name="constant", warmup=1.0)) == 1 / 200
    assert factor(0, 200, ScheduleConfig(name="constant", warmup=1)) == 1.0


def test_cosine_runs_from_the_peak_to_the_minimum():
    config = ScheduleConfig(name="cosine", warmup=10, min_lr_ratio=0.2)
    assert factor(10, 110, config) == 1.0
    assert factor(60, 110, config) == pytest.approx(0.6)
    assert factor(35, 110, config) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert factor(110, 110, config) == pytest.approx(0.2)
    assert factor(500, 110, config) == pytest.approx(0.2)


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.55), ("1-sqrt", 1 - 0.9 * math.sqrt(0.5))])
def test_wsd_is_flat_and_then_falls(shape: str, halfway: float):
    config = ScheduleConfig(name="wsd", warmup=2, decay=20, decay_shape=shape, min_lr_ratio=0.1)
    assert all(factor(s, 100, config) == 1.0 for s in range(2, 81))
    assert factor(90, 100, config) == pytest.approx(halfway)
    assert factor(100, 100, config) == pytest.approx(0.1)
    falling = [factor(s, 100, config) for s in range(80, 101)]
    assert falling == sorted(falling, reverse=True)


def test_only_schedules_that_do_not_know_their_length_can_be_lengthened():
    wsd = ScheduleConfig(name="wsd", warmup=5, decay=10)
    cosine = ScheduleConfig(name="cosine")
    assert same_so_far(90, (100, wsd), (1000, wsd))
    assert not same_so_far(95, (100, wsd), (1000, wsd))
    assert not same_so_far(10, (100, cosine), (1000, cosine))
    assert same_so_far(0, (100, cosine), (1000, cosine))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "cosin"},
        {"warmup": -1},
        {"warmup": 1.5},
        {"decay": 2.0},
        {"min_lr_ratio": 1.1},
        {"decay_shape": "x"},
    ],
)
def test_meaningless_settings_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("name", "did you mean 'cosine'")):
        ScheduleConfig(**wrong)
