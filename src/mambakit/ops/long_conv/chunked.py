"""Convolution by FFT, with the state entering and leaving; in chunks where documents are packed.

One sequence per row: the output is the causal convolution with the kernel (one FFT of the input, one of the
kernel shared by the batch, one back), plus what the initial state still says, and the final state is a
weighted sum of the input. Packed rows: an FFT would leak roundings from one document to the next, so chunks
of `q ~ sqrt(l)` tokens convolve directly, lag by lag with a mask, and hand their state to the next chunk.

Inside, activations are `(d, b, l)`: the time axis of the FFT is contiguous, and per channel the input is a
matrix ready for products with the system's rows and columns. See MATH.md, sections 3, 4 and 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.long_conv import discretisation, reference
from mambakit.ops.long_conv.systems import (
    Dense,
    Diagonal,
    System,
    complex_vector,
    dense_transition,
    parameter_dtype,
    real_vector,
)
from mambakit.ops.shapes import same_document


def fft_conv(u: Tensor, k: Tensor, D: Tensor | None = None) -> Tensor:
    """FFT form of `mambakit.ops.fft_conv`."""
    x = _channels_first(u)
    return _channels_last(convolve(x, k.to(x.dtype)), x, D, u.dtype)


def s4d_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """Vandermonde-kernel form of `mambakit.ops.s4d_conv`."""
    if u.shape[1] == 1:
        return reference.s4d_conv(u, dt, A, B, C, D, initial_state, seq_idx, discretization)
    dt, A, B, C = wide(u, dt, A, B, C)
    Abar, Bbar = discretisation.diagonal(dt, A, B, discretization)
    system = Diagonal(Abar, Bbar, C, u.shape[1])
    return run(u, system, D, initial_state, seq_idx)


def s4_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense-powers form of `mambakit.ops.s4_conv`."""
    if u.shape[1] == 1:
        return reference.s4_conv(u, dt, A, P, B, C, D, initial_state, seq_idx)
    dt, A, P, B, C = wide(u, dt, A, P, B, C)
    *transition, Bbar = discretisation.low_rank(dt, A, P, B)
    system = Dense(dense_transition(*transition), Bbar, C, u.shape[1])
    return run(u, system, D, initial_state, seq_idx)


def run(
    u: Tensor, system: System, D: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Feed a sequence through a discrete system.

    Args:
        u: Inputs `(b, l, d)`.
        system: The discrete system of `d` channels, made for this length.
        D: Skip weights `(d,)`.
        initial_state: State before the first token `(b, d, n)`, complex.
        seq_idx: Document number of each token `(b, l)`.

    Returns:
        Outputs `(b, l, d)` in the type of `u`, and the final state `(b, d, n)`, complex.
    """
    x = _channels_first(u)
    if seq_idx is None:
        y = convolve(x, system.kernel(x.shape[2]).to(x.dtype))
        final = _final(x, system)
        first = None
    else:
        segment = (~same_document(seq_idx)).cumsum(1)  # (b, l), counts up even where seq_idx repeats
        y, final = _packed(x, system, segment)
        first = segment == 0  # the document that the initial state belongs to
    if initial_state is not None:
        h = real_vector(initial_state).to(x.dtype).transpose(0, 1)  # (d, b, 2n)
        y = y + _only(first, _remembered(h, system)[..., : x.shape[2]])
        final = final + _only(None if first is None else first[:, -1:], system.skip(x.shape[2], h))
    return _channels_last(y, x, D, u.dtype), complex_vector(final.transpose(0, 1).contiguous())


def convolve(x: Tensor, k: Tensor) -> Tensor:
    """Causal convolution of `(d, b, l)` with kernels `(d, w)`, by FFT with room for the tail."""
    length = x.shape[2]
    n = fast_length(length + min(k.shape[1], length) - 1)
    spectrum = _RealFFT.apply(x, n) * _RealFFT.apply(k[:, :length], n)[:, None]
    return torch.fft.irfft(spectrum, n=n)[..., :length]


class _RealFFT(torch.autograd.Function):
    """`torch.fft.rfft(x, n)` whose derivative is an inverse real FFT.

    PyTorch differentiates it by a complex FFT of the full length, which costs several times the forward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:
        return torch.fft.rfft(x, n=n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, n = inputs
        ctx.sizes = n, x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # x_t reaches the half spectrum as exp(-i w_k t): the adjoint is Re sum_k grad_k exp(i w_k t) over the
        # half spectrum, and irfft counts every frequency but the first and last twice.
        n, length = ctx.sizes
        weight = grad.new_full((grad.shape[-1],), n / 2, dtype=grad.real.dtype)
        weight[0].fill_(n)
        if n % 2 == 0:
            weight[-1].fill_(n)
        return torch.fft.irfft(grad * weight, n=n)[..., :length], None


def fast_length(at_least: int) -> int:
    """The smallest transform length at or above that is a power of two times a small odd smooth number."""
    return min(m << (-(-at_least // m) - 1).bit_length() for m in (1, 3, 5, 7, 9, 15, 25, 49))


def _final(x: Tensor, system: System) -> Tensor:
    """`sum_s Abar^{l-1-s} Bbar u_s` as `(d, b, 2n)`: a product with every chunk, then over the chunks."""
    d, batch, length = x.shape
    # Chunk states cost b l / q, their weights q: longer chunks than the kernel's pay for a batch.
    balanced = min(round(math.log2(batch * length) / 2), math.ceil(math.log2(length)))
    log_q = max(balanced, system.log_q)
    columns = system.widen(system.columns, log_q)
    c = -(-length // 2**log_q)
    chunks = F.pad(x, (c * 2**log_q - length, 0)).view(d, batch * c, -1)
    return system.total(log_q, (chunks @ columns.to(x.dtype)).view(d, batch, c, -1))


def _remembered(h: Tensor, system: System) -> Tensor:
    """`C Abar^{t+1} h` for all tokens of all chunks: states `(d, b, 2n)` to outputs `(d, b, c q)`."""
    y = system.entries(h).flatten(1, 2) @ system.readout().to(h.dtype).mT
    return y.view(h.shape[0], h.shape[1], -1)


def _packed(x: Tensor, system: System, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `(d, b, l)` and final state `(d, b, 2n)` from empty states, segments `(b, l)` kept apart."""
    d, batch, length = x.shape
    c, q = system.chunks, system.q
    padding = c * q - length
    x = F.pad(x, (padding, 0)).view(d, batch, c, q)
    segment = F.pad(segment, (padding, 0), value=-1).view(batch, c, q)
    y = _within(x, system.kernel(q).to(x.dtype), segment)

    last = segment[..., -1:]
    before = last.roll(1, dims=1)  # the segment that enters each chunk; the first is entered by nothing
    left = _only(segment == last, x).view(d, batch * c, q) @ system.columns.to(x.dtype)
    left = left.view(d, batch, c, -1).unbind(2)
    passes = (last == before).unbind(1)
    h = torch.zeros_like(left[0])
    entering = []
    for m in range(c):
        entering.append(h)
        h = _only(passes[m], system.advance(system.log_q, h)) + left[m]
    carried = torch.stack(entering, dim=2).flatten(1, 2) @ system.readout().to(x.dtype).mT
    y = y + _only(segment == before, carried.view(d, batch, c, q))
    return y.flatten(2)[..., padding:], h


def _within(x: Tensor, kernel: Tensor, segment: Tensor) -> Tensor:
    """Causal convolution inside chunks `(d, b, c, q)`, between tokens of one segment only.

    The mask comes after the product, so that autograd keeps views of one padded input instead of `q` masked
    copies.
    """
    q = x.shape[3]
    x = F.pad(x, (q - 1, 0))
    source = F.pad(segment, (q - 1, 0), value=-2)
    y = torch.zeros_like(x[..., q - 1 :])
    for lag in range(q):
        past = slice(q - 1 - lag, 2 * q - 1 - lag)
        y = y + _only(source[..., past] == segment, kernel[:, lag, None, None, None] * x[..., past])
    return y


def _only(keep: Tensor | None, x: Tensor) -> Tensor:
    """Zero what is not kept, exactly and whatever its value."""
    return x if keep is None else torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def wide(u: Tensor, dt: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Bring the parameters to the type in which powers are taken."""
    dtype = parameter_dtype(u)
    return dt.to(dtype), *(v.to(torch.promote_types(dtype, torch.complex64)) for v in vectors)


def _channels_first(u: Tensor) -> Tensor:
    """`(b, l, d)` to contiguous `(d, b, l)` in the type of the computation."""
    return u.permute(2, 0, 1).to(torch.promote_types(u.dtype, torch.float32)).contiguous()


def _channels_last(y: Tensor, x: Tensor, D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add the skip and return to `(b, l, d)` in the type of the activations."""
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype)[:, None, None], x)
    return y.permute(1, 2, 0).to(dtype)
