"""Checks of module 2."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coursekit.exercises import Exercise, close


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made inside it holds; views hold none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, size)
        return result


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers in double precision."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def uniform(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Numbers between 0 and 1 in double precision."""
    return torch.rand(*shape, generator=rng, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------
# Structured matrices

toeplitz = Exercise("m2-toeplitz", "toeplitz", "A Toeplitz product by FFT", stars=2, minutes=20)


@toeplitz.part("equals the dense product", points=2)
def _(toeplitz, rng):
    l = 37
    column, row, x = normal(rng, l), normal(rng, l), normal(rng, l)
    row[0] = column[0]
    M = torch.stack(
        [torch.stack([column[i - j] if i >= j else row[j - i] for j in range(l)]) for i in range(l)]
    )
    close(toeplitz(column, row, x), M @ x, "M x", 1e-10)


@toeplitz.part("nothing wraps around: a lower triangular matrix is causal")
def _(toeplitz, rng):
    column, x = normal(rng, 20), normal(rng, 20)
    row = torch.zeros(20, dtype=torch.float64)
    row[0] = column[0]
    changed = x.clone()
    changed[12:] += 10
    close(toeplitz(column, row, changed)[:12], toeplitz(column, row, x)[:12], "the first 12 outputs", 1e-10)


@toeplitz.part("no tensor of l x l numbers")
def _(toeplitz, rng):
    column, x = normal(rng, 4096), normal(rng, 4096)
    with Largest() as seen:
        toeplitz(column, column, x)
    assert seen.numbers <= 16 * 4096, f"a tensor of {seen.numbers} numbers was made, for 4096 tokens"


toeplitz.wrong(
    "a transform too short, so that it wraps around",
    """
import torch
def toeplitz(column, row, x):
    return torch.fft.irfft(torch.fft.rfft(column) * torch.fft.rfft(x), n=len(x))
""",
)
toeplitz.wrong(
    "the row not reversed",
    """
import torch
def toeplitz(column, row, x):
    l = len(x)
    circle = torch.cat([column, column.new_zeros(1), row[1:]])
    return torch.fft.irfft(torch.fft.rfft(circle) * torch.fft.rfft(x, n=2 * l), n=2 * l)[:l]
""",
)
toeplitz.wrong(
    "the matrix written out",
    """
import torch
def toeplitz(column, row, x):
    lag = torch.arange(len(x))[:, None] - torch.arange(len(x))
    return torch.where(lag >= 0, column[lag.clamp(min=0)], row[(-lag).clamp(min=0)]) @ x
""",
)

causal_product = Exercise(
    "m2-causal-low-rank", "causal_product", "Causal and low rank", stars=2, minutes=15
)


@causal_product.part("equals the masked product", points=2)
def _(causal_product, rng):
    C, B, X = normal(rng, 40, 3), normal(rng, 40, 3), normal(rng, 40, 5)
    close(causal_product(C, B, X), (C @ B.T).tril() @ X, "tril(C B^T) X", 1e-10)


@causal_product.part("a token sees itself")
def _(causal_product, rng):
    C, B, X = normal(rng, 1, 3), normal(rng, 1, 3), normal(rng, 1, 5)
    close(causal_product(C, B, X), (C @ B.T) * X, "the first row", 1e-12)


@causal_product.part("no tensor of l x l or l x n x p numbers")
def _(causal_product, rng):
    l, n, p = 600, 24, 24
    C, B, X = normal(rng, l, n), normal(rng, l, n), normal(rng, l, p)
    with Largest() as seen:
        causal_product(C, B, X)
    assert seen.numbers <= 2 * l * (n + p), f"a tensor of {seen.numbers} numbers was made"


causal_product.wrong(
    "no mask",
    """
import torch
def causal_product(C, B, X):
    return C @ (B.T @ X)
""",
)
causal_product.wrong(
    "the past without the token itself",
    """
import torch
def causal_product(C, B, X):
    return (C @ B.T).tril(-1) @ X
""",
)
causal_product.wrong(
    "all states at once",
    """
import torch
def causal_product(C, B, X):
    return torch.einsum("ln,lnp->lp", C, torch.einsum("ln,lp->lnp", B, X).cumsum(0))
""",
)
