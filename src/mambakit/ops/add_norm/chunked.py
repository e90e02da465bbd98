"""The sum by PyTorch, and its norm with few passes over memory (`mambakit.ops.norm.chunked`)."""

from __future__ import annotations

from torch import Tensor

from mambakit.ops.norm import chunked


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Fused form of `mambakit.ops.add_norm`."""
    total = residual + x
    return chunked.norm(total, weight, bias, None, kind, eps, x.shape[-1], False).to(x.dtype), total
