"""The causal convolution in C++: one pass over the input, forward and backward (`native.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import native
from mambakit.ops.operands import rows, scalars

device = "cpu"
dtypes = native.DTYPES

MOST_TAPS = 32

_FIELDS = "22q"
_forward = native.Kernel("causal_conv1d_forward", _FIELDS)
_backward = native.Kernel("causal_conv1d_backward", _FIELDS)
_NO_GRADIENTS = (0,) * 6


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> str | None:
    """Say why these inputs cannot be taken, or `None`."""
    if weight.shape[1] > MOST_TAPS:
        return f"it takes up to {MOST_TAPS} taps, not {weight.shape[1]}"
    return native.unsupported(x, weight, bias, initial_state)


def infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    in_place: bool = False,
) -> list[Tensor]:
    """Outputs `(b, l, d)` and final state `(b, w - 1, d)`."""
    (batch, length, d), w = x.shape, weight.shape[1]
    x = rows(x, x.dtype)
    weight, bias, start = scalars(weight), scalars(bias), scalars(initial_state)
    starts = native.starts(seq_idx)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = start if in_place else torch.empty((batch, w - 1, d))
    _forward(
        *_inputs(x, weight, bias, start, starts),
        y.data_ptr(),
        final.data_ptr(),
        *_NO_GRADIENTS,
        *(batch, length, d, w, activation == "silu", x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    if in_place and final is not initial_state:
        final = initial_state.copy_(final)
    return [y, final]


def forward(*inputs: Tensor | str | None) -> tuple[list[Tensor], list[Tensor]]:
    """The same, with nothing saved: the backward pass recomputes from the inputs."""
    return infer(*inputs), []


def saved_like(*inputs: Tensor | str | None) -> list[Tensor]:
    """Nothing is saved."""
    return []


def backward(
    saved: list[Tensor],
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> list[Tensor | None]:
    """Gradients of `x`, `weight`, and where given `bias` and the initial state."""
    (batch, length, d), w = x.shape, weight.shape[1]
    tensors = (weight, bias, initial_state)
    x, weight_, bias_, start = rows(x, x.dtype), *map(scalars, tensors)
    starts = native.starts(seq_idx)
    grad_y, grad_final = (g.contiguous() for g in grads)
    grad_x = torch.empty((batch, length, d), dtype=x.dtype)
    others = [None if t is None else torch.empty(t.shape) for t in tensors]
    _backward(
        *_inputs(x, weight_, bias_, start, starts),
        *(0, 0),
        *map(native.pointer, (grad_y, grad_final, grad_x, *others)),
        *(batch, length, d, w, activation == "silu", x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    found = [g.to(t.dtype) for t, g in zip(tensors, others, strict=True) if t is not None]
    return [grad_x, *found, *([] if seq_idx is None else [None])]


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor | None, starts: Tensor | None
) -> tuple[int, ...]:
    """The fields of `Args` that both passes read."""
    batch, token, _ = x.stride()
    addresses = map(native.pointer, (weight, bias, start, starts))
    return (x.data_ptr(), batch, token, *addresses)
