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
    q = min(CHUNK, length)
    c = -(-length // q)
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    A = A.to(work)
    skip = x
    dt = step_size(dt.to(work), dt_bias, dt_softplus, dt_min, dt_max)

    # Whole chunks; the padding has dt = 0: it neither decays the state nor adds to it.
    x, dt, B, C = (_chunks(t.to(work), c, q) for t in (x, dt, B, C))
    x = x.view(batch, c, q, groups, heads // groups, p)
    steps = (dt * A).permute(0, 1, 3, 2).reshape(batch, c, groups, heads // groups, q)
    u = x * dt.view(batch, c, q, groups, heads // groups, 1)
    documents = None if seq_idx is None else _chunks(seq_idx, c, q, repeat_last=True)

    decay = _pairwise_decay(steps, documents)  # (b, c, g, h/g, q, q)
    scores = torch.einsum("bctgn,bcsgn->bcgts", C, B)[:, :, :, None] * decay
    y = torch.einsum("bcgrts,bcsgrp->bctgrp", scores, u)

    # State that each chunk leaves behind on its own, then the state entering each chunk.
    added = torch.einsum("bcsgn,bcgrs,bcsgrp->bcgrpn", B, decay[..., -1, :], u)
    since_entry = steps.cumsum(-1).exp()  # (b, c, g, h/g, q)
    if documents is not None:
        since_entry = since_entry * _reached_from_entry(documents, work)[:, :, None, None]
    entry = x.new_zeros(batch, heads, p, n) if initial_state is None else initial_state.to(work)
    entry = entry.view(batch, groups, heads // groups, p, n)
    passed = since_entry[..., -1, None, None].expand_as(added)
    left, final = linear_scan(passed, added, entry)
    entering = torch.cat([entry[:, None], left[:, :-1]], dim=1)
    y = y + torch.einsum("bctgn,bcgrpn,bcgrt->bctgrp", C, entering, since_entry)

    y = y.reshape(batch, c * q, heads, p)[:, :length]
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(work) * skip.to(work)
    return y.to(out_type), final.reshape(batch, heads, p, n)


def _chunks(tensor: Tensor, c: int, q: int, repeat_last: bool = False) -> Tensor:
    """Pad `(b, l, ...)` to `c q` tokens, with zeros or the last token, and fold it to `(b, c, q, ...)`."""
    batch, length, *rest = tensor.shape
    if c * q > length:
        missing = c * q - length
        padding = tensor[:, -1:].expand(-1, missing, *rest) if repeat_last else tensor.new_zeros(batch, missing, *rest)
        tensor = torch.cat([tensor, padding], dim=1)
    return tensor.reshape(batch, c, q, *rest)


def _pairwise_decay(steps: Tensor, documents: Tensor | None) -> Tensor:
    """`L[t, s] = exp(steps[s+1] + ... + steps[t])` for `s <= t` in one document, else 0.

    The sums are taken pair by pair (a masked cumulative sum) and not as differences of one running sum:
    that is exact for long decays, and no rounding of another document reaches a pair.
    """
    q = steps.shape[-1]
    index = torch.arange(q, device=steps.device)
    below = index[:, None] > index[None, :]
    sums = torch.where(below, steps[..., :, None], 0.0).cumsum(-2)
    allowed = index[:, None] >= index[None, :]
    if documents is not None:
        allowed = allowed & (documents[..., :, None] == documents[..., None, :])[:, :, None, None]
        allowed = allowed & (_border_count(documents)[..., :, None] == _border_count(documents)[..., None, :])[:, :, None, None]
    return torch.where(allowed, sums, -torch.inf).exp()


def _border_count(documents: Tensor) -> Tensor:
    """How many document borders lie before each token of its chunk `(b, c, q)`."""
    borders = torch.zeros_like(documents)
    borders[..., 1:] = documents[..., 1:] != documents[..., :-1]
    return borders.cumsum(-1)


def _reached_from_entry(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where a token continues the document that ended the chunk before, else 0: `(b, c, q)`."""
    same_as_before = torch.ones_like(documents[:, :, 0], dtype=torch.bool)
    same_as_before[:, 1:] = documents[:, 1:, 0] == documents[:, :-1, -1]
    return ((_border_count(documents) == 0) & same_as_before[..., None]).to(dtype)
