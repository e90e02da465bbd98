"""State space duality in C++: the recurrence with a scaled state, as products of small matrices.

`native.cpp` holds the forward pass and the one-token update, `native_backward.cpp` the backward pass, and
`tile.h` what they share. The forward pass keeps the state after every 256 tokens, from which the backward
pass recomputes the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import native
from mambakit.ops.operands import scalars

device = "cpu"
dtypes = native.DTYPES

SEGMENT = 256
"""Tokens from one kept state to the next, as in `tile.h`."""

_FIELDS = "44q2d"
_forward = native.Kernel("ssd_forward", _FIELDS)
_backward = native.Kernel("ssd_backward", _FIELDS)
_NO_GRADIENTS = (0,) * 10


def unsupported(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *_: Tensor | bool | float | None,
) -> str | None:
    """Say why these inputs cannot be taken, or `None`."""
    return native.unsupported(x, dt, A, B, C, D, dt_bias, initial_state)


def infer(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    in_place: bool = False,
) -> list[Tensor]:
    """Outputs `(b, l, h, p)` and final state `(b, h, p, n)`."""
    inputs = _Inputs(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    final = inputs.initial if in_place else None
    y, final = _run(inputs, None, final, dt_softplus, dt_min, dt_max)
    if in_place and final is not initial_state:
        final = initial_state.copy_(final)
    return [y.to(x.dtype), final]


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same, and the state after every segment of 256 tokens but the last `(b, segments - 1, h, p, n)`."""
    inputs = _Inputs(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    saved = saved_like(x, dt, A, B)
    y, final = _run(inputs, saved[0], None, dt_softplus, dt_min, dt_max)
    return [y.to(x.dtype), final], saved


def saved_like(
    x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, *_: Tensor | bool | float | None
) -> list[Tensor]:
    """Room for the states that the backward pass starts from."""
    batch, length, heads, p = x.shape
    return [x.new_empty((batch, (length - 1) // SEGMENT, heads, p, B.shape[-1]), dtype=torch.float32)]


def backward(
    saved: list[Tensor],
    grads: list[Tensor],
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> list[Tensor | None]:
    """Gradients of every floating-point input that is given."""
    inputs = _Inputs(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    dtype = inputs.x.dtype
    grad_y, grad_final = grads[0].to(dtype).contiguous(), grads[1].contiguous()
    sequences = [inputs.x.new_empty(t.shape) for t in (x, dt, B, C)]
    others = [
        None if t is None else x.new_empty(t.shape, dtype=torch.float32)
        for t in (A, D, dt_bias, initial_state)
    ]
    grad_x, grad_dt, grad_B, grad_C = sequences
    grad_A, grad_D, grad_bias, grad_initial = others
    _backward(
        *inputs.fields,
        *(0, 0, saved[0].data_ptr()),
        *(grad_y.data_ptr(), grad_final.data_ptr(), grad_x.data_ptr(), grad_dt.data_ptr()),
        *map(native.pointer, (grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial)),
        *inputs.sizes,
        *(dt_softplus, dtype == torch.bfloat16, torch.get_num_threads(), dt_min, dt_max),
    )
    found = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial)
    given = (x, dt, A, B, C, D, dt_bias, initial_state)
    ready = [g.to(t.dtype) for t, g in zip(given, found, strict=True) if t is not None]
    return ready if seq_idx is None else [*ready, None]


class _Inputs:
    """The inputs as the library reads them, and their fields of `Args`.

    Attributes:
        x: Inputs in the common type of all sequences.
        initial: The initial state in float32, contiguous, or `None`.
        fields: Addresses and strides.
        sizes: `b, l, h, p, g, n`, and whether `D` has a row per head.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor | None,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> None:
        sequences = self.x, _, B, _ = native.common((x, dt, B, C))
        A, D, dt_bias, self.initial = map(scalars, (A, D, dt_bias, initial_state))
        starts = native.starts(seq_idx)
        self._kept = (sequences, A, D, dt_bias, starts)  # the library knows addresses only
        fields: list[int] = []
        for tensor in sequences:
            fields += (tensor.data_ptr(), *tensor.stride()[:3])
        self.fields = (*fields, *map(native.pointer, (A, D, dt_bias, self.initial, starts)))
        self.sizes = (*x.shape, *B.shape[2:], D is not None and D.dim() == 2)


def _run(
    inputs: _Inputs,
    checkpoints: Tensor | None,
    final: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    x, (batch, _, heads, p, _, n, _) = inputs.x, inputs.sizes
    y = x.new_empty(x.shape)
    if final is None:
        final = x.new_empty((batch, heads, p, n), dtype=torch.float32)
    _forward(
        *inputs.fields,
        *(y.data_ptr(), final.data_ptr(), native.pointer(checkpoints)),
        *_NO_GRADIENTS,
        *inputs.sizes,
        *(dt_softplus, x.dtype == torch.bfloat16, torch.get_num_threads(), dt_min, dt_max),
    )
    return y, final
