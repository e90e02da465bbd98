"""Rotary position embedding (RoPE): positions enter attention as rotations of queries and keys.

Channel pair `i` of a head turns by the angle `position * base^(-2i / dims)`, so that a score depends on the
difference of two positions only. Published models differ in which channels form a pair (the two halves of
the head, or neighbours), in how many channels turn, and in the base.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(
    positions: Tensor, dims: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        positions: Position of each token `(b, l)` or `(l,)`, in tokens.
        dims: Channels of a head that turn, an even number.
        base: The slowest pair's wavelength is about `2 pi base` tokens.
        dtype: Type of the result and of all that leads to it, float32 or wider.

    Returns:
        Two tensors `(b, l, 1, dims / 2)` (or `(l, 1, dims / 2)`), ready to broadcast over heads.

    Raises:
        ValueError: `dims` is odd.

    Source:
        Su et al., "RoFormer" (2104.09864), section 3.2.2.
    """
    if dims % 2:
        raise ValueError(f"rotary embedding turns pairs; got {dims} channels, expected an even number")
    exponents = torch.arange(0, dims, 2, device=positions.device, dtype=dtype) / dims
    # float32 as in published models: at 2^20 tokens rounding turns a pair by up to 0.03 rad.
    turned = positions.to(dtype)[..., None] * (1.0 / base**exponents)
    turned = turned.unsqueeze(-2)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the channel pairs of queries or keys.

    `(a, b) -> (a cos - b sin, a sin + b cos)` for each pair; channels beyond the turned ones pass.

    Args:
        x: Queries or keys `(b, l, h, p)`.
        cos: Cosines from `angles`.
        sin: Sines from `angles`.
        interleaved: Pair neighbours `(2i, 2i + 1)`; otherwise channel `i` pairs with `i + dims / 2`.

    Returns:
        Rotated `(b, l, h, p)` in the type of `x`, computed in float32 at least.

    Raises:
        ValueError: More channels to turn than the head has.

    Source:
        Su et al., "RoFormer" (2104.09864), equation 34.
    """
    dims = 2 * cos.shape[-1]
    if dims > x.shape[-1]:
        raise ValueError(f"rotary embedding of {dims} channels, but the heads have {x.shape[-1]}")
    work = torch.promote_types(x.dtype, torch.float32)
    turning = x[..., :dims].to(work)
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    y = y.to(x.dtype)
    return y if dims == x.shape[-1] else torch.cat([y, x[..., dims:]], dim=-1)
