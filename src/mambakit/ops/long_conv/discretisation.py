"""From continuous time to steps: zero-order hold and the bilinear transform, for both state matrices.

A state space model `h'(t) = A h(t) + B u(t)`, sampled with step `dt`, is `h_t = Abar h_{t-1} + Bbar u_t`.
Every backend starts from the functions here, so they cannot disagree about the model; the tests hold them
against dense matrix exponentials and inverses. All tensors are complex `(d, n)`, `dt` is real `(d,)`, and
each of the `n` modes stands for itself and its complex conjugate. See MATH.md, sections 2 and 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def diagonal(dt: Tensor, A: Tensor, B: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Discretise a diagonal system.

    Args:
        dt: Step sizes `(d,)`, in the time unit of `1 / A`.
        A: Diagonal state matrices `(d, n)`, complex.
        B: Input vectors `(d, n)`, complex.
        discretization: `"zoh"` (exact for inputs held constant over a step) or `"bilinear"` (trapezoid rule).

    Returns:
        `Abar` and `Bbar`, each `(d, n)`.
    """
    z = dt[:, None] * A
    if discretization == "zoh":
        return torch.exp(z), B * _held(dt[:, None], A)
    return (2 + z) / (2 - z), 2 * dt[:, None] * B / (2 - z)


def _held(dt: Tensor, A: Tensor) -> Tensor:
    """`int_0^dt exp(A s) ds = (exp(dt A) - 1) / A`, by its Taylor series where the fraction cancels."""
    z = dt * A
    near = z.abs() < (0.003 if z.dtype == torch.complex128 else 0.1)
    # Each branch sees only arguments it can take: an unused infinity would still poison the gradient.
    z_near = torch.where(near, z, torch.zeros_like(z))
    A_far = torch.where(near, torch.ones_like(A), A)
    series = torch.ones_like(z)
    for k in range(5, 1, -1):
        series = 1 + z_near / k * series
    return torch.where(near, dt * series, (torch.exp(z) - 1) / A_far)


class DiagonalPlusRankOne(NamedTuple):
    """The step `h -> decay * h + feedback * 2 Re<probe, h> + Bbar * u` of a discretised S4 system.

    Attributes:
        decay: The diagonal part of `Abar`, `(d, n)`.
        feedback: What the scalar read from the state is fed back through, `(d, n)`.
        probe: What reads that scalar, `(d, n)` (used without conjugation).
        Bbar: Input vectors `(d, n)`.
    """

    decay: Tensor
    feedback: Tensor
    probe: Tensor
    Bbar: Tensor


def low_rank(dt: Tensor, A: Tensor, P: Tensor, B: Tensor) -> DiagonalPlusRankOne:
    """Discretise `diag(A) - P P^*` by the bilinear transform, inverting with Woodbury's identity.

    The low-rank term couples a mode with its conjugate: over the pairs `P^* h` is `2 Re(conj(P) h)`, a real
    number, so the discrete system is a diagonal one with a scalar feedback.

    Args:
        dt: Step sizes `(d,)`, in the time unit of `1 / A`.
        A: Diagonal part `(d, n)`, complex.
        P: Low-rank factor `(d, n)`, complex.
        B: Input vectors `(d, n)`, complex.

    Returns:
        The discrete system.
    """
    dt = dt[:, None]
    resolvent = 2 / (2 - dt * A)
    probe = P.conj() * resolvent
    loop = (2 * (probe * P).real).sum(-1, keepdim=True)
    gain = dt / (1 + dt / 2 * loop)
    feedback = -gain * resolvent * P
    read = (2 * (probe * B).real).sum(-1, keepdim=True)
    Bbar = dt * (resolvent * B + feedback * read / 2)
    return DiagonalPlusRankOne((2 + dt * A) / (2 - dt * A), feedback, probe, Bbar)
