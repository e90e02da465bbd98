"""State space duality by chunks: attention-like products inside a chunk, a scan over chunk states.

Inside a chunk of `q` tokens the output is a masked, decayed product `(C B^T * L) x`, quadratic in `q` only;
what crosses chunk borders is one `(p, n)` state per head, carried by `linear_scan`. All heavy work is matrix
products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambakit.ops.chunks import fold, pairwise_decay, reach
from mambakit.ops.linear_scan.chunked import linear_scan
from mambakit.ops.ssd import reference

CHUNK = 64
"""Tokens per chunk: where the quadratic and the state products cost about the same at usual sizes."""


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
    """Chunked form of `mambakit.ops.ssd`."""
    batch, length, heads, p = x.shape
    if length == 1:
        return reference.ssd(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, dt_min, dt_max)
    n = B.shape[-1]
    q = min(CHUNK, length)
    c = -(-length // q)
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C = (t.to(work) for t in (x, dt, B, C))
    u, steps = reference.entering(x, dt, A, dt_bias, dt_softplus, dt_min, dt_max)

    # Whole chunks; in the padding nothing decays and nothing enters.
    u, steps, B, C = (fold(t, c, q) for t in (u, steps, B, C))
    documents = None if seq_idx is None else fold(seq_idx, c, q, repeat_last=True)
    entry = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state.to(work)
    y, final = by_chunks(u, steps, B, C, entry, documents)
    y = y[:, :length]
    if D is not None:
        y = torch.addcmul(y, (D if D.dim() == 2 else D[:, None]).to(work), x)
    return y.to(out_type), final


def by_chunks(
    u: Tensor,
    steps: Tensor,
    B: Tensor,
    C: Tensor,
    entry: Tensor,
    documents: Tensor | None = None,
    scan: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = linear_scan,
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(steps_t) h_{t-1} + u_t B_t^T`, `y_t = h_t C_t`, over whole chunks.

    Args:
        u: What enters `(b, c, q, h, p)`.
        steps: Logarithms of the decays `(b, c, q, h)`.
        B: Input vectors `(b, c, q, g, n)`.
        C: Output vectors `(b, c, q, g, n)`.
        entry: State before the first token `(b, h, p, n)`.
        documents: Document numbers `(b, c, q)`.
        scan: The recurrence over chunks: factors `(b, c, h, 1, 1)`, inputs `(b, c, h, p, n)` and entry to all
            states and the last one.

    Returns:
        Outputs `(b, c q, h, p)` and the final state `(b, h, p, n)`.
    """
    (q, heads, p), groups = u.shape[2:], B.shape[3]
    per_group = heads // groups
    steps, u = steps.transpose(2, 3), u.transpose(2, 3)  # (b, c, h, q), (b, c, h, q, p)
    B, C = (t.transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
    sees, from_entry = reach(documents, q, u.device)  # (..., q, q), (b, c, q)

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
    states, final = scan(since_entry[..., -1, None, None], left, entry)
    entering = torch.cat([entry.unsqueeze(1), states[:, :-1]], dim=1)

    # What the entering state contributes to every token of the chunk.
    entering = entering.unflatten(2, (groups, per_group)).flatten(3, 4)  # (b, c, g, h/g p, n)
    carried = (C @ entering.mT).unflatten(-1, (per_group, p)).transpose(3, 4).flatten(2, 3)  # (b, c, h, q, p)
    y = torch.addcmul(y, carried, since_entry.unsqueeze(-1))
    return y.transpose(2, 3).flatten(1, 2), final
