"""Selective copying: the answers are the data tokens in their order, and their places are random."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import SelectiveCopyingConfig
from mambakit.data.samples import IGNORED


@given(
    length=st.integers(0, 40),
    n_data=st.integers(1, 9),
    vocab_size=st.integers(3, 20),
    seed=st.integers(0, 99),
)
def test_the_answers_are_the_data_in_order(length, n_data, vocab_size, seed):
    config = SelectiveCopyingConfig(length=length, n_data=n_data, vocab_size=vocab_size)
    batch = config.train(seed).batch(range(5))
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(tokens) == len(labels) == length + 2 * n_data
        body, markers = tokens[:-n_data], tokens[-n_data:]
        assert markers == [vocab_size - 1] * n_data
        data = [token for token in body if token != 0]
        assert len(data) == n_data
        assert all(1 <= token <= vocab_size - 2 for token in data)
        assert labels == [IGNORED] * len(body) + data


def test_places_and_symbols_are_uniform():
    batch = SelectiveCopyingConfig(length=12, n_data=4, vocab_size=7).train(0).batch(range(8000))
    body = batch["tokens"][:, :16]
    share = (body != 0).double().mean(dim=0)
    assert ((share - 4 / 16).abs() < 5 * math.sqrt(0.25 * 0.75 / 8000)).all()
    counts = body[body != 0].bincount(minlength=6)[1:]
    assert ((counts - 6400).abs() < 5 * math.sqrt(6400)).all()
    # Which symbol it is does not depend on where it lies.
    first = body[body[:, 0] != 0, 0].bincount(minlength=6)[1:]
    assert ((first - 400).abs() < 5 * math.sqrt(400)).all()


def test_the_defaults_are_the_papers():
    config = SelectiveCopyingConfig()
    sample = config.train(0)[0]
    assert sample["tokens"].shape == (4096 + 32,)
    assert (config.n_data, config.vocab_size) == (16, 16)
    assert config.chance == pytest.approx(1 / 14)


def test_evaluations_have_their_lengths():
    config = SelectiveCopyingConfig(length=30, n_data=2, evaluation_lengths=(60, 7), evaluation_samples=5)
    tests = config.evaluations()
    assert {name: data[4]["tokens"].shape[0] for name, data in tests.items()} == {
        "length_60": 64,
        "length_7": 11,
    }
    assert {len(data) for data in (*tests.values(), config.validation())} == {5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": -1}, "length is -1"),
        ({"n_data": 0}, "n_data is 0"),
        ({"vocab_size": 2}, "vocab_size is 2, expected at least 3"),
        ({"evaluation_lengths": (5, -2)}, r"evaluation_lengths is \(5, -2\)"),
        ({"evaluation_samples": 0}, "evaluation_samples is 0"),
    ],
)
def test_settings_that_make_no_task_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectiveCopyingConfig(**settings)
