"""State space duality (SSD): the recurrence of Mamba-2.

A selective scan whose decay is one scalar per head and token. That tie turns the recurrence into a
semiseparable matrix product, so that it can run as small attention-like blocks plus a short scan. See MATH.md
beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.dispatch import Op
from mambakit.ops.ssd import chunked, cpu, reference, triton


def _flops(x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, *_: object) -> int:
    # The recurrent form: decay, outer product and read-out, two operations each per state element.
    return 6 * x.numel() * B.shape[-1]


def _fake(x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, *_: object) -> list[Tensor]:
    batch, _, h, p = x.shape
    state = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [y, x.new_empty(batch, h, p, B.shape[-1], dtype=state)]


_op = Op(
    "ssd",
    {"cpu": cpu, "triton": triton, "chunked": chunked, "reference": reference},
    outputs=2,
    fake=_fake,
    flops=_flops,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the state space dual recurrence over a sequence.

    With `dt' = clamp(softplus(dt + dt_bias), *dt_limit)` (each part only where asked for), per head:

        h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Without `A`, `dt` holds the logarithms of the decays themselves, and inputs enter as they are:
    `h_t = exp(dt_t) h_{t-1} + x_t B_t^T`. That is what other recurrences with one decay per head are made of.

    Args:
        x: Inputs `(b, l, h, p)`.
        dt: Step sizes `(b, l, h)`, in the time unit of `1 / A`; or logarithms of decays.
        A: Continuous decay rates `(h,)`, negative for a stable system; `None` where `dt` says it all.
        B: Input vectors `(b, l, g, n)`; heads are split evenly into `g` groups.
        C: Output vectors `(b, l, g, n)`.
        D: Skip weights `(h,)` or `(h, p)`.
        dt_bias: Added to `dt` `(h,)`.
        initial_state: State before the first token `(b, h, p, n)`; differentiable.
        dt_softplus: Pass `dt + dt_bias` through softplus.
        dt_limit: Least and greatest step size after the softplus.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(b, l, h, p)` in the type of `x`, and the final state `(b, h, p, n)` in float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, heads not divisible into groups, an empty sequence, an empty
            `dt_limit`, settings of step sizes where there are none, or a backend that cannot take the inputs.

    Source:
        Dao and Gu, "Transformers are SSMs" (2405.21060), sections 5 and 6, listing 1.
    """
    sizes = shapes.check(
        "ssd",
        x=(x, "b l h p"),
        dt=(dt, "b l h"),
        A=(A, "h"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        D=(D, "h" if D is None or D.dim() == 1 else "h p"),
        dt_bias=(dt_bias, "h"),
        initial_state=(initial_state, "b h p n"),
        state=(state, "b h p n"),
        seq_idx=(seq_idx, "b l"),
    )
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"ssd: {sizes['h']} heads do not split evenly into {sizes['g']} groups")
    dt_min, dt_max = map(float, dt_limit)
    if not dt_min <= dt_max:
        raise ValueError(f"ssd: dt_limit is {dt_limit}, expected (least, greatest)")
    if A is None and (dt_softplus or dt_bias is not None or (dt_min, dt_max) != (0.0, torch.inf)):
        raise ValueError("ssd: without A, dt is no step size; expected no dt_bias, dt_softplus or dt_limit")
    return _op(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        initial_state,
        seq_idx,
        dt_softplus,
        dt_min,
        dt_max,
        state=state,
        backend=backend,
    )
