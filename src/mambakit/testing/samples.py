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

from mambakit.ops.trapezoidal import TrapezoidalState


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

    def complex(self, *shape: int, decaying: bool = False) -> Tensor:
        """Complex values of float32 parts or wider; `decaying` ones have a negative real part."""
        real, imaginary = (self.wide(self.normal(*shape)).detach() for _ in range(2))
        made = torch.complex(-real.exp(), 3 * imaginary) if decaying else torch.complex(real, imaginary)
        return made.requires_grad_()

    def documents(self, b: int, l: int, border: float = 0.12) -> Tensor:
        """Document numbers `(b, l)`: each token starts a new document with probability `border`."""
        starts = torch.rand(b, l, generator=self.generator) < border
        return starts.cumsum(1).to(self.device, torch.int32)


Build = Callable[[Draw], dict[str, Any]]
"""Makes the keyword arguments of an operator's public function."""


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
    build: Build
    sequence: tuple[str, ...]

    def __str__(self) -> str:
        """Name the case in test reports."""
        return f"{self.op}-{self.name}"


def _linear_scan(b: int = 2, l: int = 37, d: int = 5, *, packed: bool = False, start: bool = True) -> Build:
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
    slow: bool = False,
    dt_scale: float = 1.0,
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        rates = {"low": -0.01, "high": -0.0001} if slow else {"low": -4.0, "high": -0.1}
        return {
            "x": draw.normal(b, l, d),
            "dt": draw.uniform(b, l, d, low=0.01, high=0.5) if bare else draw.normal(b, l, d, scale=dt_scale),
            "A": draw.wide(draw.uniform(d, n, **rates)),
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
    decays: bool = False,
    dt_scale: float = 1.0,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
) -> Build:
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

    def build_decays(draw: Draw) -> dict[str, Any]:
        steps = draw.wide(draw.uniform(b, l, h, low=-0.7 * dt_scale, high=0.0))
        return {**build(draw), "A": None, "dt": steps, "dt_bias": None, "dt_softplus": False}

    return build_decays if decays else build


def _trapezoidal(
    b: int = 2,
    l: int = 150,
    h: int = 4,
    p: int = 3,
    r: int = 1,
    g: int = 2,
    n: int = 6,
    s: int = 2,
    *,
    packed: bool = False,
    bare: bool = False,
    dt_scale: float = 1.0,
    interleaved: bool = True,
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        parts = ((b, h, s), (b, h, p, n), (b, r, h, n), (b, h, p))
        return {
            "x": draw.normal(b, l, h, p),
            "dt": draw.uniform(b, l, h, low=0.01, high=0.5) if bare else draw.normal(b, l, h, scale=dt_scale),
            "A": draw.wide(draw.uniform(b, l, h, low=-4.0, high=-0.1)),
            "B": draw.normal(b, l, r, g, n),
            "C": draw.normal(b, l, r, g, n),
            "trap": draw.normal(b, l, h),
            "angles": draw.normal(b, l, s),
            "B_bias": None if bare else draw.wide(draw.normal(h, r, n)),
            "C_bias": None if bare else draw.wide(draw.normal(h, r, n)),
            "mimo_x": None if bare else draw.wide(draw.normal(h, r, p)),
            "D": None if bare else draw.wide(draw.normal(h)),
            "dt_bias": None if bare else draw.wide(draw.normal(h)),
            "initial_state": None
            if bare
            else TrapezoidalState(*(draw.wide(draw.normal(*shape)) for shape in parts)),
            "dt_softplus": not bare,
            "interleaved": interleaved,
            "seq_idx": draw.documents(b, l) if packed else None,
        }

    return build


def _causal_conv1d(
    b: int = 2, l: int = 37, d: int = 6, w: int = 4, *, packed: bool = False, bare: bool = False
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw.normal(b, l, d),
            "weight": draw.normal(d, w),
            "bias": None if bare else draw.normal(d),
            "initial_state": None if bare else draw.wide(draw.normal(b, w - 1, d)),
            "activation": None if bare else "silu",
            "seq_idx": draw.documents(b, l) if packed else None,
        }

    return build


def _norm(
    kind: str = "rms", *, l: int = 11, d: int = 12, gated: bool = False, bare: bool = False, **options: Any
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw.normal(2, l, d),
            "weight": None if bare else draw.normal(d),
            "bias": None if bare else draw.normal(d),
            "z": draw.normal(2, l, d) if gated else None,
            "kind": kind,
            **options,
        }

    return build


def _add_norm(kind: str = "rms", *, l: int = 11, d: int = 12, bare: bool = False, wide: bool = True) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        residual = draw.normal(2, l, d)
        return {
            "x": draw.normal(2, l, d),
            "residual": draw.wide(residual) if wide else residual,
            "weight": None if bare else draw.normal(d),
            "bias": None if bare else draw.normal(d),
            "kind": kind,
        }

    return build


def _attention(
    b: int = 2, l: int = 37, h: int = 4, g: int = 2, p: int = 6, *, packed: bool = False, **options: Any
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "q": draw.normal(b, l, h, p),
            "k": draw.normal(b, l, g, p),
            "v": draw.normal(b, l, g, p),
            "seq_idx": draw.documents(b, l) if packed else None,
            **options,
        }

    return build


def _s4(
    b: int = 2,
    l: int = 37,
    d: int = 2,
    n: int = 2,
    *,
    low_rank: bool = False,
    packed: bool = False,
    bare: bool = False,
    dt_high: float = 0.3,
    **options: Any,
) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "u": draw.normal(b, l, d),
            "dt": draw.wide(draw.uniform(d, low=0.01, high=dt_high)),
            "A": draw.complex(d, n, decaying=True),
            **({"P": draw.complex(d, n)} if low_rank else {}),
            "B": draw.complex(d, n),
            "C": draw.complex(d, n),
            "D": None if bare else draw.wide(draw.normal(d)),
            "initial_state": None if bare else draw.complex(b, d, n),
            "seq_idx": draw.documents(b, l) if packed else None,
            **options,
        }

    return build


def _fft_conv(l: int = 37, w: int = 37, *, bare: bool = False) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        return {
            "u": draw.normal(2, l, 3),
            "k": draw.normal(3, w),
            "D": None if bare else draw.wide(draw.normal(3)),
        }

    return build


def _cross_entropy(n: int = 9, v: int = 37, *, ignored: bool = False, scale: float = 1.0) -> Build:
    def build(draw: Draw) -> dict[str, Any]:
        labels = torch.randint(v, (n,), generator=draw.generator)
        if ignored:
            labels[::3] = -100
        return {"logits": draw.normal(n, v, scale=scale), "labels": labels.to(draw.device)}

    return build


_SCAN = ("x", "dt", "B", "C", "z", "seq_idx")
_TRAPEZOIDAL = ("x", "dt", "A", "B", "C", "trap", "angles", "seq_idx")
_CONV = ("x", "seq_idx")
_NORM = ("x", "z")
_ATTENTION = ("q", "k", "v", "seq_idx")
_S4 = ("u", "seq_idx")

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
    Case("selective_scan", "published-sizes", _selective_scan(l=70, d=72, n=16), _SCAN),
    Case("selective_scan", "many-states", _selective_scan(b=1, d=3, n=40), _SCAN),
    Case("selective_scan", "one-state-many-channels", _selective_scan(b=1, l=19, d=300, n=1), _SCAN),
    Case("selective_scan", "odd-sizes", _selective_scan(b=1, l=131, d=70, n=29, g=2), _SCAN),
    Case("selective_scan", "long-packed", _selective_scan(b=1, l=600, d=10, n=16, packed=True), _SCAN),
    Case(
        "selective_scan", "long-slow", _selective_scan(b=1, l=600, d=5, n=8, dt_scale=0.1, slow=True), _SCAN
    ),
    Case("ssd", "plain", _ssd(), _SCAN),
    Case("ssd", "one-token", _ssd(l=1), _SCAN),
    Case("ssd", "bare", _ssd(bare=True, l=64), _SCAN),
    Case("ssd", "short", _ssd(l=7, g=1), _SCAN),
    Case("ssd", "matrix-D", _ssd(matrix_D=True, g=4), _SCAN),
    Case("ssd", "long-steps", _ssd(dt_scale=30.0), _SCAN),
    Case("ssd", "dt-limit", _ssd(dt_limit=(0.05, 0.8)), _SCAN),
    Case("ssd", "odd-sizes", _ssd(l=37, h=3, p=17, g=1, n=33), _SCAN),
    Case("ssd", "decays", _ssd(decays=True), _SCAN),
    Case("ssd", "decays-one-token", _ssd(l=1, decays=True), _SCAN),
    Case("ssd", "decays-long-packed", _ssd(b=1, l=300, h=2, packed=True, decays=True, dt_scale=9.0), _SCAN),
    Case("ssd", "one-column", _ssd(l=37, h=3, p=1, g=3, n=1), _SCAN),
    Case("ssd", "wide", _ssd(b=1, l=21, h=2, p=70, g=1, n=130), _SCAN),
    Case("ssd", "long", _ssd(b=1, l=300, h=2, g=1), _SCAN),
    Case("ssd", "packed", _ssd(packed=True), _SCAN),
    Case("ssd", "packed-long", _ssd(b=1, l=300, h=2, packed=True, dt_scale=5.0), _SCAN),
    Case("trapezoidal", "plain", _trapezoidal(), _TRAPEZOIDAL),
    Case("trapezoidal", "one-token", _trapezoidal(l=1), _TRAPEZOIDAL),
    Case("trapezoidal", "bare", _trapezoidal(l=64, bare=True), _TRAPEZOIDAL),
    Case("trapezoidal", "short-halves", _trapezoidal(l=7, g=1, interleaved=False), _TRAPEZOIDAL),
    Case("trapezoidal", "all-rotate", _trapezoidal(l=37, g=4, s=3), _TRAPEZOIDAL),
    Case("trapezoidal", "mimo", _trapezoidal(l=45, r=3, g=1, interleaved=False), _TRAPEZOIDAL),
    Case("trapezoidal", "mimo-bare", _trapezoidal(l=37, r=2, s=3, bare=True), _TRAPEZOIDAL),
    Case("trapezoidal", "many-ranks", _trapezoidal(b=1, l=5, r=70, g=1), _TRAPEZOIDAL),
    Case("trapezoidal", "long-steps", _trapezoidal(dt_scale=30.0), _TRAPEZOIDAL),
    Case("trapezoidal", "odd-sizes", _trapezoidal(l=37, h=3, p=17, g=1, n=33, s=5), _TRAPEZOIDAL),
    Case("trapezoidal", "one-column", _trapezoidal(l=37, h=3, p=1, g=3, n=2, s=1), _TRAPEZOIDAL),
    Case(
        "trapezoidal",
        "wide",
        _trapezoidal(b=1, l=21, h=2, p=70, r=4, g=1, n=130, s=32, interleaved=False),
        _TRAPEZOIDAL,
    ),
    Case("trapezoidal", "long", _trapezoidal(b=1, l=300, h=2, g=1), _TRAPEZOIDAL),
    Case("trapezoidal", "long-wide", _trapezoidal(b=1, l=140, h=1, p=64, g=1, n=32, s=8), _TRAPEZOIDAL),
    Case("trapezoidal", "packed", _trapezoidal(packed=True), _TRAPEZOIDAL),
    Case("trapezoidal", "packed-mimo", _trapezoidal(l=90, r=3, packed=True), _TRAPEZOIDAL),
    Case(
        "trapezoidal",
        "packed-long",
        _trapezoidal(b=1, l=300, h=2, packed=True, dt_scale=5.0, interleaved=False),
        _TRAPEZOIDAL,
    ),
    Case("causal_conv1d", "plain", _causal_conv1d(), _CONV),
    Case("causal_conv1d", "one-token", _causal_conv1d(l=1), _CONV),
    Case("causal_conv1d", "bare", _causal_conv1d(l=64, bare=True), _CONV),
    Case("causal_conv1d", "shorter-than-taps", _causal_conv1d(l=3, w=8), _CONV),
    Case("causal_conv1d", "one-tap", _causal_conv1d(w=1), _CONV),
    Case("causal_conv1d", "packed", _causal_conv1d(packed=True), _CONV),
    Case("causal_conv1d", "many-channels", _causal_conv1d(b=1, l=140, d=264), _CONV),
    Case("causal_conv1d", "long-packed", _causal_conv1d(b=1, l=530, d=8, packed=True), _CONV),
    Case("causal_conv1d", "wide", _causal_conv1d(l=133, d=281), _CONV),
    Case("causal_conv1d", "two-taps", _causal_conv1d(l=9, d=16, w=2), _CONV),
    Case("causal_conv1d", "many-rows", _causal_conv1d(b=70, l=5, d=3, w=3), _CONV),
    Case("norm", "plain", _norm(), _NORM),
    Case("norm", "bare", _norm(bare=True), _NORM),
    Case("norm", "layer", _norm("layer"), _NORM),
    Case("norm", "gated", _norm(gated=True), _NORM),
    Case("norm", "gated-after-grouped", _norm(gated=True, group_size=4, norm_before_gate=True), _NORM),
    Case("norm", "layer-grouped", _norm("layer", gated=True, group_size=3), _NORM),
    Case("norm", "wide", _norm(l=61, d=281, gated=True), _NORM),
    Case("norm", "layer-wide", _norm("layer", l=61, d=281), _NORM),
    Case("norm", "layer-gated-after", _norm("layer", d=33, gated=True, norm_before_gate=True), _NORM),
    Case("norm", "wide-grouped", _norm(d=120, gated=True, group_size=40, bare=True), _NORM),
    Case("norm", "one-channel", _norm(d=1), _NORM),
    Case("add_norm", "plain", _add_norm(), ("x", "residual")),
    Case("add_norm", "bare", _add_norm(bare=True), ("x", "residual")),
    Case("add_norm", "layer", _add_norm("layer", d=33), ("x", "residual")),
    Case("add_norm", "wide", _add_norm(l=61, d=281), ("x", "residual")),
    Case("add_norm", "one-type", _add_norm(l=7, d=40, wide=False), ("x", "residual")),
    Case("add_norm", "one-channel", _add_norm(d=1), ("x", "residual")),
    Case("cross_entropy", "plain", _cross_entropy(), ()),
    Case("cross_entropy", "ignored", _cross_entropy(ignored=True), ()),
    Case("cross_entropy", "large-scores", _cross_entropy(scale=300.0), ()),
    Case("cross_entropy", "wide", _cross_entropy(n=3, v=5000), ()),
    Case("attention", "plain", _attention(), _ATTENTION),
    Case("attention", "one-token", _attention(l=1), _ATTENTION),
    Case("attention", "long", _attention(l=150), _ATTENTION),
    Case("attention", "both-ways", _attention(causal=False, g=4), _ATTENTION),
    Case("attention", "window", _attention(l=150, window=9, g=1, scale=0.3), _ATTENTION),
    Case("attention", "packed", _attention(l=70, packed=True), _ATTENTION),
    Case("attention", "packed-window", _attention(l=150, packed=True, window=20), _ATTENTION),
    Case("attention", "packed-both-ways", _attention(l=70, packed=True, causal=False), _ATTENTION),
    Case("s4d_conv", "plain", _s4(), _S4),
    Case("s4d_conv", "one-token", _s4(l=1), _S4),
    Case("s4d_conv", "bare", _s4(l=64, bare=True), _S4),
    Case("s4d_conv", "long-steps", _s4(dt_high=30.0), _S4),
    Case("s4d_conv", "bilinear", _s4(discretization="bilinear"), _S4),
    Case("s4d_conv", "packed", _s4(l=61, packed=True), _S4),
    Case("s4_conv", "plain", _s4(low_rank=True), _S4),
    Case("s4_conv", "one-token", _s4(l=1, low_rank=True), _S4),
    Case("s4_conv", "bare", _s4(l=64, low_rank=True, bare=True), _S4),
    Case("s4_conv", "long-steps", _s4(low_rank=True, dt_high=30.0), _S4),
    Case("s4_conv", "packed", _s4(l=61, low_rank=True, packed=True), _S4),
    Case("fft_conv", "plain", _fft_conv(), ("u",)),
    Case("fft_conv", "short-kernel", _fft_conv(l=64, w=5), ("u",)),
    Case("fft_conv", "long-kernel", _fft_conv(l=7, w=50, bare=True), ("u",)),
)
"""Every case of every operator."""
