"""Checks of module 1."""

from __future__ import annotations

import torch

from coursekit.exercises import Exercise, close

# ---------------------------------------------------------------------------------------------------------
# Discretisation

zoh = Exercise("m1-zoh", "zoh", "Zero-order hold of a diagonal system", stars=2, minutes=15)


def _modes(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps `(d,)`, stable diagonals `(d, n)` and inputs `(d, n)` in double precision."""
    d, n = 3, 5
    dt = torch.rand(d, generator=rng, dtype=torch.float64) + 0.05
    real, imaginary = torch.rand(2, d, n, generator=rng, dtype=torch.float64)
    A = torch.complex(-2 * real - 0.1, 6 * imaginary)
    B = torch.randn(d, n, generator=rng, dtype=torch.complex128)
    return dt, A, B


def _exact(dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One mode by the exponential of `[[a, b], [0, 0]]`: independent of any formula for the integral."""
    joint = torch.zeros(2, 2, dtype=torch.complex128)
    joint[0, 0], joint[0, 1] = a, b
    power = torch.linalg.matrix_exp(joint * dt)
    return power[0, 0], power[0, 1]


@zoh.part("agrees with the matrix exponential of the joint system", points=2)
def _(zoh, rng):
    dt, A, B = _modes(rng)
    Abar, Bbar = zoh(dt, A, B)
    expected = [[_exact(dt[i], A[i, j], B[i, j]) for j in range(A.shape[1])] for i in range(A.shape[0])]
    close(Abar, torch.stack([torch.stack([a for a, _ in row]) for row in expected]), "Abar", 1e-10)
    close(Bbar, torch.stack([torch.stack([b for _, b in row]) for row in expected]), "Bbar", 1e-10)


@zoh.part("two half steps are one step")
def _(zoh, rng):
    dt, A, B = _modes(rng)
    Abar, Bbar = zoh(dt, A, B)
    half_A, half_B = zoh(dt / 2, A, B)
    close(half_A * half_A, Abar, "Abar of two half steps", 1e-10)
    close(half_A * half_B + half_B, Bbar, "Bbar of two half steps", 1e-10)


@zoh.part("a mode with A = 0 integrates its input: Bbar = dt B")
def _(zoh, rng):
    dt, A, B = _modes(rng)
    A = A.clone()
    A[:, 0] = 0
    Abar, Bbar = zoh(dt, A, B)
    close(Abar[:, 0], torch.ones_like(B[:, 0]), "Abar at A = 0", 1e-12)
    close(Bbar[:, 0], dt * B[:, 0], "Bbar at A = 0", 1e-12)


zoh.wrong(
    "Euler's rule for B",
    """
import torch
def zoh(dt, A, B):
    return torch.exp(dt[:, None] * A), dt[:, None] * B
""",
)
zoh.wrong(
    "Euler's rule for A",
    """
import torch
def zoh(dt, A, B):
    dt = dt[:, None]
    A = torch.where(A == 0, 1e-9, A)
    return 1 + dt * A, B * (torch.exp(dt * A) - 1) / A
""",
)
zoh.wrong(
    "no limit at A = 0",
    """
import torch
def zoh(dt, A, B):
    dt = dt[:, None]
    return torch.exp(dt * A), B * (torch.exp(dt * A) - 1) / A
""",
)
zoh.wrong(
    "the bilinear rule",
    """
import torch
def zoh(dt, A, B):
    z = dt[:, None] * A
    return (2 + z) / (2 - z), 2 * dt[:, None] * B / (2 - z)
""",
)

bilinear = Exercise(
    "m1-bilinear", "bilinear", "The bilinear rule for a full matrix", stars=2, minutes=20, graded=True
)


def _dense(rng: torch.Generator) -> tuple[float, torch.Tensor, torch.Tensor]:
    n = 4
    A = torch.randn(n, n, generator=rng, dtype=torch.float64) - 2 * torch.eye(n, dtype=torch.float64)
    B = torch.randn(n, generator=rng, dtype=torch.float64)
    return 0.05 + 0.5 * torch.rand(1, generator=rng).item(), A, B


@bilinear.part("the step solves the trapezoid equation", points=3)
def _(bilinear, rng):
    dt, A, B = _dense(rng)
    Abar, Bbar = bilinear(dt, A, B)
    h = torch.randn(len(B), generator=rng, dtype=torch.float64)
    u = torch.randn(1, generator=rng, dtype=torch.float64)
    after = Abar @ h + Bbar * u
    close(after - h, dt * (A @ (h + after) / 2 + B * u), "h_t - h_{t-1}", 1e-10)


@bilinear.part("a rotation stays a rotation: for skew-symmetric A no length changes", points=1)
def _(bilinear, rng):
    dt, A, B = _dense(rng)
    Abar, _ = bilinear(dt, A - A.T, B)
    close(Abar.T @ Abar, torch.eye(len(B), dtype=torch.float64), "Abar^T Abar", 1e-10)


@bilinear.part("the error falls with the square of the step", points=1)
def _(bilinear, rng):
    _, A, B = _dense(rng)

    def error(dt: float) -> float:
        Abar, _ = bilinear(dt, A, B)
        return (
            (torch.linalg.matrix_power(Abar, round(0.4 / dt)) - torch.linalg.matrix_exp(0.4 * A))
            .abs()
            .max()
            .item()
        )

    ratio = error(0.02) / error(0.01)
    assert 3.5 < ratio < 4.5, f"half the step divides the error by {ratio:.2f}, expected about 4"


bilinear.wrong(
    "Euler, forwards",
    """
import torch
def bilinear(dt, A, B):
    return torch.eye(len(B), dtype=A.dtype) + dt * A, dt * B
""",
)
bilinear.wrong(
    "Euler, backwards",
    """
import torch
def bilinear(dt, A, B):
    inverse = torch.linalg.inv(torch.eye(len(B), dtype=A.dtype) - dt * A)
    return inverse, dt * inverse @ B
""",
)
bilinear.wrong(
    "elements instead of matrices",
    """
import torch
def bilinear(dt, A, B):
    z = dt * A
    return (2 + z) / (2 - z), dt * B
""",
)
bilinear.wrong(
    "B left as it is",
    """
import torch
def bilinear(dt, A, B):
    one = torch.eye(len(B), dtype=A.dtype)
    return torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A), dt * B
""",
)
bilinear.wrong(
    "the exponential",
    """
import torch
def bilinear(dt, A, B):
    Abar = torch.linalg.matrix_exp(dt * A)
    return Abar, torch.linalg.solve(A, (Abar - torch.eye(len(B), dtype=A.dtype)) @ B)
""",
)
