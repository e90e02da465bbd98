"""What attention remembers: past keys and values, as a functional state or as a cache written in place.

Unlike a recurrent state this one grows with every token, or up to the window. The functional form is plain
concatenation and differentiable. The in-place form is preallocated; a window turns it into a ring, in which
token `t` lies in slot `t mod capacity`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVState(NamedTuple):
    """Past tokens, oldest first.

    Attributes:
        k: Keys `(b, m, g, p)`.
        v: Values `(b, m, g, p)`.
        seq_idx: Document number of each `(b, m)`, integers.
    """

    k: Tensor
    v: Tensor
    seq_idx: Tensor


class KVCache(NamedTuple):
    """Room for past tokens, overwritten in place; all zeros means empty.

    Attributes:
        k: Keys `(b, capacity, g, p)`.
        v: Values `(b, capacity, g, p)`.
        seq_idx: Document number of each plus one `(b, capacity)`, so that 0 marks an empty slot.
        length: Tokens seen so far, all rows alike, `()`, int64. Its value is read on the host: keep it on the
            CPU, wherever the rest lives.
    """

    k: Tensor
    v: Tensor
    seq_idx: Tensor
    length: Tensor


def extend(past: KVState | None, k: Tensor, v: Tensor, seq_idx: Tensor | None, window: int | None) -> KVState:
    """Append new tokens to the past ones that they can reach.

    Args:
        past: Past tokens, or `None`.
        k: New keys `(b, l, g, p)`.
        v: New values `(b, l, g, p)`.
        seq_idx: Their documents `(b, l)`; `None` continues the last past document, or opens document 0.
        window: Keys that a query sees, itself included; `None` for all.

    Returns:
        Past and new tokens together, past ones first.
    """
    batch, length = k.shape[:2]
    if past is not None and window is not None:
        past = _last(past, window - 1)
    if seq_idx is None:
        known = past is not None and past.seq_idx.shape[1] > 0
        document = past.seq_idx[:, -1:].clamp(min=0) if known else _integers(k, batch, 1)
        seq_idx = document.expand(batch, length)
    return KVState(k, v, seq_idx) if past is None else _join(past, KVState(k, v, seq_idx))


def trim(tokens: KVState, window: int | None) -> KVState:
    """Keep what later queries can reach: everything, or the last `window - 1` tokens."""
    if window is None or tokens.k.shape[1] < window:
        return tokens
    return KVState(*(t.clone() for t in _last(tokens, window - 1)))  # a view would keep the rest alive


def extend_in_place(
    cache: KVCache, k: Tensor, v: Tensor, seq_idx: Tensor | None, window: int | None
) -> KVState:
    """Write new tokens into a cache and advance it; arguments and result as for `extend`.

    Gradients flow to the new keys and values but never into the cache.

    Raises:
        ValueError: The cache is too small for the sequence.
    """
    length, new, capacity = int(cache.length), k.shape[1], cache.k.shape[1]
    if length + new > capacity and (window is None or capacity < window):
        rolling = "" if window is None else f" (a window of {window} needs no more than {window})"
        raise ValueError(
            f"attention: the cache has capacity {capacity} and holds {length} tokens, "
            f"so it cannot take {new} more; make it with capacity >= {length + new}{rolling}"
        )
    reach = length if window is None else min(length, window - 1)
    if seq_idx is None:
        last = _read(cache, length - 1, 1).seq_idx if length else cache.seq_idx.new_zeros(k.shape[0], 1)
        stored = last.clamp(min=1).expand(-1, new)
    else:
        stored = seq_idx.to(cache.seq_idx.dtype) + 1

    tracked = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if reach + new <= capacity and not tracked:
        _write(cache, length, KVState(k, v, stored))
        tokens = _read(cache, length - reach, reach + new)
    else:
        past = _read(cache, length - reach, reach)
        tokens = _join(KVState(past.k.to(k.dtype), past.v.to(v.dtype), past.seq_idx), KVState(k, v, stored))
        kept = min(new, capacity)
        _write(cache, length + new - kept, _last(KVState(k.detach(), v.detach(), stored), kept))
    cache.length.add_(new)
    return tokens._replace(seq_idx=tokens.seq_idx - 1)


def _read(cache: KVCache, first: int, count: int) -> KVState:
    """Tokens `first` to `first + count - 1`: views where they lie together, else copies in order."""
    capacity = cache.k.shape[1]
    slot = first % capacity
    if slot + count <= capacity:
        return KVState(*(t[:, slot : slot + count] for t in cache[:3]))
    slots = torch.arange(slot, slot + count, device=cache.k.device) % capacity
    return KVState(*(t.index_select(1, slots) for t in cache[:3]))


def _write(cache: KVCache, first: int, tokens: KVState) -> None:
    """Store tokens from number `first` on."""
    capacity, count = cache.k.shape[1], tokens.k.shape[1]
    slot = first % capacity
    head = min(count, capacity - slot)
    for store, values in zip(cache[:3], tokens, strict=True):
        store[:, slot : slot + head] = values[:, :head]
        if head < count:
            store[:, : count - head] = values[:, head:]


def _join(past: KVState, new: KVState) -> KVState:
    """Concatenate in the past's types, which are those of the state from its first token on."""
    return KVState(*(torch.cat([a, b.to(a.dtype)], dim=1) for a, b in zip(past, new, strict=True)))


def _last(tokens: KVState, count: int) -> KVState:
    start = max(0, tokens.k.shape[1] - count)
    return KVState(*(t[:, start:] for t in tokens))


def _integers(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=like.device)
