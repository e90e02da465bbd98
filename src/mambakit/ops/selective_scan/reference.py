"""The selective scan, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.shapes import same_document
from mambakit.ops.step_size import step_size


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
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Literal recurrence of `mambakit.ops.selective_scan`."""
    batch, length, d = x.shape
    n, groups = A.shape[1], B.shape[2]
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(work) for t in (x, dt, A, B, C))
    dt = step_size(dt, dt_bias, dt_softplus)
    keep = None if seq_idx is None else same_document(seq_idx)
    state = x.new_zeros(batch, d, n) if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(length):
        B_t, C_t = (M[:, t].repeat_interleave(d // groups, dim=1) for M in (B, C))  # (b, d, n)
        if keep is not None:
            state = torch.where(keep[:, t, None, None], state, torch.zeros_like(state))
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B_t
        ys.append((state * C_t).sum(-1))
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D.to(work) * x
    y = y if z is None else y * F.silu(z.to(work))
    return y.to(out_type), state
