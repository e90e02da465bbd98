"""Operators at the sizes of real models: what benchmarks time.

`samples.py` makes small inputs that break kernels; these are large ones that wear them out, drawn on the
device and distributed like those of a freshly initialised model. A workload knows how many bytes and
operations it needs at least, and how to check a result at full size without a second full-size computation:
gradients are asked of one part of the output only (a row, some channels or heads), which depends on one part
of the inputs only; so the plain backend recomputes that part alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mambakit import ops
from mambakit.ops.dispatch import registry
from mambakit.testing.checks import AGREEMENT, check_same

Index = tuple[slice, ...]

WIDE = ("A", "D", "dt_bias")
"""Arguments that stay in float32 whatever the type of the activations."""
PLAIN = "chunked"
"""The backend that others are compared with at full size."""


@dataclasses.dataclass
class Source:
    """Random tensors of one type, drawn where they are needed, reproducible from a seed."""

    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def __post_init__(self) -> None:
        """Start the generator."""
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values of that standard deviation, in the type."""
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0, scale, generator=self.generator)

    def step_bias(self, *shape: int, least: float = 0.001, most: float = 0.1) -> Tensor:
        """Biases whose softplus is log-uniform between the published limits of the step size, in float32."""
        steps = torch.empty(shape, device=self.device).uniform_(0, 1, generator=self.generator)
        steps = least * (most / least) ** steps
        return steps + torch.log(-torch.expm1(-steps))


@dataclasses.dataclass(eq=False)
class Call:
    """An implementation with its inputs, ready to run; layouts other than ours are converted for checks only.

    Attributes:
        forward: Gives the output, in the implementation's own layout.
        leaves: What gradients are taken of, by our argument's name, in its layout.
        ours: Name (`y`, or a leaf's) -> from its layout to ours; what is not named has ours.
        theirs: From our layout of `y` to its.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    ours: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=dict)
    theirs: Callable[[Tensor], Tensor] = lambda y: y

    def run(self, dy: Tensor | None = None) -> tuple[Tensor, ...]:
        """One call: forward only, or with the gradients under `dy`, given in the implementation's layout."""
        if dy is None:
            with torch.no_grad():
                return (self.forward(),)
        with torch.enable_grad():
            y = self.forward()
            return (y, *torch.autograd.grad(y, list(self.leaves.values()), dy))

    def results(self, dy: Tensor | None) -> dict[str, Tensor]:
        """Output and gradients in our layout, under `dy` in our layout."""
        y, *grads = self.run(None if dy is None else self.theirs(dy))
        named = {"y": y, **dict(zip(self.leaves, grads, strict=False))}
        return {key: self.ours.get(key, lambda t: t)(value) for key, value in named.items()}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operator at one size.

    Attributes:
        op: The operator's name.
        sizes: Letter -> size, as in the operator's contract.
        build: Makes the public function's keyword arguments.
        part: Argument -> the part of it that decides the part `seen` of the output; others count whole.
        seen: That part of the output.
        work: Share of the operator's formula of operations that has to be done (half for causal attention).
        kind: A word for the variety of the operator, such as `gated`.
    """

    op: str
    sizes: Mapping[str, int]
    build: Callable[[Source], dict[str, Any]]
    part: Mapping[str, Index]
    seen: Index
    work: float = 1.0
    kind: str = ""

    @property
    def name(self) -> str:
        """The operator and its sizes, as in `ssd b8 l2048 h64 p64 g1 n128`."""
        sizes = (f"{letter}{size}" for letter, size in self.sizes.items())
        return " ".join(filter(None, (self.kind, self.op, *sizes)))

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """Draw the keyword arguments of the public function; all tensors require gradients."""
        made = self.build(Source(dtype, device, seed))
        return {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in made.items()}

    def backends(self, inputs: Mapping[str, Any]) -> list[str]:
        """The backends that can take the inputs, most preferred first, without the sequential reference."""
        able = ops.reasons(self.op, **inputs)
        return [name for name, reason in able.items() if reason is None and name != "reference"]

    def call(self, inputs: Mapping[str, Any], backend: str | None = None) -> Call:
        """Our implementation on these inputs."""
        function = getattr(ops, self.op)

        def forward() -> Tensor:
            found = function(**inputs, backend=backend)
            return found[0] if isinstance(found, tuple) else found

        return Call(forward, leaves(inputs))

    def gradient(self, inputs: Mapping[str, Any], *, part: bool = False, seed: int = 1) -> Tensor:
        """A random gradient of the output; with `part`, zero outside the part that checks look at."""
        like = next(iter(inputs.values()))
        drawn = Source(like.dtype, like.device, seed).normal(*like.shape)
        if not part:
            return drawn
        masked = torch.zeros_like(drawn)
        masked[self.seen] = drawn[self.seen]
        return masked

    def check(self, name: str, call: Call, inputs: Mapping[str, Any], backward: bool) -> float:
        """Compare an implementation with the plain backend on the part, at full size.

        Args:
            name: Of the implementation, for the message.
            call: The implementation with these inputs.
            inputs: The inputs.
            backward: Whether to compare gradients too.

        Returns:
            The largest relative error.

        Raises:
            WrongResultError: It computes something else.
        """
        dy = self.gradient(inputs, part=True) if backward else None
        full = call.results(dy)
        found = {"y": full["y"][self.seen]} | {
            f"d{key}": full[key][self.part.get(key, ...)] for key in call.leaves if key in full
        }
        small = {
            k: v.detach()[self.part[k]].requires_grad_() if k in self.part and v is not None else v
            for k, v in inputs.items()
        }
        plain = self.call(small, PLAIN).results(None if dy is None else dy[self.seen])
        expected = {k if k == "y" else f"d{k}": v for k, v in plain.items()}
        return check_same(name, found, expected, AGREEMENT[expected["y"].dtype])

    def moved(self, inputs: Mapping[str, Any], backward: bool) -> int:
        """Bytes to read and write at least once.

        Inputs and output; in the backward pass inputs and the output's gradient again, and the gradients of
        the inputs.
        """
        read = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
        y = next(iter(inputs.values())).nbytes
        grads = sum(v.nbytes for v in leaves(inputs).values())
        return read + y + (read + y + grads if backward else 0)

    def flops(self, inputs: Mapping[str, Any], backward: bool) -> int:
        """Floating-point operations by the operator's formula; a backward pass counts two forward ones."""
        op = registry[self.op]
        once = self.work * op.flops(*(inputs.get(argument) for argument in op.arguments))
        return int(once * (3 if backward else 1))


def leaves(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs that gradients are taken of."""
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}


# ---------------------------------------------------------------------------------------------------------
# The operators


def selective_scan(b: int, l: int, d: int, n: int = 16) -> Workload:
    """Mamba-1's scan with everything that the block gives it: gate, skip, bias, softplus; one group."""

    def build(draw: Source) -> dict[str, Any]:
        rates = torch.arange(1.0, n + 1, device=draw.device)  # S4D-real
        return {
            "x": draw.normal(b, l, d),
            "dt": draw.normal(b, l, d),
            "A": -rates.expand(d, n).contiguous(),
            "B": draw.normal(b, l, 1, n),
            "C": draw.normal(b, l, 1, n),
            "D": torch.ones(d, device=draw.device),
            "z": draw.normal(b, l, d),
            "dt_bias": draw.step_bias(d),
            "dt_softplus": True,
        }

    row, channels = slice(0, 1), slice(0, 64)
    tokens: Index = (row, slice(None), channels)
    part = {
        **dict.fromkeys(("x", "dt", "z"), tokens),
        **dict.fromkeys(("B", "C"), (row,)),
        **dict.fromkeys(("A", "D", "dt_bias"), (channels,)),
    }
    return Workload("selective_scan", {"b": b, "l": l, "d": d, "n": n}, build, part, tokens)


def ssd(b: int, l: int, h: int, p: int = 64, g: int = 1, n: int = 128) -> Workload:
    """Mamba-2's scan with skip, bias and softplus."""

    def build(draw: Source) -> dict[str, Any]:
        rates = torch.empty(h, device=draw.device).uniform_(1, 16, generator=draw.generator)
        return {
            "x": draw.normal(b, l, h, p),
            "dt": draw.normal(b, l, h),
            "A": -rates,
            "B": draw.normal(b, l, g, n),
            "C": draw.normal(b, l, g, n),
            "D": torch.ones(h, device=draw.device),
            "dt_bias": draw.step_bias(h),
            "dt_softplus": True,
        }

    row, heads, group = slice(0, 1), slice(0, h // g), slice(0, 1)
    part = {
        **dict.fromkeys(("x", "dt"), (row, slice(None), heads)),
        **dict.fromkeys(("B", "C"), (row, slice(None), group)),
        **dict.fromkeys(("A", "D", "dt_bias"), (heads,)),
    }
    sizes = {"b": b, "l": l, "h": h, "p": p, "g": g, "n": n}
    return Workload("ssd", sizes, build, part, (row, slice(None), heads))


def causal_conv1d(b: int, l: int, d: int, w: int = 4) -> Workload:
    """The short convolution in front of every scan, with bias and SiLU."""

    def build(draw: Source) -> dict[str, Any]:
        return {
            "x": draw.normal(b, l, d),
            "weight": draw.normal(d, w, scale=w**-0.5),
            "bias": draw.normal(d, scale=0.1),
            "activation": "silu",
        }

    seen: Index = (slice(0, 1), slice(None), slice(0, 64))
    part = {"x": seen, "weight": (slice(0, 64),), "bias": (slice(0, 64),)}
    return Workload("causal_conv1d", {"b": b, "l": l, "d": d, "w": w}, build, part, seen)


def norm(b: int, l: int, d: int, *, gated: bool = False) -> Workload:
    """The RMS norm in front of a block, or Mamba-2's gated one behind its scan."""

    def build(draw: Source) -> dict[str, Any]:
        return {
            "x": draw.normal(b, l, d),
            "weight": torch.ones(d, device=draw.device, dtype=draw.dtype),
            "z": draw.normal(b, l, d) if gated else None,
        }

    seen: Index = (slice(0, 1),)
    part = {"x": seen, "z": seen}
    return Workload("norm", {"b": b, "l": l, "d": d}, build, part, seen, kind="gated" if gated else "")


def attention(b: int, l: int, h: int, p: int = 64) -> Workload:
    """Causal softmax attention, the operator to be compared with at every length."""

    def build(draw: Source) -> dict[str, Any]:
        return {name: draw.normal(b, l, h, p) for name in ("q", "k", "v")}

    seen: Index = (slice(0, 1), slice(None), slice(0, 1))
    sizes = {"b": b, "l": l, "h": h, "p": p}
    return Workload("attention", sizes, build, dict.fromkeys(("q", "k", "v"), seen), seen, work=0.5)
