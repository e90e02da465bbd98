"""Samples as a pure function of (seed, global index), and where their randomness comes from.

Every dataset here answers "what is sample 1,234,567 of seed 3?" without having made the ones before. That is
what makes a resumed run equal to an uninterrupted one, whatever the number of workers.

The randomness is counter based (Philox 4x64-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): the key is (seed, split), the top word of the counter is the sample's index, so no two samples and
no two splits ever share a counter. Only raw 64-bit words are taken from numpy. Those are fixed for all numpy
versions (NEP 19), while the streams of `Generator.integers` and `Generator.permutation` may change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "validation", "evaluation", "order")
IGNORED = -100


class Stream:
    """The random words of all samples of one split.

    Args:
        seed: Integer in [0, 2**64).
        split: `"train"`, `"validation"`, `"evaluation"`, or `"order"` (which shuffles, and makes no samples).

    Raises:
        ValueError: The seed is out of range or the split is unknown.
    """

    def __init__(self, seed: int, split: str) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, expected an integer in [0, 2**64)")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        self.split = split
        self.key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)

    def words(self, indices: np.ndarray, count: int) -> np.ndarray:
        """Draw the first `count` words of each sample.

        Asking for more words never changes the first ones.

        Args:
            indices: Global sample numbers, (b,).
            count: Words per sample.

        Returns:
            Uniform 64-bit integers, (b, count) uint64.
        """
        words = np.empty((len(indices), count), dtype=np.uint64)
        # Setting the state of one generator is four times as fast as making one for every sample.
        generator = np.random.Philox(key=self.key)
        state = generator.state
        for row, index in zip(words, indices, strict=True):
            state["state"]["counter"][3] = index
            generator.state = state
            row[:] = generator.random_raw(count)
        return words


def below(words: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Turn random words into integers in [0, bound), each as likely as the others to within bound / 2**32.

    Args:
        words: uint64, any shape.
        bound: Positive integers up to 2**32, a scalar or of a shape that broadcasts to that of `words`.

    Returns:
        int64, the broadcast shape.
    """
    bound = np.asarray(bound, dtype=np.uint64)
    return (((words >> np.uint64(32)) * bound) >> np.uint64(32)).astype(np.int64)


def uniform(words: np.ndarray) -> np.ndarray:
    """Turn random words into float64 numbers in [0, 1) with 53 random bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def subsets(words: np.ndarray, population: int) -> np.ndarray:
    """Choose k different integers in [0, population), all subsets equally likely, for each row of words.

    Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987), one step for all rows at once.
    The order within a row is not uniform: sort it, or `shuffle` it.

    Args:
        words: (b, k) uint64.
        population: At least k.

    Returns:
        (b, k) int64.
    """
    b, k = words.shape
    rows = np.arange(b)
    taken = np.zeros((b, population), dtype=bool)
    chosen = np.empty((b, k), dtype=np.int64)
    for step in range(k):
        newest = population - k + step
        pick = below(words[:, step], newest + 1)
        chosen[:, step] = np.where(taken[rows, pick], newest, pick)
        taken[rows, chosen[:, step]] = True
    return chosen


def shuffle(words: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Put each row of `values` (b, k) into a uniformly random order given by `words` (b, k) uint64."""
    return np.take_along_axis(values, np.argsort(words, axis=1, kind="stable"), axis=1)


class Samples(Dataset):
    """A map-style dataset that makes whole batches at once.

    A subclass implements `generate`; item by item and batch by batch then agree by construction.

    Args:
        size: Number of samples, or None for an endless dataset.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples with the global numbers `indices` (b,), stacked along the first axis."""
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            indices: b global sample numbers, in any order, repeats allowed.

        Returns:
            Tensors with leading axis b.

        Raises:
            IndexError: A number is negative, or not below the length of a finite dataset.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and (numbers.min() < 0 or (self.size is not None and numbers.max() >= self.size)):
            limit = "up" if self.size is None else f"to {self.size - 1}"
            raise IndexError(f"sample numbers {numbers.min()} to {numbers.max()} asked for, valid: 0 {limit}")
        return {name: torch.from_numpy(array) for name, array in self.generate(numbers).items()}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Make one sample."""
        return {name: tensor[0] for name, tensor in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Make several samples at once; PyTorch's own loaders look for this method."""
        batch = self.batch(indices)
        return [{name: tensor[row] for name, tensor in batch.items()} for row in range(len(indices))]

    def __len__(self) -> int:
        """Number of samples.

        Raises:
            TypeError: The dataset is endless.
        """
        if self.size is None:
            raise TypeError(f"{type(self).__name__} is endless and has no length")
        return self.size


class Epochs(Samples):
    """A finite dataset read over and over, every pass in its own random order.

    Sample i is item `order(i // n)[i % n]`, so each item comes once per pass.

    Args:
        source: The finite dataset, of length n > 0.
        seed: Integer in [0, 2**64) that decides the orders.
    """

    def __init__(self, source: Samples, seed: int) -> None:
        super().__init__()
        self.source = source
        self._stream = Stream(seed, "order")
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The order of pass number `epoch`: a permutation of 0..n-1, (n,) int64."""
        if epoch not in self._orders:
            words = self._stream.words(np.array([epoch]), len(self.source))
            # A batch touches at most the end of one pass and the start of the next, unless it is huge.
            self._orders = {k: self._orders[k] for k in (epoch - 1, epoch + 1) if k in self._orders}
            self._orders[epoch] = np.argsort(words[0], kind="stable")
        return self._orders[epoch]

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples numbered `indices` (b,)."""
        epochs, positions = np.divmod(indices, len(self.source))
        items = np.empty_like(indices)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            items[now] = self.order(int(epoch))[positions[now]]
        return self.source.generate(items)
