"""Long convolutions and state space recurrences, one token at a time: the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambakit.ops.long_conv import discretisation
from mambakit.ops.shapes import same_document


def fft_conv(u: Tensor, k: Tensor, D: Tensor | None = None) -> Tensor:
    """`y_t = sum_s k_s u_{t-s}`, literally; see `mambakit.ops.fft_conv`."""
    work = torch.promote_types(u.dtype, torch.float32)
    u_work, taps = u.to(work), k.to(work).mT
    outputs = []
    for t in range(u.shape[1]):
        reach = min(t + 1, taps.shape[0])
        outputs.append((taps[:reach].flip(0) * u_work[:, t + 1 - reach : t + 1]).sum(1))
    return _skip(torch.stack(outputs, dim=1), u_work, D).to(u.dtype)


def s4d_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    discretization: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """`h_t = Abar h_{t-1} + Bbar u_t`, literally; see `mambakit.ops.s4d_conv`."""
    dt, A, B = _cast(u, dt, A, B)
    Abar, Bbar = discretisation.diagonal(dt, A, B, discretization)

    def step(h: Tensor, u_t: Tensor) -> Tensor:
        return Abar * h + Bbar * u_t[..., None]

    return _recur(step, u, C, D, initial_state, seq_idx)


def s4_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The diagonal-plus-rank-one step, `O(n)` per token, literally; see `mambakit.ops.s4_conv`."""
    system = discretisation.low_rank(*_cast(u, dt, A, P, B))

    def step(h: Tensor, u_t: Tensor) -> Tensor:
        read = (2 * (system.probe * h).real).sum(-1, keepdim=True)
        return system.decay * h + system.feedback * read + system.Bbar * u_t[..., None]

    return _recur(step, u, C, D, initial_state, seq_idx)


def _recur(
    step: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a step over the tokens and read `y_t = 2 Re<C, h_t> + D u_t`."""
    work = torch.promote_types(u.dtype, torch.float32)
    u_work, C = u.to(work), C.to(torch.promote_types(work, torch.complex64))
    h = C.new_zeros(u.shape[0], *C.shape) if initial_state is None else initial_state.to(C.dtype)
    keep = None if seq_idx is None else same_document(seq_idx)[..., None, None]
    outputs = []
    for t in range(u.shape[1]):
        if keep is not None:
            h = torch.where(keep[:, t], h, torch.zeros_like(h))
        h = step(h, u_work[:, t])
        outputs.append((2 * (C * h).real).sum(-1))
    return _skip(torch.stack(outputs, dim=1), u_work, D).to(u.dtype), h


def _cast(u: Tensor, dt: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Bring the parameters to the precision of the recurrence."""
    work = torch.promote_types(u.dtype, torch.float32)
    return dt.to(work), *(v.to(torch.promote_types(work, torch.complex64)) for v in vectors)


def _skip(y: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + D.to(y.dtype) * u
