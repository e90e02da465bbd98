"""Cutting time into chunks: what chunked forms of operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(tensor: Tensor, c: int, q: int, repeat_last: bool = False) -> Tensor:
    """Pad `(b, l, ...)` to `c q` tokens, with zeros or the last token, and fold it to `(b, c, q, ...)`."""
    batch, length, *rest = tensor.shape
    if c * q > length:
        missing = c * q - length
        last = tensor[:, -1:].expand(-1, missing, *rest)
        tensor = torch.cat([tensor, last if repeat_last else torch.zeros_like(last)], dim=1)
    return tensor.reshape(batch, c, q, *rest)


def pairwise_decay(steps: Tensor) -> Tensor:
    """`exp(steps[s+1] + ... + steps[t])` for `s <= t`; above the diagonal, where nothing is summed, 1.

    The sums are taken pair by pair (a masked cumulative sum) and not as differences of one running sum:
    that is exact for long decays, and no rounding of another document reaches a pair.
    """
    q = steps.shape[-1]
    below = torch.ones(q, q, dtype=torch.bool, device=steps.device).tril(-1)
    return torch.where(below, steps.unsqueeze(-1), 0.0).cumsum(-2).exp()


def reach(documents: Tensor | None, q: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
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
