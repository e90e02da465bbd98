"""A residual stream's sum and its norm in one step: what stands between two branches of a model.

Differs from `norm` in that the sum is a result too: the stream, which keeps its own (wider) type, while the
normalised copy for the next branch has the branch's. Done one after the other, the stream would be written,
read, and read once more, and the copy written wide and narrowed again. It has no recurrent state. See MATH.md
beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.config import unknown
from mambakit.ops.add_norm import chunked, cpu, reference, triton
from mambakit.ops.dispatch import Op
from mambakit.ops.norm import KINDS


def _fake(x: Tensor, residual: Tensor, *_: object) -> list[Tensor]:
    like = {"memory_format": torch.contiguous_format}
    total = torch.empty_like(residual, dtype=torch.promote_types(x.dtype, residual.dtype), **like)
    return [torch.empty_like(x, **like), total]


_op = Op(
    "add_norm",
    {"cpu": cpu, "triton": triton, "chunked": chunked, "reference": reference},
    outputs=2,
    fake=_fake,
    flops=lambda x, *_: 5 * x.numel(),
)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum for the next branch.

    With `s = residual + x`:

        rms:    y = s / sqrt(mean(s^2) + eps) * weight + bias
        layer:  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    Args:
        x: What a branch adds `(..., d)`.
        residual: The stream `(..., d)`, of the same shape, in any type.
        weight: Scale `(d,)`; 1 by default.
        bias: Shift `(d,)`; 0 by default.
        kind: `"rms"` (no centring) or `"layer"`.
        eps: Added to the mean square or variance, in the unit of the stream squared.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        The normalised sum `(..., d)`, rounded once to the type of `x`, and the sum in the wider of both.

    Raises:
        ValueError: Shapes that do not fit, an unknown kind, or a backend that cannot take the inputs.

    Source:
        Xiong et al., "On layer normalization in the transformer architecture" (2002.04745), figure 1b (the
        pre-norm block); the norms: see `norm`.
    """
    if x.dim() == 0:
        raise ValueError("add_norm: x has shape (), expected (..., d)")
    for name, tensor, expected in (
        ("residual", residual, x.shape),
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"add_norm: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    if kind not in KINDS:
        raise ValueError(f"add_norm: {unknown('kind', kind, KINDS)}")
    return _op(x, residual, weight, bias, kind, eps, backend=backend)
