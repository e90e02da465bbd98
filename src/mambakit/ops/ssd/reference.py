"""State space duality, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.shapes import same_document
from mambakit.ops.step_size import step_size


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = torch.inf,
) -> tuple[Tensor, Tensor]:
    """Literal recurrence of `mambakit.ops.ssd`."""
    batch, length, heads, p = x.shape
    groups, n = B.shape[2:]
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C = (t.to(work) for t in (x, dt, B, C))
    u, steps = entering(x, dt, A, dt_bias, dt_softplus, dt_min, dt_max)
    keep = None if seq_idx is None else same_document(seq_idx)
    state = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(length):
        B_t, C_t = (M[:, t].repeat_interleave(heads // groups, dim=1) for M in (B, C))  # (b, h, n)
        if keep is not None:
            state = torch.where(keep[:, t, None, None, None], state, torch.zeros_like(state))
        state = steps[:, t, :, None, None].exp() * state + u[:, t, ..., None] * B_t[:, :, None]
        ys.append((state * C_t[:, :, None]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(work) * x
    return y.to(out_type), state


def entering(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """What enters the state `(b, l, h, p)`, and the logarithms of the decays `(b, l, h)`."""
    if A is None:
        return x, dt
    dt = step_size(dt, dt_bias, dt_softplus, dt_min, dt_max)
    return x * dt.unsqueeze(-1), dt * A.to(dt.dtype)
