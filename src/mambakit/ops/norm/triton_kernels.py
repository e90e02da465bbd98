"""Triton kernels of the norms: each tensor is read once and written once, in either direction.

A program normalises R rows of one group of channels at a time, a row of `size` channels padded to SIZE. In
the backward pass it walks over many rows and keeps the sums for weight and bias in registers; `u` is what is
normalised: the input, or the gated input.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _normalised(u, inside, size, eps, LAYER: tl.constexpr):
    """`(u - mean) / root` and `1 / root` of rows (R, SIZE)."""
    if LAYER:
        u = tl.where(inside, u - tl.sum(u, axis=1)[:, None] / size, 0.0)
    root = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / size + eps)
    return u * root[:, None], root


@triton.jit
def forward(
    x, weight, bias, z, y, x_row, z_row, rows, d, size, eps,
    R: tl.constexpr, SIZE: tl.constexpr, LAYER: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Normalise R rows of one group."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    e = tl.arange(0, SIZE)
    channel = tl.program_id(1) * size + e
    inside = (row < rows)[:, None] & (e < size)[None, :]
    u = tl.load(x + row[:, None] * x_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row[:, None] * z_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        gate *= _sigmoid(gate)
        if not GATE_LAST:
            u *= gate
    out, _ = _normalised(u, inside, size, eps, LAYER)
    if weight is not None:
        out *= tl.load(weight + channel, mask=e < size, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + channel, mask=e < size, other=0.0)[None, :]
    if z is not None:
        if GATE_LAST:
            out *= gate
    tl.store(y + row[:, None] * d + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, z, at_x, at_z, inside, GATE_LAST: tl.constexpr):
    """What is normalised (R, SIZE)."""
    u = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        if not GATE_LAST:
            gate = tl.load(z + at_z, mask=inside, other=0.0).to(tl.float32)
            u *= gate * _sigmoid(gate)
    return u


@triton.jit
def backward(
    x, weight, bias, z, dy, dx, dz, dweight, dbias, x_row, z_row, dy_row, rows, d, size, eps,
    R: tl.constexpr, SIZE: tl.constexpr, LAYER: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of every so-many-th block of R rows of one group, and their sums for weight and bias.

    A row is read twice, the second time from the nearest cache: its numbers kept in registers meanwhile would
    leave room for half as many programs, and memory would be waited for.
    """
    e = tl.arange(0, SIZE)
    channel = tl.program_id(1) * size + e
    w = tl.load(weight + channel, mask=e < size, other=0.0) if weight is not None else 1.0
    dw = tl.zeros((R, SIZE), dtype=tl.float32)
    db = tl.zeros((R, SIZE), dtype=tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = (first + tl.arange(0, R)).to(tl.int64)
        inside = (row < rows)[:, None] & (e < size)[None, :]
        at_x = row[:, None] * x_row + channel[None, :]
        at_z = row[:, None] * z_row + channel[None, :]
        at_dy = row[:, None] * dy_row + channel[None, :]

        # What the row's numbers have in common.
        u = _gated(x, z, at_x, at_z, inside, GATE_LAST)
        mean = tl.sum(u, axis=1) / size if LAYER else tl.zeros((R,), tl.float32)
        u = tl.where(inside, u - mean[:, None], 0.0)
        root = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / size + eps)
        g = tl.load(dy + at_dy, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32)
        if z is not None:
            if GATE_LAST:
                gate = tl.load(z + at_z, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32)
                g *= gate * _sigmoid(gate)
        g *= w
        along = tl.sum(g * u, axis=1) * root / size
        level = tl.sum(g, axis=1) / size if LAYER else tl.zeros((R,), tl.float32)

        # Each number's own part.
        x_here = tl.load(x + at_x, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32)
        g = tl.load(dy + at_dy, mask=inside, other=0.0).to(tl.float32)
        u = x_here
        if z is not None:
            z_here = tl.load(z + at_z, mask=inside, other=0.0, cache_modifier=".ca").to(tl.float32)
            s = _sigmoid(z_here)
            if not GATE_LAST:
                u = x_here * z_here * s
        n = tl.where(inside, u - mean[:, None], 0.0) * root[:, None]
        to = row[:, None] * d + channel[None, :]
        if z is not None:
            if GATE_LAST:
                gated = n * w
                if bias is not None:
                    gated += tl.load(bias + channel, mask=e < size, other=0.0)[None, :]
                dgate = g * gated * s * (1.0 + z_here * (1.0 - s))
                tl.store(dz + to, dgate.to(dz.dtype.element_ty), mask=inside)
                g *= z_here * s
        dw += g * n
        db += g
        du = (g * w - level[:, None] - n * along[:, None]) * root[:, None]
        if z is not None:
            if not GATE_LAST:
                dgate = du * x_here * s * (1.0 + z_here * (1.0 - s))
                tl.store(dz + to, dgate.to(dz.dtype.element_ty), mask=inside)
                du *= z_here * s
        tl.store(dx + to, du.to(dx.dtype.element_ty), mask=inside)
    mine = tl.program_id(0) * d + channel
    if dweight is not None:
        tl.store(dweight + mine, tl.sum(dw, axis=0), mask=e < size)
    if dbias is not None:
        tl.store(dbias + mine, tl.sum(db, axis=0), mask=e < size)
