"""The recurrence of Mamba-3: exponential-trapezoidal steps, states that rotate, several inputs per step.

`ssd` with three additions. The input enters by a trapezoid, a mean of this token's and the last one's,
weighted by the data; pairs of state columns turn by angles that the data chooses, which is a complex decay
and can count; and with rank `r` every head takes in and reads out `r` vectors per step, which costs
arithmetic and no memory (MIMO; `r = 1` is SISO). The decay depends on the token, too. See MATH.md beside
this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.dispatch import Op
from mambakit.ops.trapezoidal import by_ssd, reference


class TrapezoidalState(NamedTuple):
    """What the recurrence remembers of a sequence; all zeros before the first token.

    Attributes:
        angle: Angles of the last token `(b, h, s)`, radians in `[-pi, pi]`.
        ssm: State `(b, h, p, n)`.
        k: Input vectors of the last token, with bias and rotated, `(b, r, h, n)`.
        v: Inputs of the last token `(b, h, p)`.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: object) -> int:
    # The recurrent form: decay, and for each rank an outer product and a read-out, per state element.
    return (2 + 4 * B.shape[2]) * x.numel() * B.shape[-1]


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, trap: Tensor, angles: Tensor, *_: object
) -> list[Tensor]:
    (b, length, h, p), (r, _, n), s = x.shape, B.shape[2:], angles.shape[-1]
    made = {"dtype": torch.promote_types(x.dtype, torch.float32)}
    states = [x.new_empty(shape, **made) for shape in ((b, h, s), (b, h, p, n), (b, r, h, n), (b, h, p))]
    return [x.new_empty(b, length, r, h, p), *states]


_op = Op(
    "trapezoidal",
    {"ssd": by_ssd, "reference": reference},
    outputs=5,
    fake=_fake,
    flops=_flops,
)


def trapezoidal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: TrapezoidalState | None = None,
    *,
    dt_softplus: bool = False,
    interleaved: bool = True,
    state: TrapezoidalState | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, TrapezoidalState]:
    """Run the exponential-trapezoidal recurrence with rotating states over a sequence.

    With `dt' = softplus(dt + dt_bias)` (each part only where asked for), `w = sigmoid(trap)` and, for each
    rank `r`, `x_r = x * mimo_x_r`, per head:

        theta_t = theta_{t-1} + pi tanh(angles_t) dt'_t        k_t = R(theta_t) (B_t + B_bias)
        a_t = exp(dt'_t A_t)                                   q_t = R(theta_t) (C_t + C_bias)

        h_t = a_t (h_{t-1} + (1 - w_t) dt'_t sum_r x_{r,t-1} k_{r,t-1}^T) + w_t dt'_t sum_r x_{r,t} k_{r,t}^T
        y_{r,t} = h_t q_{r,t} + D x_{r,t}

    `R(theta)` turns pair `i` of the `n` columns by `theta_i`: `(u, v) -> (u cos - v sin, u sin + v cos)`;
    columns beyond the `s` pairs stay. `w = 1` and `angles = 0` give `ssd` with a decay per token.

    Args:
        x: Inputs `(b, l, h, p)`.
        dt: Step sizes `(b, l, h)`, in the time unit of `1 / A`.
        A: Decay rates of each token `(b, l, h)`, not positive.
        B: Input vectors `(b, l, r, g, n)`; heads are split evenly into `g` groups.
        C: Output vectors `(b, l, r, g, n)`.
        trap: Logit of the share of this token's input in the trapezoid `(b, l, h)`.
        angles: Rates of rotation before the tanh `(b, l, s)`, shared by the heads, with `2 s <= n`.
        B_bias: Added to `B` before the rotation `(h, r, n)`.
        C_bias: Added to `C` before the rotation `(h, r, n)`.
        mimo_x: Factor on the inputs for each rank `(h, r, p)`; 1 by default.
        D: Skip weights `(h,)`.
        dt_bias: Added to `dt` `(h,)`.
        initial_state: State before the first token; differentiable.
        dt_softplus: Pass `dt + dt_bias` through softplus.
        interleaved: Pair `i` is columns `(2i, 2i + 1)`; otherwise `(i, i + n / 2)`.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row. Angles start at 0 in each document.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(b, l, r, h, p)` in the type of `x`, and the final state in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: Shapes that do not fit, heads not divisible into groups, no angle or more than pairs of
            columns, an odd `n` without `interleaved`, an empty sequence, or a backend that cannot take the
            inputs.

    Source:
        "Mamba-3" (2603.15569), section 3.
    """
    given = {"initial_state": initial_state, "state": state}
    sizes = shapes.check(
        "trapezoidal",
        x=(x, "b l h p"),
        dt=(dt, "b l h"),
        A=(A, "b l h"),
        B=(B, "b l r g n"),
        C=(C, "b l r g n"),
        trap=(trap, "b l h"),
        angles=(angles, "b l s"),
        B_bias=(B_bias, "h r n"),
        C_bias=(C_bias, "h r n"),
        mimo_x=(mimo_x, "h r p"),
        D=(D, "h"),
        dt_bias=(dt_bias, "h"),
        seq_idx=(seq_idx, "b l"),
        **{f"{name}.angle": (s.angle, "b h s") for name, s in given.items() if s is not None},
        **{f"{name}.ssm": (s.ssm, "b h p n") for name, s in given.items() if s is not None},
        **{f"{name}.k": (s.k, "b r h n") for name, s in given.items() if s is not None},
        **{f"{name}.v": (s.v, "b h p") for name, s in given.items() if s is not None},
    )
    h, g, n, s = (sizes[letter] for letter in "hgns")
    if h % g:
        raise ValueError(f"trapezoidal: {h} heads do not split evenly into {g} groups")
    if not 1 <= s <= n // 2:
        raise ValueError(f"trapezoidal: {s} angles, expected 1 to {n // 2}, the pairs of {n} columns")
    if not interleaved and n % 2:
        raise ValueError(f"trapezoidal: {n} columns have no halves to pair, expected an even number")
    y, *final = _op(
        x,
        dt,
        A,
        B,
        C,
        trap,
        angles,
        B_bias,
        C_bias,
        mimo_x,
        D,
        dt_bias,
        *(initial_state or 4 * (None,)),
        seq_idx,
        dt_softplus,
        interleaved,
        state=state,
        backend=backend,
    )
    return y, TrapezoidalState(*final)
