"""The selective scan in C++: the states of a vector of channels stay in registers (`native.cpp`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.ops import native
from mambakit.ops.operands import scalars

device = "cpu"
dtypes = native.DTYPES

TILE = 64
"""Tokens between the states that the forward pass keeps for the backward pass."""

_FIELDS = "45q"
_forward = native.Kernel("selective_scan_forward", _FIELDS)
_backward = native.Kernel("selective_scan_backward", _FIELDS)
_NO_GRADIENTS = (0,) * 11


def unsupported(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
) -> str | None:
    """Say why these inputs cannot be taken, or `None`."""
    return native.unsupported(x, dt, A, B, C, D, z, dt_bias, initial_state)


def infer(*inputs: Tensor | bool | None, in_place: bool = False) -> list[Tensor]:
    """Outputs `(b, l, d)` and final state `(b, d, n)`."""
    return _Call(*inputs).run(in_place=in_place)


def forward(*inputs: Tensor | bool | None) -> tuple[list[Tensor], list[Tensor]]:
    """The same, and the state before every tile."""
    call = _Call(*inputs)
    checkpoints = call.empty(call.checkpoints)
    return call.run(checkpoints), [checkpoints]


def saved_like(x: Tensor, dt: Tensor, A: Tensor, *_: object) -> list[Tensor]:
    """Room for the state before every tile `(b, tiles, n, d)`."""
    batch, length, d = x.shape
    return [x.new_empty((batch, -(-length // TILE), A.shape[1], d), dtype=torch.float32)]


def backward(saved: list[Tensor], grads: list[Tensor], *inputs: Tensor | bool | None) -> list[Tensor | None]:
    """Gradients of the tensors among the inputs, in their order."""
    return _Call(*inputs).gradients(saved[0], *grads)


class _Call:
    """The inputs of one call as the kernel takes them, held until it has run."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        self.given = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
        sequences = native.common((x, dt, z, B, C))
        floats = [scalars(t) for t in (A, D, dt_bias, initial_state)]
        self.state, starts = floats[-1], native.starts(seq_idx)
        self.held = (*sequences, *floats, starts)
        self.x = x = sequences[0]
        fields: list[int] = []
        for tensor, strides in zip(sequences, (2, 2, 2, 3, 3), strict=True):
            fields += (0,) * (strides + 1) if tensor is None else _place(tensor, strides)
        self.inputs = (*fields, *map(native.pointer, (*floats, starts)))
        (batch, length, d), n = x.shape, A.shape[1]
        self.sizes = (batch, length, d, n, B.shape[2])
        self.checkpoints = (batch, -(-length // TILE), n, d)
        self.options = (TILE, dt_softplus, x.dtype == torch.bfloat16, torch.get_num_threads())

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory, whatever PyTorch's default type and device are."""
        return self.x.new_empty(shape, dtype=dtype)

    def run(self, checkpoints: Tensor | None = None, in_place: bool = False) -> list[Tensor]:
        """Outputs in the type of the given `x`, and the final state."""
        batch, _, d, n, _ = self.sizes
        y = self.empty(self.x.shape, self.x.dtype)
        final = self.state if in_place else self.empty((batch, d, n))
        outputs = (y.data_ptr(), final.data_ptr(), native.pointer(checkpoints))
        _forward(*self.inputs, *outputs, *_NO_GRADIENTS, *self.sizes, *self.options)
        given_x, given_state = self.given[0], self.given[8]
        if in_place and final is not given_state:
            final = given_state.copy_(final)
        return [y if y.dtype is given_x.dtype else y.to(given_x.dtype), final]

    def gradients(self, checkpoints: Tensor, grad_y: Tensor, grad_final: Tensor) -> list[Tensor | None]:
        """One gradient per tensor given, in its type; none for `seq_idx`."""
        dtype = self.x.dtype
        x, dt, A, B, C, D, z, dt_bias, initial, _ = self.given
        grad_y, grad_final = grad_y.to(dtype).contiguous(), grad_final.contiguous()
        wide = [None if t is None else self.empty(t.shape, dtype) for t in (x, dt, z, B, C)]
        exact = [None if t is None else self.empty(t.shape) for t in (A, D, dt_bias, initial)]
        pointers = map(native.pointer, (checkpoints, grad_y, grad_final, *wide, *exact))
        _backward(*self.inputs, 0, 0, *pointers, *self.sizes, *self.options)
        (grad_x, grad_dt, grad_z, grad_B, grad_C), (grad_A, grad_D, grad_bias, grad_initial) = wide, exact
        found = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial, None)
        return [
            None if g is None else g.to(t.dtype)
            for t, g in zip(self.given, found, strict=True)
            if t is not None
        ]


def _place(tensor: Tensor, strides: int) -> tuple[int, ...]:
    """A tensor's address and its first strides."""
    return (tensor.data_ptr(), *tensor.stride()[:strides])
