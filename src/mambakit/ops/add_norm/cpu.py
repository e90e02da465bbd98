"""The sum by PyTorch, and its norm in C++ (`mambakit.ops.norm.cpu`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.ops import native
from mambakit.ops.norm import cpu as norm

device = "cpu"
dtypes = native.DTYPES
spent = ("x", "residual")
kept_outputs = (1,)


def unsupported(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object
) -> str | None:
    """Say why these inputs cannot be taken, or `None`."""
    return native.unsupported(x, residual, weight, bias)


def infer(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> list[Tensor]:
    """The normalised sum and the sum."""
    total = residual + x
    (y,) = norm.infer(total, weight, bias, None, kind, eps, x.shape[-1], False)
    return [y.to(x.dtype), total]


def forward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The same; the backward pass needs the sum, which is an output."""
    return infer(*inputs), []


def saved_like(*inputs: Any) -> list[Tensor]:
    """Nothing besides the sum."""
    return []


def backward(
    saved: list[Tensor],
    grads: list[Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of `x` and `residual`, which are one, and where given of `weight` and `bias`."""
    (total,) = saved
    dtotal, *rest = norm.backward(
        [], [grads[0].to(total.dtype)], total, weight, bias, None, kind, eps, x.shape[-1], False
    )
    dtotal = dtotal.add_(grads[1])
    return [dtotal.to(x.dtype), dtotal.to(residual.dtype), *rest]


def rebuilt(saved: list[Tensor], x: Tensor, residual: Tensor, *rest: Any) -> list[Any]:
    """Inputs with the same sum and the same derivatives."""
    return [torch.zeros(x.shape, dtype=x.dtype, requires_grad=True), saved[0], *rest]
