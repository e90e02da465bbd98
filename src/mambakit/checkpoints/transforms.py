"""The ways in which a published tensor differs from ours, each in both directions.

A transform joins a list of their tensors into one of ours and splits it again; joining after splitting gives
the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
