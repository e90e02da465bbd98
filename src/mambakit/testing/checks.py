"""What has to be true of a result before its time means anything.

Two questions, both answered with the error that was found. Is a backend right? Its outputs and gradients on a
small sample of `samples.CASES` are compared with the float64 reference, by the rule of the conformance tests:
*error <= 2 x the reference's own error in the same type + the type's rounding*. Are two implementations doing
the same work, at the size that is timed? Then their results agree as far as the type can show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambakit import ops
from mambakit.testing.samples import CASES, Draw

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Error that a type's own rounding explains, whatever the algorithm."""

AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Difference between two right implementations whose activations have a type: sums over thousands of tokens
in another order, intermediate results rounded elsewhere."""


class WrongResultError(RuntimeError):
    """An implementation computes something else; the message says how far off it is."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """`|found - exact| / |exact|` in the Frobenius norm, computed in double precision.

    Args:
        found: A result of any type.
        exact: What it should be, of the same shape.

    Returns:
        The error; infinity if a number is not finite.
    """
    exact = exact.detach().to(torch.complex128 if exact.is_complex() else torch.float64)
    error = ((found.detach().to(exact.dtype) - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def check_same(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> float:
    """Compare the results of two implementations.

    Args:
        name: Of the first, for the message.
        found: Its outputs and gradients by name.
        expected: Those of the other.
        bound: Largest relative error allowed.

    Returns:
        The largest relative error.

    Raises:
        WrongResultError: A result is missing, has another shape, or is further off than the bound.
    """
    worst = 0.0
    for key, right in expected.items():
        if key not in found or found[key].shape != right.shape:
            got = tuple(found[key].shape) if key in found else "nothing"
            raise WrongResultError(f"{name}: {key} is {got}, expected shape {tuple(right.shape)}")
        error = relative_error(found[key], right)
        if not error <= bound:
            raise WrongResultError(
                f"{name}: {key} has a relative error of {error:.2g}, expected at most {bound:.2g}; not timed"
            )
        worst = max(worst, error)
    return worst


def check_backend(
    op: str, backend: str, dtype: torch.dtype, device: torch.device | str, case: str = "plain"
) -> float:
    """Compare a backend with the float64 reference on a small sample, gradients included.

    Args:
        op: The operator's name.
        backend: The backend's name.
        dtype: Type of the activations.
        device: Where it runs.
        case: Name of the sample inputs, from `samples.CASES`.

    Returns:
        The largest relative error.

    Raises:
        WrongResultError: The error is more than twice that of the reference in the same type, plus rounding.
        ValueError: The backend cannot take these inputs.
    """
    [sample] = [c for c in CASES if (c.op, c.name) == (op, case)]
    inputs = sample.build(Draw(dtype, device))
    exact = values_and_gradients(op, _widened(inputs), "reference")
    own = values_and_gradients(op, inputs, "reference")
    found = values_and_gradients(op, inputs, backend)
    worst = 0.0
    for key, right in exact.items():
        bound = 2 * relative_error(own[key], right) + ROUNDING[dtype]
        worst = max(worst, check_same(f"{op}, backend {backend}", {key: found[key]}, {key: right}, bound))
    return worst


def values_and_gradients(op: str, inputs: Mapping[str, Any], backend: str) -> dict[str, Tensor]:
    """Outputs of an operator and the gradients of its inputs, under a fixed random weighting of the outputs.

    Args:
        op: The operator's name.
        inputs: The public function's keyword arguments; gradients are taken of those that require one.
        backend: The backend's name.

    Returns:
        `output0`, ... and `dx`, ... by name.
    """
    outputs = getattr(ops, op)(**inputs, backend=backend)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)).sum()
        for o in outputs
        if o.is_floating_point()
    )
    wanted = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return {**{f"output{i}": o.detach() for i, o in enumerate(outputs)}, **named}


def _widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in float64."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
