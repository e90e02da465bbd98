"""Attention through PyTorch's fused kernels, a block of queries at a time.

Plain causal attention over one document is one fused call. Everything else (packing, windows, past tokens)
needs a mask; it is built for one block of queries at a time and, with a window, for the keys in reach only,
so that memory stays linear in length. The heads of a group become further rows of its queries, which spares
copies of the keys and suits every kernel.

The fused kernels have no second derivative. float64 inputs take PyTorch's unfused form, which has; for
others, `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

BLOCK = 128
"""Queries per masked call: within 15% of the fused causal kernel's time on CPUs, and few enough calls."""

MASK_ELEMENTS = 2**26
"""Largest sum of all masks that training keeps for the backward pass; beyond, blocks are recomputed."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Blocked form of `mambakit.ops.attention`; arguments as in the reference."""
    batch, length = q.shape[:2]
    tokens = k.shape[1]
    window = None if window is not None and window >= tokens else window
    if documents is None and window is None and length == tokens:
        return _whole(q, k, v, causal and length > 1, scale)
    rows = length * q.shape[2] // k.shape[2] * (1 if documents is None else batch)
    span = tokens if window is None else min(tokens, window + BLOCK)
    recompute = torch.is_grad_enabled() and length > BLOCK and rows * span > MASK_ELEMENTS
    reach = tokens if window is None else window - 1  # keys on each side of a query
    ys = []
    for start in range(0, length, BLOCK):
        block = q[:, start : start + BLOCK]
        first = tokens - length + start  # position of the block's first query among the tokens
        low = max(0, first - reach)
        high = first + block.shape[1] + (0 if causal else reach)
        arguments = (block, k[:, low:high], v[:, low:high], documents, first, low, causal, window, scale)
        if recompute:
            ys.append(checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            ys.append(_block(*arguments))
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)


def _whole(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """All queries in one fused call, without a mask."""
    shared = q.shape[2] // k.shape[2]
    # On GPUs only the half-precision kernel takes shared keys; the unfused form would hold all scores.
    grouped = shared > 1 and (q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16))
    if shared > 1 and not grouped:
        k, v = (t.repeat_interleave(shared, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _fused(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    first: int,
    low: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Queries from position `first` on over the keys from position `low` on."""
    batch, length, heads, p = q.shape
    groups = k.shape[2]
    shared = heads // groups
    mask = _visible(first, length, low, k.shape[1], documents, causal, window, q.device)
    if mask is not None:
        mask = mask[:, None, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)  # (b or 1, 1, h/g q, m)
    rows = q.unflatten(2, (groups, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (b, g, h/g q, p)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (b, g, m, p)
    y = _fused(rows, k, v, attn_mask=mask, scale=scale)
    return y.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, p)


def _visible(
    first: int,
    length: int,
    low: int,
    tokens: int,
    documents: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Which of `tokens` keys from `low` on each of `length` queries sees: `(b or 1, q, m)`, or all."""
    queries = torch.arange(first, first + length, device=device)
    keys = torch.arange(low, low + tokens, device=device)
    distance = queries[:, None] - keys
    parts = []
    if causal and length > 1:  # the keys end with the block, so one query sees them all
        parts.append((distance >= 0)[None])
    if window is not None and (length > 1 or not causal):
        parts.append((distance.abs() < window)[None])
    if documents is not None:
        parts.append(documents[:, first : first + length, None] == documents[:, None, low : low + tokens])
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible


def _fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention over `(b, h, l, p)`: any kernel, or the twice differentiable one for float64."""
    if q.dtype == torch.float64:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)
