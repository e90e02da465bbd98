"""From a dataset to a stream of batches that can start anywhere.

Batch k holds the samples start + k * batch_size onwards, whatever the number of workers, so a resumed run
asks for `start = samples already seen` and reads on as if it had never stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mambakit.data.samples import Samples


def batches(
    dataset: Samples,
    batch_size: int,
    start: int = 0,
    count: int | None = None,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Iterate over batches of consecutive samples.

    Args:
        dataset: Endless or finite samples.
        batch_size: Samples per batch, b.
        start: Global number of the first sample.
        count: Number of batches; None reads to the end of a finite dataset and for ever from an endless one.
        workers: Processes that make batches ahead of time; 0 makes them in this process.
        drop_last: Leave out the last batch of a finite dataset where it is smaller than the others.
        pin_memory: Put the tensors into page-locked memory, for faster copies to a GPU.

    Returns:
        An iterator over dicts of stacked tensors with leading axis b. It draws nothing from PyTorch's global
        random state.

    Raises:
        ValueError: A number is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("start", start, 0),
        ("count", 0 if count is None else count, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    sampler = _Consecutive(dataset.size, batch_size, start, count, drop_last)
    loader = DataLoader(
        _Batched(dataset),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        # DataLoader draws a seed for its workers; from a generator of its own, so that making an
        # iterator does not shift the dropout masks of a resumed run.
        generator=torch.Generator(),
    )
    return iter(loader)


class _Consecutive(Sampler):
    """Lists of consecutive sample numbers, one list per batch."""

    def __init__(
        self, size: int | None, batch_size: int, start: int, count: int | None, drop_last: bool
    ) -> None:
        self.size, self.batch_size, self.start, self.count = size, batch_size, start, count
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[int]]:
        numbers = itertools.count() if self.count is None else range(self.count)
        for k in numbers:
            first = self.start + k * self.batch_size
            last = first + self.batch_size
            if self.size is not None and last > self.size:
                if first < self.size and not self.drop_last:
                    yield list(range(first, self.size))
                return
            yield list(range(first, last))


class _Batched(Dataset):
    """Index by a whole list of sample numbers, so that one call makes one batch."""

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.dataset.batch(indices)
