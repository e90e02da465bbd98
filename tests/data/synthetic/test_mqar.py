"""MQAR: every key once with its value and once as a question, at gaps from the power law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import MqarConfig
from mambakit.data.samples import IGNORED


@given(
    n_pairs=st.integers(1, 8),
    extra=st.integers(0, 10),
    vocab_size=st.integers(20, 200),
    random_non_queries=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_key_is_asked_for_once_and_answered_by_its_value(
    n_pairs, extra, vocab_size, random_non_queries, seed
):
    length = 4 * n_pairs + 2 * extra
    config = MqarConfig(
        length=length, n_pairs=n_pairs, vocab_size=vocab_size, random_non_queries=random_non_queries
    )
    batch = config.train(seed).batch(range(4))
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(tokens) == length
        keys, values = tokens[0 : 2 * n_pairs : 2], tokens[1 : 2 * n_pairs : 2]
        assert len(set(keys)) == len(set(values)) == n_pairs
        assert all(
            1 <= key < vocab_size // 2 <= value < vocab_size for key, value in zip(keys, values, strict=True)
        )
        asked = [t for t in range(length) if labels[t] != IGNORED]
        assert sorted(tokens[t] for t in asked) == sorted(keys)
        assert all(t >= 2 * n_pairs and t % 2 == 0 for t in asked)
        lookup = dict(zip(keys, values, strict=True))
        assert all(labels[t] == lookup[tokens[t]] for t in asked)
        rest = [tokens[t] for t in range(2 * n_pairs, length) if t not in asked]
        assert random_non_queries or not any(rest)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    config = MqarConfig(length=42, n_pairs=1, power=power, examples=None)
    labels = config.train(0).batch(range(20_000))["labels"]
    gaps = (labels != IGNORED).int().argmax(dim=1).sub(2).div(2, rounding_mode="floor")
    got = gaps.bincount(minlength=20).double().numpy()
    law = np.arange(1, 21) ** (power - 1.0)
    expected = 20_000 * law / law.sum()
    assert (np.abs(got - expected) < 5 * np.sqrt(expected)).all()


def test_several_gaps_are_drawn_one_after_the_other():
    # Two keys, three places: the first key's place has the law itself, the second's the law of the rest.
    config = MqarConfig(length=10, n_pairs=2, vocab_size=8, power=0.2, examples=None)
    batch = config.train(0).batch(range(30_000))
    keys = batch["tokens"][:, 0:4:2]
    places = torch.stack([(batch["tokens"][:, 4::2] == key[:, None]).int().argmax(dim=1) for key in keys.T])
    got = np.zeros((3, 3))
    np.add.at(got, tuple(places.numpy()), 1 / 30_000)
    p = np.arange(1, 4) ** -0.8
    p /= p.sum()
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(3)] for i in range(3)])
    assert np.abs(got - expected).max() < 5 * 0.5 / np.sqrt(30_000)


def test_pairing_is_random():
    batch = MqarConfig(n_pairs=2, length=8, vocab_size=6, examples=None).train(0).batch(range(9000))["tokens"]
    # Keys 1 and 2 in two orders, values 3, 4, 5 in six.
    _, counts = torch.unique(batch[:, :4], dim=0, return_counts=True)
    assert len(counts) == 12
    assert ((counts - 750).abs() < 5 * 750**0.5).all()


def test_random_filler_covers_the_vocabulary():
    config = MqarConfig(length=64, n_pairs=1, vocab_size=16, random_non_queries=True, examples=None)
    counts = config.train(0).batch(range(400))["tokens"][:, 3::2].flatten().bincount(minlength=16)
    assert ((counts - 775).abs() < 5 * 775**0.5).all()


def test_the_defaults_are_figure_2_of_the_paper_read_in_epochs():
    config = MqarConfig(examples=50)
    assert (config.length, config.n_pairs, config.vocab_size, MqarConfig().examples) == (64, 4, 8192, 100_000)
    assert (config.chance, config.baseline.value) == (1 / 4096, 1 / 4)
    rows = [tuple(row) for row in config.train(2).batch(range(150))["tokens"].tolist()]
    assert len(set(rows)) == 50
    assert set(rows[:50]) == set(rows[50:100]) == set(rows[100:])
    fresh = MqarConfig(examples=None).train(2).batch(range(150))["tokens"]
    assert len({tuple(row) for row in fresh.tolist()}) == 150


def test_evaluations_have_their_sizes():
    config = MqarConfig(evaluation_settings=((128, 8), (512, 64)), evaluation_samples=3)
    for name, (length, n_pairs) in zip(
        ("length_128_pairs_8", "length_512_pairs_64"), config.evaluation_settings, strict=True
    ):
        batch = config.evaluations()[name].batch(range(3))
        assert batch["tokens"].shape == (3, length)
        assert ((batch["labels"] != IGNORED).sum(dim=1) == n_pairs).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 14}, r"at least 4 \* 4 pairs"),
        ({"length": 17}, "length is 17, expected an even number"),
        ({"evaluation_settings": ((64, 17),)}, "length is 64"),
        ({"vocab_size": 8}, "n_pairs is 4, expected less than half of the 8"),
        ({"power": 0.0}, "power is 0.0"),
        ({"examples": 0}, "examples is 0"),
        ({"n_pairs": 0}, "n_pairs is 0"),
    ],
)
def test_settings_that_make_no_task_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MqarConfig(**settings)
