"""The sum and its norm by their formulas: the specification."""

from __future__ import annotations

from torch import Tensor

from mambakit.ops.norm import reference


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula of `mambakit.ops.add_norm`, term by term."""
    total = residual + x
    return reference.norm(total, weight, bias, None, kind, eps, x.shape[-1], False).to(x.dtype), total
