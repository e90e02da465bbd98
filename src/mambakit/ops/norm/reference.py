"""Normalisation by its formula: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """The formula of `mambakit.ops.norm`, term by term."""
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    u = x.to(work)
    gate = None if z is None else F.silu(z.to(work))
    if gate is not None and not norm_before_gate:
        u = u * gate
    u = u.unflatten(-1, (-1, group_size))  # (..., d / group_size, group_size)
    if kind == "layer":
        u = u - u.mean(-1, keepdim=True)
    y = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
    y = y.flatten(-2)
    y = y if weight is None else y * weight.to(work)
    y = y if bias is None else y + bias.to(work)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(out_type)
