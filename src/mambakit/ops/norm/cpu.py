"""The norms in C++: every token's channels stay in the nearest cache, the gate included (`native.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import native
from mambakit.ops.operands import scalars

device = "cpu"
dtypes = native.DTYPES

_FIELDS = "19qd"
_forward = native.Kernel("norm_forward", _FIELDS)
_backward = native.Kernel("norm_backward", _FIELDS)


def unsupported(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, *options: object
) -> str | None:
    """Say why these inputs cannot be taken, or `None`."""
    return native.unsupported(x, weight, bias, z)


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> list[Tensor]:
    """Outputs `(..., d)`."""
    out_type = x.dtype
    held = _held(x, weight, bias, z)
    y = torch.empty_like(held[0], memory_format=torch.contiguous_format)
    fields = _options(held[0], kind, eps, group_size, norm_before_gate)
    _forward(*_inputs(*held), y.data_ptr(), *(0, 0, 0, 0, 0), *fields)
    return [y.to(out_type)]


def forward(*inputs: Tensor | str | float | None) -> tuple[list[Tensor], list[Tensor]]:
    """The same, with nothing saved: the backward pass recomputes from the inputs."""
    return infer(*inputs), []


def saved_like(*inputs: Tensor | str | float | None) -> list[Tensor]:
    """Nothing is saved."""
    return []


def backward(
    saved: list[Tensor],
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    *options: object,
) -> list[Tensor]:
    """Gradients of `x`, and where given of `weight`, `bias` and `z`."""
    held = _held(x, weight, bias, z)
    grad_y = grads[0].to(held[0].dtype).contiguous()
    grad_x, grad_z = (None if t is None else torch.empty(t.shape, dtype=held[0].dtype) for t in (x, z))
    grad_weight, grad_bias = (None if t is None else torch.empty(t.shape) for t in (weight, bias))
    gradients = (grad_x, grad_z, grad_weight, grad_bias)
    fields = _options(held[0], *options)
    _backward(*_inputs(*held), 0, grad_y.data_ptr(), *map(native.pointer, gradients), *fields)
    pairs = ((x, grad_x), (weight, grad_weight), (bias, grad_bias), (z, grad_z))
    return [g.to(t.dtype) for t, g in pairs if t is not None]


_Held = tuple[Tensor, int, Tensor | None, int, Tensor | None, Tensor | None]


def _held(x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None) -> _Held:
    """The inputs as the kernel takes them. Some are copies: they must live as long as it runs."""
    if z is not None and z.dtype != x.dtype:
        x, z = x.to(torch.float32), z.to(torch.float32)
    z, z_row = (None, 0) if z is None else native.even_rows(z)
    return (*native.even_rows(x), z, z_row, scalars(weight), scalars(bias))


def _inputs(
    x: Tensor, x_row: int, z: Tensor | None, z_row: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """The first fields of `Args`."""
    return (x.data_ptr(), x_row, native.pointer(z), z_row, native.pointer(weight), native.pointer(bias))


def _options(x: Tensor, kind: str, eps: float, group_size: int, norm_before_gate: bool) -> tuple[float, ...]:
    """The last fields of `Args`."""
    d = x.shape[-1]
    sizes = (x.numel() // max(d, 1), d, group_size)
    flags = (kind == "layer", norm_before_gate, x.dtype == torch.bfloat16)
    return (*sizes, *flags, torch.get_num_threads(), eps)
