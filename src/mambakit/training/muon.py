"""Muon: momentum, orthogonalised, for the matrices inside the network; AdamW for everything else.

The update of a matrix is its momentum `M` with all singular values brought near 1: `U V^T` where
`M = U S V^T`, found by five Newton-Schulz steps, which are matrix products only. A plain gradient step moves
a matrix along a few dominant directions; this one moves it along all of them alike, and learns more from
each token.

PyTorch has `torch.optim.Muon`, which this follows in formula and defaults. It differs in three ways: the
iteration runs in float32 where bfloat16 is slow (on most CPUs), flat matrices are iterated on their small
side, and matrices of one shape are orthogonalised together.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambakit.training.device import multiplies_bf16

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
STEPS_PER_GRAM = {torch.float32: STEPS, torch.float64: STEPS, torch.bfloat16: 3}
"""How many steps one Gram matrix serves: its rounding grows with the polynomial's degree."""


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon=True` take orthogonalised momentum steps instead.

    For a matrix `W` of shape `(m, n)` with gradient `G`, learning rate `lr` and weight decay `wd`:

        M <- 0.95 M + 0.05 G
        W <- (1 - lr wd) W - lr sqrt(max(1, m / n)) orthogonal(0.05 G + 0.95 M)

    Arguments as for `torch.optim.AdamW`; parameters of marked groups must be matrices.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            group.setdefault("muon", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore without AdamW's look at its own step counter, which marked groups do not have."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the loss again, as for any PyTorch optimiser.

        Returns:
            What the closure returned.
        """
        matrices = [p for g in self.param_groups if g["muon"] for p in g["params"] if p.grad is not None]
        for group in self.param_groups:
            if group["muon"]:
                self._orthogonal_step(group)
        # AdamW passes over parameters without a gradient.
        gradients = [p.grad for p in matrices]
        for p in matrices:
            p.grad = None
        try:
            return super().step(closure)
        finally:
            for p, gradient in zip(matrices, gradients, strict=True):
                p.grad = gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        bad = getattr(self, "found_inf", None)  # nonzero: this update must not happen, as for fused AdamW
        lr = group["lr"] if bad is None else torch.where(bad.view(()) > 0, 0.0, group["lr"])
        for shape, parameters in by_shape.items():
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = torch.stack([p.grad for p in parameters])
            if bad is not None:
                gradients = torch.where(bad.view(()) > 0, 0.0, gradients)
            momentum = torch.stack([self.state[p]["momentum"] for p in parameters])
            moved = torch.lerp(momentum, gradients, 1 - MOMENTUM)
            if bad is not None:
                moved = torch.where(bad.view(()) > 0, momentum, moved)
            update = orthogonal(torch.lerp(gradients, moved, MOMENTUM))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u, m in zip(parameters, update, moved, strict=True):
                self.state[p]["momentum"].copy_(m)
                p.mul_(1 - lr * group["weight_decay"]).sub_(u * (lr * scale))


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1 by five Newton-Schulz steps.

    `X <- a X + b (X X^T) X + c (X X^T)^2 X` acts on each singular value alone; with the published
    coefficients it takes any value in (0, 1] into about [0.7, 1.2].

    Args:
        matrices: `(k, m, n)`, any scale.

    Returns:
        `(k, m, n)` in the same type; zero matrices stay zero.

    Source:
        Jordan et al. (2024), "Newton-Schulz iteration".
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        done = 0
        while done < STEPS:
            steps = min(STEPS_PER_GRAM[x.dtype], STEPS - done)
            x = _polynomial(x @ x.mT, steps) @ x
            done += steps
    return (x.mT if tall else x).to(matrices.dtype)


def _polynomial(gram: Tensor, steps: int) -> Tensor:
    """What several steps multiply `X` by, from `X X^T` alone: polynomials in one matrix, so they commute."""
    a, b, c = NEWTON_SCHULZ
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ (factor @ gram)
    return product
