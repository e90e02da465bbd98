"""The rotation of state columns in pairs, by angles that accumulate over a sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rates(angles: Tensor, dt: Tensor) -> Tensor:
    """By how much each token turns each head: `pi tanh(angles) dt`.

    Args:
        angles: Raw rates `(..., s)`, shared by the heads.
        dt: Step sizes `(..., h)`.

    Returns:
        Angles `(..., h, s)`, radians.
    """
    return (math.pi * torch.tanh(angles)).unsqueeze(-2) * dt.unsqueeze(-1)


def wrap(angle: Tensor) -> Tensor:
    """The same angle in `[-pi, pi]`: sums of any length keep their digits. Its derivative is 1."""
    return angle - 2 * math.pi * torch.round(angle / (2 * math.pi)).detach()


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of columns, `(u, v) -> (u cos - v sin, u sin + v cos)`.

    Args:
        vectors: `(..., n)`.
        cos: Cosine of the angle of each pair `(..., s)`.
        sin: Its sine.
        interleaved: Pair `i` is columns `(2i, 2i + 1)`; otherwise `(i, i + n / 2)`. Columns of no pair, where
            `2 s < n`, stay.

    Returns:
        `(..., n)`.
    """
    n, s = vectors.shape[-1], cos.shape[-1]
    if interleaved:
        u, v = vectors[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)
        turned = torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1).flatten(-2)
        return turned if 2 * s == n else torch.cat([turned, vectors[..., 2 * s :]], dim=-1)
    first, second = vectors.chunk(2, dim=-1)
    u, v = first[..., :s], second[..., :s]
    turned = [u * cos - v * sin, first[..., s:], u * sin + v * cos, second[..., s:]]
    return torch.cat(turned if 2 * s < n else turned[::2], dim=-1)
