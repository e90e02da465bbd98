"""Normalisation with few passes over memory: PyTorch's fused kernels where it has them.

Layer norm is fused on every device, RMS norm on GPUs. On CPUs PyTorch composes RMS norm of element-wise
steps and keeps several full-size tensors for the backward pass; the derivative is stated here instead, in
a form that needs only the inputs. It stays differentiable.
"""

from __future__ import annotations

from typing import Any

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
    """Fused form of `mambakit.ops.norm`."""
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    weight, bias = (None if t is None else t.to(work) for t in (weight, bias))
    gate = None if z is None else F.silu(z.to(work))
    if gate is not None and not norm_before_gate:
        x = x * gate
    grouped = group_size != x.shape[-1]
    if kind == "layer" and not grouped:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        groups = x.unflatten(-1, (-1, group_size))  # (..., d / group_size, group_size)
        if kind == "layer":
            y = F.layer_norm(groups, (group_size,), None, None, eps).flatten(-2)
            y = y if weight is None else y * weight
        else:
            scale = None if weight is None else weight.unflatten(0, (-1, group_size))
            y = _rms(groups, scale, eps).flatten(-2)
        y = y if bias is None else y + bias
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(out_type)


def _rms(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS-normalise `(..., g, s)` over its last axis and scale by `(g, s)`."""
    if u.device.type == "cpu":
        differentiable = u.requires_grad or (weight is not None and weight.requires_grad)
        tracked = torch.is_grad_enabled() and differentiable
        return _RMS.apply(u, weight, eps) if tracked else _RMS.forward(u, weight, eps)
    if u.shape[-2] == 1:
        return F.rms_norm(u, u.shape[-1:], None if weight is None else weight[0], eps)
    y = F.rms_norm(u, u.shape[-1:], None, eps)
    return y if weight is None else y * weight


class _RMS(torch.autograd.Function):
    """`y = r u w` with `r = 1 / sqrt(mean(u^2) + eps)`, and its derivative from `u` and `w` alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Normalise `(..., g, s)`, scale by `(g, s)`."""
        y = u * _inverse_rms(u, eps)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, nothing else."""
        u, weight, ctx.eps = inputs
        ctx.save_for_backward(u, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`du = r (g w) - r^3 u mean(g w u)` and `dw = sum r g u`; both share the product `g u`."""
        u, weight = ctx.saved_tensors
        r = _inverse_rms(u, ctx.eps)
        product = grad * u
        grad_u = grad_weight = None
        if ctx.needs_input_grad[0]:
            scaled = grad if weight is None else grad * weight
            along = product.sum(-1) if weight is None else torch.linalg.vecdot(product, weight)
            grad_u = torch.addcmul(scaled * r, u, r.pow(3) * along.unsqueeze(-1) / -u.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (product * r).sum_to_size(weight.shape)
        return grad_u, grad_weight, None


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(u, dim=-1, keepdim=True).square() / u.shape[-1] + eps)
