"""State space duality by chunks: attention-like products inside a chunk, a scan over chunk states.

Inside a chunk of `q` tokens the output is a masked, decayed product `(C B^T * L) x`, quadratic in `q` only;
what crosses chunk borders is one `(p, n)` state per head, carried by `linear_scan`. All heavy work is matrix
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.chunks import fold, pairwise_decay, reach
from mambakit.ops.linear_scan.chunked import linear_scan
from mambakit.ops.ssd import reference
from mambakit.ops.step_size import step_size

CHUNK = 64
"""Tokens per chunk: where the quadratic and the state products cost about the same at usual sizes."""


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
    """Chunked form of `mambakit.ops.ssd`."""
    batch, length, heads, p = x.shape
    if length == 1:
        return reference.ssd(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, dt_min, dt_max)
    groups, n = B.shape[2:]
    per_group = heads // groups
    q = min(CHUNK, length)
    c = -(-length // q)
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    A = A.to(work)
    skip = x
    dt = step_size(dt.to(work), dt_bias, dt_softplus, dt_min, dt_max)

    # Whole chunks; the padding has dt = 0: it neither decays the state nor adds to it.
    x, dt, B, C = (fold(t.to(work), c, q) for t in (x, dt, B, C))
    steps = (dt * A).permute(0, 1, 3, 2)  # (b, c, h, q), logarithms of the decays
    u = (x * dt.unsqueeze(-1)).transpose(2, 3)  # (b, c, h, q, p)
    B, C = (t.transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
    documents = None if seq_idx is None else fold(seq_idx, c, q, repeat_last=True)
    sees, from_entry = reach(documents, q, x.device)  # (..., q, q), (b, c, q)

    # Inside a chunk: masked, decayed attention.
    decay = pairwise_decay(steps)  # (b, c, h, q, q)
    attention = torch.where(sees, C @ B.mT, 0.0)  # (b, c, g, q, q)
    scores = attention.unsqueeze(3) * decay.unflatten(2, (groups, per_group))  # (b, c, g, h/g, q, q)
    y = scores.flatten(2, 3) @ u  # (b, c, h, q, p)

    # What each chunk leaves behind on its own, and what it passes on of the state it was given.
    until_end = torch.where(sees[..., -1, :], decay[..., -1, :], 0.0)  # (b, c, h, q)
    left = (u * until_end.unsqueeze(-1)).unflatten(2, (groups, per_group))  # (b, c, g, h/g, q, p)
    left = left.transpose(3, 4).flatten(4).mT @ B  # (b, c, g, h/g p, n)
    left = left.unflatten(3, (per_group, p)).flatten(2, 3)  # (b, c, h, p, n)
    since_entry = steps.cumsum(-1).exp()  # (b, c, h, q)
    if from_entry is not None:
        since_entry = torch.where(from_entry, since_entry, 0.0)
    entry = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state.to(work)
    passed = since_entry[..., -1, None, None].expand_as(left)
    states, final = linear_scan(passed, left, entry)
    entering = torch.cat([entry.unsqueeze(1), states[:, :-1]], dim=1)

    # What the entering state contributes to every token of the chunk.
    entering = entering.unflatten(2, (groups, per_group)).flatten(3, 4)  # (b, c, g, h/g p, n)
    carried = (C @ entering.mT).unflatten(-1, (per_group, p)).transpose(3, 4).flatten(2, 3)  # (b, c, h, q, p)
    y = torch.addcmul(y, carried, since_entry.unsqueeze(-1))

    y = y.transpose(2, 3).reshape(batch, c * q, heads, p)[:, :length]
    if D is not None:
        y = torch.addcmul(y, (D if D.dim() == 2 else D[:, None]).to(work), skip.to(work))
    return y.to(out_type), final
