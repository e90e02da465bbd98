"""Triton kernels of the sum and its norm: each tensor is read once and written once, in either direction.

A program takes R rows of `d` channels at a time, a row padded to SIZE. In the backward pass it walks over
many rows and keeps the sums for weight and bias in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _centred(s, inside, d, eps, LAYER: tl.constexpr):
    """`s`, less its mean for a layer norm, and `1 / root` of rows (R, SIZE)."""
    if LAYER:
        s = tl.where(inside, s - tl.sum(s, axis=1)[:, None] / d, 0.0)
    return s, 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / d + eps)


@triton.jit
def forward(
    x, residual, weight, bias, y, total, x_row, residual_row, rows, d, eps,
    R: tl.constexpr, SIZE: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Add and normalise R rows; what is normalised is the sum as it is stored."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    e = tl.arange(0, SIZE)
    inside = (row < rows)[:, None] & (e < d)[None, :]
    to = row[:, None] * d + e[None, :]
    s = tl.load(residual + row[:, None] * residual_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
    s += tl.load(x + row[:, None] * x_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
    stored = s.to(total.dtype.element_ty)
    tl.store(total + to, stored, mask=inside)
    s, root = _centred(stored.to(tl.float32), inside, d, eps, LAYER)
    s *= root[:, None]
    if weight is not None:
        s *= tl.load(weight + e, mask=e < d, other=0.0)[None, :]
    if bias is not None:
        s += tl.load(bias + e, mask=e < d, other=0.0)[None, :]
    tl.store(y + to, s.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    total, weight, dy, dtotal, dx, dresidual, dweight, dbias, rows, d, eps,
    R: tl.constexpr, SIZE: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Gradients of every so-many-th block of R rows, and their sums for weight and bias.

    A row of `total` and `dy` is read twice, the second time from the nearest cache, as in `norm`.
    """
    e = tl.arange(0, SIZE)
    w = tl.load(weight + e, mask=e < d, other=0.0) if weight is not None else 1.0
    dw = tl.zeros((R, SIZE), dtype=tl.float32)
    db = tl.zeros((R, SIZE), dtype=tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = (first + tl.arange(0, R)).to(tl.int64)
        inside = (row < rows)[:, None] & (e < d)[None, :]
        at = row[:, None] * d + e[None, :]

        # What the row's numbers have in common.
        s = tl.load(total + at, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32)
        mean = tl.sum(s, axis=1) / d if LAYER else tl.zeros((R,), tl.float32)
        s, root = _centred(s, inside, d, eps, LAYER)
        g = tl.load(dy + at, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32) * w
        along = tl.sum(g * s, axis=1) * root / d
        level = tl.sum(g, axis=1) / d if LAYER else tl.zeros((R,), tl.float32)

        # Each number's own part.
        s = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        n = tl.where(inside, s - mean[:, None], 0.0) * root[:, None]
        dw += g * n
        db += g
        ds = (g * w - level[:, None] - n * along[:, None]) * root[:, None]
        ds += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + at, ds.to(dresidual.dtype.element_ty), mask=inside)
    mine = tl.program_id(0) * d + e
    if dweight is not None:
        tl.store(dweight + mine, tl.sum(dw, axis=0), mask=e < d)
    if dbias is not None:
        tl.store(dbias + mine, tl.sum(db, axis=0), mask=e < d)
