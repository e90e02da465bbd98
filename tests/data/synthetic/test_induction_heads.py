"""Induction heads: one place to look, one right answer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import InductionHeadsConfig
from mambakit.data.samples import IGNORED


@given(length=st.integers(3, 50), vocab_size=st.integers(2, 20), seed=st.integers(0, 99))
def test_the_answer_follows_the_only_earlier_special_token(length, vocab_size, seed):
    config = InductionHeadsConfig(length=length, vocab_size=vocab_size)
    batch = config.train(seed).batch(range(8))
    special = vocab_size - 1
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        places = [t for t, token in enumerate(tokens) if token == special]
        assert len(tokens) == length
        assert len(places) == 2
        assert places[1] == length - 1
        assert labels[:-1] == [IGNORED] * (length - 1)
        assert labels[-1] == tokens[places[0] + 1] != special


def test_places_answers_and_fillers_are_uniform():
    batch = InductionHeadsConfig(length=12, vocab_size=6).train(0).batch(range(10_000))
    places = (batch["tokens"] == 5).int().argmax(dim=1).bincount()
    assert len(places) == 10  # 0 to l - 3
    assert ((places - 1000).abs() < 5 * math.sqrt(1000)).all()
    answers = batch["labels"][:, -1].bincount()
    assert len(answers) == 5
    assert ((answers - 2000).abs() < 5 * math.sqrt(2000)).all()
    fillers = batch["tokens"][batch["tokens"] != 5].bincount()
    assert ((fillers - 20_000).abs() < 5 * math.sqrt(20_000)).all()


def test_the_defaults_are_the_papers():
    config = InductionHeadsConfig()
    assert config.train(0)[0]["tokens"].shape == (256,)
    assert list(config.evaluations()) == [f"length_{2**k}" for k in range(6, 21)]
    assert config.chance == pytest.approx(0.067, abs=1e-3)


def test_a_million_tokens_still_have_their_answer():
    sample = InductionHeadsConfig(evaluation_lengths=(2**20,)).evaluations()["length_1048576"][0]
    tokens = sample["tokens"]
    places = (tokens == 15).nonzero().flatten().tolist()
    assert places[1] == 2**20 - 1
    assert sample["labels"][-1] == tokens[places[0] + 1]


@pytest.mark.parametrize("settings", [{"length": 2}, {"vocab_size": 1}, {"evaluation_lengths": (64, 2)}])
def test_settings_that_make_no_task_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        InductionHeadsConfig(**settings)
