"""State space duality, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.shapes import same_document
from mambakit.ops.step_size import step_size


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
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
    x, dt, A, B, C = (t.to(work) for t in (x, dt, A, B, C))
    dt = step_size(dt, dt_bias, dt_softplus, dt_min, dt_max)
    keep = None if seq_idx is None else same_document(seq_idx)
    state = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(length):
        B_t, C_t = (M[:, t].repeat_interleave(heads // groups, dim=1) for M in (B, C))  # (b, h, n)
        if keep is not None:
            state = torch.where(keep[:, t, None, None, None], state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B_t[:, :, None]
        ys.append((state * C_t[:, :, None]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(work) * x
    return y.to(out_type), state
