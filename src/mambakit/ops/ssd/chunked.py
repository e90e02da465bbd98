"""State space duality by chunks: attention-like products inside a chunk, a scan over chunk states.

Inside a chunk of `q` tokens the output is a masked, decayed product `(C B^T * L) x`, quadratic in `q` only;
what crosses chunk borders is one `(p, n)` state per head, carried by `linear_scan`. All heavy work is matrix
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    x, dt, B, C = (_chunks(t.to(work), c, q) for t in (x, dt, B, C))
    steps = (dt * A).permute(0, 1, 3, 2)  # (b, c, h, q), logarithms of the decays
    u = (x * dt.unsqueeze(-1)).transpose(2, 3)  # (b, c, h, q, p)
    B, C = (t.transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
    documents = None if seq_idx is None else _chunks(seq_idx, c, q, repeat_last=True)
    sees, from_entry = _reach(documents, q, x.device)  # (..., q, q), (b, c, q)

    # Inside a chunk: masked, decayed attention.
    decay = _pairwise_decay(steps)  # (b, c, h, q, q)
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


def _chunks(tensor: Tensor, c: int, q: int, repeat_last: bool = False) -> Tensor:
    """Pad `(b, l, ...)` to `c q` tokens, with zeros or the last token, and fold it to `(b, c, q, ...)`."""
    batch, length, *rest = tensor.shape
    if c * q > length:
        missing = c * q - length
        last = tensor[:, -1:].expand(-1, missing, *rest)
        tensor = torch.cat([tensor, last if repeat_last else torch.zeros_like(last)], dim=1)
    return tensor.reshape(batch, c, q, *rest)


def _pairwise_decay(steps: Tensor) -> Tensor:
    """`exp(steps[s+1] + ... + steps[t])` for `s <= t`; above the diagonal, where nothing is summed, 1.

    The sums are taken pair by pair (a masked cumulative sum) and not as differences of one running sum:
    that is exact for long decays, and no rounding of another document reaches a pair.
    """
    q = steps.shape[-1]
    below = torch.ones(q, q, dtype=torch.bool, device=steps.device).tril(-1)
    return torch.where(below, steps.unsqueeze(-1), 0.0).cumsum(-2).exp()


def _reach(documents: Tensor | None, q: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Which tokens reach which: inside a chunk (row sees column), and from the state entering it.

    Args:
        documents: Document numbers by chunk `(b, c, q)`, or `None` for a single document.
        q: Tokens per chunk.
        device: Where the masks live.

    Returns:
        `(q, q)` or `(b, c, 1, q, q)`: causal and no border in between; and `(b, c, 1, q)`: no border since
        the end of the chunk before, or `None` where there are no borders.
    """
    causal = torch.ones(q, q, dtype=torch.bool, device=device).tril()
    if documents is None:
        return causal, None
    borders = torch.zeros_like(documents)
    borders[..., 1:] = documents[..., 1:] != documents[..., :-1]
    borders = borders.cumsum(-1)
    continues = torch.ones_like(documents[..., :1], dtype=torch.bool)
    continues[:, 1:] = documents[:, 1:, :1] == documents[:, :-1, -1:]
    sees = causal & (borders.unsqueeze(-1) == borders.unsqueeze(-2))
    return sees.unsqueeze(2), ((borders == 0) & continues).unsqueeze(2)
