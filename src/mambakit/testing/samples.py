"""Sample inputs of every operator: what tests, benchmarks and lessons run them on.

A case builds the keyword arguments of one operator's public function at any type, device and size. Cases
cover what has gone wrong elsewhere: lengths that fill no chunk, one token, groups, optional arguments left
out, step sizes so long that a decay underflows, documents packed into a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Draw:
    """Random tensors of one type on one device, reproducible from a seed."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """Start the generator; values are drawn on the CPU so that every device sees the same."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Standard normal values times `scale`, differentiable, rounded to the type."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, self.dtype).requires_grad_()

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform values in `[low, high)`, differentiable, rounded to the type."""
        values = torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return values.to(self.device, self.dtype).requires_grad_()

    def wide(self, tensor: Tensor) -> Tensor:
        """The same values as a state space scalar or recurrent state: float32 or wider."""
        return tensor.detach().to(torch.promote_types(self.dtype, torch.float32)).requires_grad_()

    def documents(self, b: int, l: int, border: float = 0.12) -> Tensor:
        """Document numbers `(b, l)`: each token starts a new document with probability `border`."""
        starts = torch.rand(b, l, generator=self.generator) < border
        return starts.cumsum(1).to(self.device, torch.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        op: The operator's name.
        name: What the case is about.
        build: Makes the public function's keyword arguments from a `Draw`.
        sequence: Names of the arguments with a length axis (axis 1).
    """

    op: str
    name: str
    build: Callable[[Draw], dict[str, Any]]
    sequence: tuple[str, ...]

    def __str__(self) -> str:
        """Name the case in test reports."""
        return f"{self.op}-{self.name}"


def _linear_scan(b: int = 2, l: int = 37, d: int = 5, *, packed: bool = False, start: bool = True) -> Callable:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "a": draw.uniform(b, l, d, low=-1.0, high=1.0),
            "u": draw.normal(b, l, d),
            "initial_state": draw.normal(b, d) if start else None,
            "seq_idx": draw.documents(b, l) if packed else None,
        }

    return build


def _selective_scan(
    b: int = 2,
    l: int = 37,
    d: int = 6,
    n: int = 4,
    g: int = 1,
    *,
    packed: bool = False,
    bare: bool = False,
    dt_scale: float = 1.0,
) -> Callable:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw.normal(b, l, d),
            "dt": draw.uniform(b, l, d, low=0.01, high=0.5) if bare else draw.normal(b, l, d, scale=dt_scale),
            "A": draw.wide(draw.uniform(d, n, low=-4.0, high=-0.1)),
            "B": draw.normal(b, l, g, n),
            "C": draw.normal(b, l, g, n),
            "D": None if bare else draw.wide(draw.normal(d)),
            "z": None if bare else draw.normal(b, l, d),
            "dt_bias": None if bare else draw.wide(draw.normal(d)),
            "initial_state": None if bare else draw.wide(draw.normal(b, d, n)),
            "dt_softplus": not bare,
            "seq_idx": draw.documents(b, l) if packed else None,
        }

    return build


def _ssd(
    b: int = 2,
    l: int = 150,
    h: int = 4,
    p: int = 3,
    g: int = 2,
    n: int = 5,
    *,
    packed: bool = False,
    bare: bool = False,
    matrix_D: bool = False,
    dt_scale: float = 1.0,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
) -> Callable:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw.normal(b, l, h, p),
            "dt": draw.uniform(b, l, h, low=0.01, high=0.5) if bare else draw.normal(b, l, h, scale=dt_scale),
            "A": draw.wide(draw.uniform(h, low=-4.0, high=-0.1)),
            "B": draw.normal(b, l, g, n),
            "C": draw.normal(b, l, g, n),
            "D": None if bare else draw.wide(draw.normal(*((h, p) if matrix_D else (h,)))),
            "dt_bias": None if bare else draw.wide(draw.normal(h)),
            "initial_state": None if bare else draw.wide(draw.normal(b, h, p, n)),
            "dt_softplus": not bare,
            "dt_limit": dt_limit,
            "seq_idx": draw.documents(b, l) if packed else None,
        }

    return build


_SCAN = ("x", "dt", "B", "C", "z", "seq_idx")

CASES: tuple[Case, ...] = (
    Case("linear_scan", "plain", _linear_scan(), ("a", "u", "seq_idx")),
    Case("linear_scan", "one-token", _linear_scan(l=1), ("a", "u", "seq_idx")),
    Case("linear_scan", "no-state", _linear_scan(l=64, start=False), ("a", "u", "seq_idx")),
    Case("linear_scan", "packed", _linear_scan(packed=True), ("a", "u", "seq_idx")),
    Case("selective_scan", "plain", _selective_scan(), _SCAN),
    Case("selective_scan", "one-token", _selective_scan(l=1), _SCAN),
    Case("selective_scan", "bare", _selective_scan(bare=True, l=64), _SCAN),
    Case("selective_scan", "groups", _selective_scan(g=3), _SCAN),
    Case("selective_scan", "long-steps", _selective_scan(dt_scale=30.0), _SCAN),
    Case("selective_scan", "packed", _selective_scan(packed=True, g=2), _SCAN),
    Case("ssd", "plain", _ssd(), _SCAN),
    Case("ssd", "one-token", _ssd(l=1), _SCAN),
    Case("ssd", "bare", _ssd(bare=True, l=64), _SCAN),
    Case("ssd", "short", _ssd(l=7, g=1), _SCAN),
    Case("ssd", "matrix-D", _ssd(matrix_D=True, g=4), _SCAN),
    Case("ssd", "long-steps", _ssd(dt_scale=30.0), _SCAN),
    Case("ssd", "dt-limit", _ssd(dt_limit=(0.05, 0.8)), _SCAN),
    Case("ssd", "packed", _ssd(packed=True), _SCAN),
)
"""Every case of every operator."""
