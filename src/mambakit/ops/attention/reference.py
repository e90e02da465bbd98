"""Attention, one query at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Literal formula of `mambakit.ops.attention` once the past is in front of the new tokens.

    Args:
        q: Queries `(b, l, h, p)` of the last `l` tokens.
        k: Keys `(b, m, g, p)` of all tokens.
        v: Values `(b, m, g, p)`.
        documents: A number per document of each row `(b, m)`; `None` where there is only one.
        causal: Whether a token sees only itself and earlier ones.
        window: How many tokens back a query sees, itself included.
        scale: Factor on the scores.

    Returns:
        Outputs `(b, l, h, p)`.
    """
    length, heads, tokens = q.shape[1], q.shape[2], k.shape[1]
    out_type, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q = q.to(work)
    k, v = (t.to(work).repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    window = tokens if window is None else window
    ys = []
    for t in range(tokens - length, tokens):
        seen = slice(max(0, t - window + 1), t + 1 if causal else t + window)
        scores = scale * torch.einsum("bhp,bshp->bhs", q[:, t - (tokens - length)], k[:, seen])
        if documents is not None:
            same = documents[:, seen] == documents[:, t, None]
            scores = scores.masked_fill(~same[:, None], -torch.inf)
        ys.append(torch.einsum("bhs,bshp->bhp", scores.softmax(-1), v[:, seen]))
    return torch.stack(ys, dim=1).to(out_type)
