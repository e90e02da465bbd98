"""Randomness: pure, disjoint between splits, uniform where it says so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data.samples import Epochs, Samples, Stream, below, shuffle, subsets, uniform


class Squares(Samples):
    """Item i is i * i: enough to see which items come when."""

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"item": indices, "square": np.stack([indices, indices**2], axis=1)}


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal frequencies, as standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_words_are_the_documented_philox_stream():
    words = Stream(7, "validation").words(np.array([3, 12_345_678_901]), 9)
    for row, index in zip(words, (3, 12_345_678_901), strict=True):
        key = np.array([7, 1], dtype=np.uint64)
        expected = np.random.Philox(key=key, counter=[0, 0, 0, index]).random_raw(9)
        assert (row == expected).all()


@given(
    seed=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
    counts=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_words_depend_on_seed_index_and_place_only(seed, indices, counts):
    few, many = sorted(counts)
    whole = Stream(seed, "train").words(np.array(indices), many)
    for row, index in zip(whole, indices, strict=True):
        alone = Stream(seed, "train").words(np.array([index]), few)
        assert (alone[0] == row[:few]).all()


def test_no_two_splits_or_seeds_or_samples_share_words():
    blocks = [
        Stream(seed, split).words(np.arange(50), 40)
        for seed, split in itertools.product((0, 1, 2**63), ("train", "validation", "evaluation", "order"))
    ]
    words = np.concatenate(blocks).ravel()
    assert len(np.unique(words)) == words.size


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=str(seed)):
        Stream(seed, "train")


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"tset.*train"):
        Stream(0, "tset")


@pytest.mark.parametrize("bound", [1, 2, 7, 14, 1000])
def test_below_is_uniform_and_reaches_both_ends(bound):
    counts = np.bincount(
        below(Stream(0, "train").words(np.arange(100), 2000), bound).ravel(), minlength=bound
    )
    assert len(counts) == bound
    assert counts.min() > 0
    assert bound == 1 or abs(chi_square(counts)) < 5


def test_below_at_the_edges_of_a_word():
    words = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert below(words, 2**32).tolist() == [0, 2**32 - 1]
    assert below(words, np.array([5, 3])).tolist() == [0, 2]


def test_uniform_lies_in_the_unit_interval():
    assert uniform(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0.0, 1 - 2.0**-53]


def test_subsets_are_all_equally_likely():
    chosen = np.sort(subsets(Stream(1, "train").words(np.arange(30_000), 3), 6), axis=1)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 20  # 6 choose 3
    assert abs(chi_square(counts)) < 5


@given(population=st.integers(1, 60), data=st.data())
def test_subsets_have_different_members_in_range(population, data):
    k = data.draw(st.integers(0, population))
    chosen = subsets(Stream(2, "train").words(np.arange(4), k), population)
    assert chosen.shape == (4, k)
    for row in chosen.tolist():
        assert len(set(row)) == k
        assert all(0 <= member < population for member in row)


def test_shuffled_orders_are_all_equally_likely():
    values = np.tile(np.arange(4), (20_000, 1))
    _, counts = np.unique(
        shuffle(Stream(3, "train").words(np.arange(20_000), 4), values), axis=0, return_counts=True
    )
    assert len(counts) == 24
    assert abs(chi_square(counts)) < 5


def test_item_slice_and_batch_agree():
    data = Squares(10)
    batch = data.batch([3, 1, 1, 9])
    for row, (index, item) in enumerate(zip([3, 1, 1, 9], data.__getitems__([3, 1, 1, 9]), strict=True)):
        for name in ("item", "square"):
            assert torch.equal(batch[name][row], item[name])
            assert torch.equal(batch[name][row], data[index][name])


@pytest.mark.parametrize("index", [-1, 10])
def test_item_outside_a_finite_dataset_is_an_index_error(index):
    with pytest.raises(IndexError, match="valid: 0 to 9"):
        Squares(10)[index]


def test_endless_dataset_has_no_length_but_any_item():
    with pytest.raises(TypeError, match="endless"):
        len(Squares())
    assert Squares()[2**40]["item"] == 2**40


def test_each_epoch_is_a_permutation_of_its_own():
    data = Epochs(Squares(37), seed=5)
    items = data.batch(range(4 * 37))["item"].view(4, 37)
    for epoch in items:
        assert sorted(epoch.tolist()) == list(range(37))
    assert len({tuple(epoch.tolist()) for epoch in items}) == 4
    assert not torch.equal(items, Epochs(Squares(37), seed=6).batch(range(4 * 37))["item"].view(4, 37))


@given(indices=st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_epochs_do_not_depend_on_what_was_asked_before(indices):
    warm, fresh = Epochs(Squares(11), seed=1), Epochs(Squares(11), seed=1)
    asked_together = warm.batch(indices)["item"]
    one_by_one = [int(fresh[index]["item"]) for index in reversed(indices)][::-1]
    assert asked_together.tolist() == one_by_one
