"""Parity: labels equal a slow count, lengths and stages as asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import ParityConfig
from mambakit.data.samples import IGNORED


@given(shortest=st.integers(1, 12), more=st.integers(0, 12), seed=st.integers(0, 99))
@pytest.mark.parametrize("labels", ["last", "every"])
def test_labels_equal_a_slow_count(labels, shortest, more, seed):
    config = ParityConfig(min_length=shortest, max_lengths=(shortest + more,), labels=labels)
    batch = config.train(seed).batch(range(6))
    for tokens, answers in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(tokens) == shortest + more
        bits = [token - 1 for token in tokens if token != 0]
        assert shortest <= len(bits) <= shortest + more
        assert tokens == [1 + bit for bit in bits] + [0] * (len(tokens) - len(bits))
        so_far, expected = False, []
        for bit in bits:
            so_far = not so_far if bit == 1 else so_far
            expected.append(1 + so_far)
        if labels == "last":
            expected = [IGNORED] * (len(bits) - 1) + expected[-1:]
        assert answers == expected + [IGNORED] * (len(tokens) - len(bits))


@pytest.mark.parametrize("labels", ["last", "every"])
def test_validation_and_tests_ask_for_the_last_bit_only(labels):
    config = ParityConfig(labels=labels, max_lengths=(12,), evaluation_lengths=(20,))
    for data in (config.validation(), config.evaluations()["length_20"]):
        asked = data.batch(range(50))["labels"] != IGNORED
        assert (asked.sum(dim=1) == 1).all()


def test_lengths_bits_and_answers_are_uniform():
    batch = ParityConfig(min_length=3, max_lengths=(12,)).train(0).batch(range(10_000))
    lengths = (batch["tokens"] != 0).sum(dim=1).bincount()
    assert lengths[:3].tolist() == [0, 0, 0]
    assert ((lengths[3:] - 1000).abs() < 5 * math.sqrt(1000)).all()
    assert len(lengths) == 13
    ones = (batch["tokens"] == 2).sum() / (batch["tokens"] != 0).sum()
    odd = (batch["labels"] == 2).sum() / (batch["labels"] != IGNORED).sum()
    assert abs(ones - 0.5) < 0.01
    assert abs(odd - 0.5) < 0.025


def test_training_lengths_grow_in_stages():
    config = ParityConfig(min_length=3, max_lengths=(5, 9, 20), stage_samples=100)
    data = config.train(0)
    for stage, longest in ((0, 5), (1, 9), (2, 20), (7, 20)):
        batch = data.batch(range(100 * stage, 100 * stage + 100))
        lengths = (batch["tokens"] != 0).sum(dim=1)
        assert batch["tokens"].shape == (100, longest)
        assert (lengths.min(), lengths.max()) == (3, longest)
    # A batch over a border is as wide as its widest sample, and otherwise the same.
    both = data.batch([99, 100])
    assert both["tokens"].shape == (2, 9)
    assert both["tokens"][0, :5].tolist() == data[99]["tokens"].tolist()
    assert not both["tokens"][0, 5:].any()
    assert (both["labels"][0, 5:] == IGNORED).all()
    assert config.validation()[0]["tokens"].shape == (20,)


def test_evaluations_have_exactly_their_length():
    tests = ParityConfig(evaluation_lengths=(40, 256), evaluation_samples=9).evaluations()
    for name, length in (("length_40", 40), ("length_256", 256)):
        batch = tests[name].batch(range(9))
        assert batch["tokens"].shape == (9, length)
        assert batch["tokens"].all()
        assert (batch["labels"][:, -1] != IGNORED).all()


def test_the_defaults_are_the_protocols():
    config = ParityConfig()
    assert (config.min_length, config.max_lengths, config.vocab_size, config.chance) == (3, (40,), 3, 0.5)
    assert list(config.evaluations()) == ["length_40", "length_64", "length_128", "length_256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "each"}, "unknown labels 'each'"),
        ({"min_length": 0}, "min_length is 0"),
        ({"max_lengths": (40, 2)}, r"max_lengths is \(40, 2\), expected at least 3"),
        ({"max_lengths": ()}, "max_lengths is empty"),
        ({"stage_samples": 0}, "stage_samples is 0"),
        ({"evaluation_lengths": (0,)}, "evaluation_lengths"),
    ],
)
def test_settings_that_make_no_task_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ParityConfig(**settings)
