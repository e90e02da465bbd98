"""The loader: which samples are in which batch, from any start and with any number of workers."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import ParityConfig, SelectiveCopyingConfig, batches
from mambakit.data.samples import Samples


class Numbers(Samples):
    """Item i is i."""

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"i": indices}


def numbers(*args, **kwargs) -> list[list[int]]:
    return [batch["i"].tolist() for batch in batches(*args, **kwargs)]


@given(
    size=st.integers(0, 40),
    batch_size=st.integers(1, 12),
    start=st.integers(0, 45),
    count=st.none() | st.integers(0, 6),
    drop_last=st.booleans(),
)
def test_batches_are_the_consecutive_slices(size, batch_size, start, count, drop_last):
    expected = [list(range(size))[a : a + batch_size] for a in range(start, size, batch_size)]
    if drop_last:
        expected = [batch for batch in expected if len(batch) == batch_size]
    got = numbers(Numbers(size), batch_size, start=start, count=count, drop_last=drop_last)
    assert got == expected[:count]


def test_endless_data_goes_on_and_resumes_exactly():
    data = ParityConfig().train(seed=3)
    run = list(itertools.islice(batches(data, 4), 6))
    resumed = list(batches(data, 4, start=4 * 4, count=2))
    for ours, theirs in zip(run[4:], resumed, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    config = SelectiveCopyingConfig(length=20, n_data=4, evaluation_samples=23)
    alone = list(batches(config.train(1), 5, start=7, count=5))
    helped = list(batches(config.train(1), 5, start=7, count=5, workers=workers))
    alone += list(batches(config.validation(), 5))
    helped += list(batches(config.validation(), 5, workers=workers))
    assert [len(batch["tokens"]) for batch in alone] == [5] * 5 + [5] * 4 + [3]
    for ours, theirs in zip(alone, helped, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_process_makes_the_same_samples_from_a_pickled_dataset():
    data = ParityConfig().train(9)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(data.batch([5, 6])["tokens"], copy.batch([5, 6])["tokens"])


def test_reading_data_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    assert len(list(batches(Numbers(10), 2, workers=0))) == 5
    next(batches(ParityConfig().train(0), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_pytorchs_own_loader_works_on_the_datasets():
    data = ParityConfig(evaluation_samples=10).validation()
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    for ours, theirs in zip(batches(data, 4), loader, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"start": -1}, {"count": -1}, {"workers": -2}],
    ids=lambda s: next(iter(s)),
)
def test_numbers_out_of_range_are_named(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        batches(Numbers(5), **{"batch_size": 1, **settings})
