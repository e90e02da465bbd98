"""The causal convolution, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.shapes import same_document


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Slide a window of the last `w` inputs; see `mambakit.ops.causal_conv1d`."""
    batch, length, d = x.shape
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(work), weight.to(work)
    keep = None if seq_idx is None else same_document(seq_idx)
    state = x.new_zeros(batch, weight.shape[1] - 1, d) if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(length):
        if keep is not None:
            state = torch.where(keep[:, t, None, None], state, torch.zeros_like(state))
        window = torch.cat([state, x[:, t : t + 1]], dim=1)  # (b, w, d)
        ys.append((window * weight.T).sum(1))
        state = window[:, 1:]
    y = torch.stack(ys, dim=1)
    y = y if bias is None else y + bias.to(work)
    y = F.silu(y) if activation == "silu" else y
    return y.to(out_type), state
