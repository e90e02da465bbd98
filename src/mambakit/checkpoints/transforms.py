"""The ways in which a published tensor differs from ours, each in both directions.

A transform joins a list of their tensors into one of ours and splits it again; a fusion takes one of theirs
apart into several of ours and fuses it again. There and back gives the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Transform:
    """How tensors of theirs become one of ours, and back.

    Attributes:
        join: Their tensors, in the order of the row -> ours.
        split: Ours and how many they are -> theirs.
    """

    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor, int], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How one tensor of theirs holds several of ours.

    Attributes:
        take_apart: Theirs and the sizes of our first axes -> ours.
        fuse: Ours -> theirs.
    """

    take_apart: Callable[[Tensor, Sequence[int]], Sequence[Tensor]]
    fuse: Callable[[Sequence[Tensor]], Tensor]


SAME = Transform(lambda theirs: theirs[0], lambda ours, count: [ours])
"""One tensor, the same in both."""

CONCAT = Transform(torch.cat, lambda ours, count: list(ours.chunk(count)))
"""Ours is theirs one after the other along the first axis, all of one size."""

STACK = Transform(torch.stack, lambda ours, count: list(ours.unbind()))
"""Ours has one more axis in front, such as experts that they keep apart."""


def _halves(theirs: list[Tensor]) -> Tensor:
    half = len(theirs) // 2
    return torch.cat([torch.stack(theirs[:half]), torch.stack(theirs[half:])], dim=1)


STACK_CONCAT = Transform(
    _halves, lambda ours, count: [one for half in ours.chunk(2, dim=1) for one in half.unbind()]
)
"""Experts that they keep apart, two matrices of each: all of the first, then all of the second."""


def _swap(halves: Tensor) -> Tensor:
    return torch.cat(
        halves.chunk(2, dim=-2 if halves.ndim > 1 else -1)[::-1], dim=-2 if halves.ndim > 1 else -1
    )


SWAP_HALVES = Transform(lambda theirs: _swap(theirs[0]), lambda ours, count: [_swap(ours)])
"""Two halves of the output rows in the other order, such as gate and value of an MLP."""


def _pairs_apart(pairs: Tensor) -> Tensor:
    return pairs.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _pairs_together(halves: Tensor) -> Tensor:
    return halves.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


PAIRS = Transform(lambda theirs: _pairs_apart(theirs[0]), lambda ours, count: [_pairs_together(ours)])
"""Two halves of the output rows, which theirs has row by row in turn."""


def heads(count: int) -> Transform:
    """The first axis of ours is two axes of theirs: heads and channels of a head."""
    return Transform(lambda theirs: theirs[0].flatten(0, 1), lambda ours, _: [ours.unflatten(0, (count, -1))])


ROWS_APART = Fusion(lambda theirs, sizes: theirs.split(list(sizes)), torch.cat)
"""Ours stand one after the other in theirs."""


def groups_apart(groups: int) -> Fusion:
    """Ours stand in theirs group by group: a share of each, `groups` times."""

    def take_apart(theirs: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        shares = theirs.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
        return [share.flatten(0, 1) for share in shares]

    def fuse(ours: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.unflatten(0, (groups, -1)) for one in ours], dim=1).flatten(0, 1)

    return Fusion(take_apart, fuse)
