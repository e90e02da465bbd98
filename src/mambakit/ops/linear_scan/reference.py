"""The linear recurrence, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.shapes import same_document


def linear_scan(
    a: Tensor, u: Tensor, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + u_t`, literally; see `mambakit.ops.linear_scan`."""
    state = torch.zeros_like(u[:, 0]) if initial_state is None else initial_state
    keep = None if seq_idx is None else same_document(seq_idx)
    states = []
    for t in range(u.shape[1]):
        if keep is not None:
            state = torch.where(keep[:, t].view(-1, *[1] * (state.dim() - 1)), state, torch.zeros_like(state))
        state = a[:, t] * state + u[:, t]
        states.append(state)
    return torch.stack(states, dim=1), state
