"""Selective scan (S6): the recurrence of Mamba-1.

A linear recurrence per channel with `n` states whose step `dt`, input `B` and output `C` depend on the token.
Differs from `ssd` in that every channel and state has its own decay rate `A[d, n]`, which rules out matrix
products along time. See MATH.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.dispatch import Op
from mambakit.ops.selective_scan import chunked, cpu, cuda, reference


def _flops(x: Tensor, dt: Tensor, A: Tensor, *_: object) -> int:
    # Per channel and state: dt A, exp, a h + dt x B (3), C h (2).
    return 7 * x.numel() * A.shape[1]


def _fake(x: Tensor, dt: Tensor, A: Tensor, *_: object) -> list[Tensor]:
    state = torch.promote_types(x.dtype, torch.float32)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], *A.shape, dtype=state),
    ]


_op = Op(
    "selective_scan",
    {"cpu": cpu, "cuda": cuda, "chunked": chunked, "reference": reference},
    outputs=2,
    fake=_fake,
    flops=_flops,
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the selective state space recurrence over a sequence.

    With `dt' = softplus(dt + dt_bias)` (each part only where asked for):

        h_t = exp(dt'_t A) h_{t-1} + dt'_t B_t x_t
        y_t = (<h_t, C_t> + D x_t) * silu(z_t)

    `A` is discretised by zero-order hold, `B` by its first-order (Euler) form, as published.

    Args:
        x: Inputs `(b, l, d)`.
        dt: Step sizes `(b, l, d)`, in the time unit of `1 / A`.
        A: Continuous decay rates `(d, n)`, negative for a stable system.
        B: Input vectors `(b, l, g, n)`; channels are split evenly into `g` groups.
        C: Output vectors `(b, l, g, n)`.
        D: Skip weights `(d,)`.
        z: Gates `(b, l, d)`, before the SiLU.
        dt_bias: Added to `dt` `(d,)`.
        initial_state: State before the first token `(b, d, n)`; differentiable.
        dt_softplus: Pass `dt + dt_bias` through softplus.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(b, l, d)` in the type of `x`, and the final state `(b, d, n)` in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, channels not divisible into groups, an empty sequence, or a
            backend that cannot take the inputs.

    Source:
        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2312.00752),
        section 3.2 and algorithm 2.
    """
    sizes = shapes.check(
        "selective_scan",
        x=(x, "b l d"),
        dt=(dt, "b l d"),
        A=(A, "d n"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        D=(D, "d"),
        z=(z, "b l d"),
        dt_bias=(dt_bias, "d"),
        initial_state=(initial_state, "b d n"),
        state=(state, "b d n"),
        seq_idx=(seq_idx, "b l"),
    )
    if sizes["d"] % sizes["g"]:
        raise ValueError(
            f"selective_scan: {sizes['d']} channels do not split evenly into {sizes['g']} groups"
        )
    return _op(
        x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, state=state, backend=backend
    )
