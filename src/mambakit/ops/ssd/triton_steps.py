"""Triton kernels of the step sizes of state space duality, and of their derivative.

`prepare` turns raw step sizes into what the other kernels need of them: step sizes, and logarithms (powers of
two) of the decays from a chunk's entry, and to its end. `finish` collects what those kernels found for the
steps' gradients. Inside the other kernels the same would be computed again for every layout that Triton needs
it in.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)  # the logarithm of a decay across a document's border


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to the last digits: log(1 + w) = 2 atanh(w / (2 + w)), w = exp(-|x|) <= 1."""
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    r = s * s
    series = 1.0 / 13 + r * (1.0 / 15)
    series = 1.0 / 11 + r * series
    series = 1.0 / 9 + r * series
    series = 1.0 / 7 + r * series
    series = 1.0 / 5 + r * series
    series = 1.0 / 3 + r * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + r * series)


@triton.jit
def step_sizes(raw, dt_min, dt_max, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    steps = softplus(raw) if SOFTPLUS else raw
    return tl.minimum(tl.maximum(steps, dt_min), dt_max) if CLAMP else steps


@triton.jit
def _raw_steps(dt, dt_l, dt_h, dt_bias, heads, tokens, mask):
    """Raw step sizes (tokens, heads) with their bias, zero outside the mask."""
    raw = tl.load(dt + tokens[:, None] * dt_l + heads[None, :] * dt_h, mask=mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + heads[None, :], mask=mask, other=0.0)
    return raw


@triton.jit
def _add_within(a, a_begins, b, b_begins):
    return tl.where(b_begins > 0, b, a + b), a_begins | b_begins


@triton.jit
def prepare(
    dt, A, dt_bias, seq_idx, steps, logs, since, entry, end, total, borders,
    dt_b, dt_l, dt_h, length, h, chunks, dt_min, dt_max,
    Q: tl.constexpr, H: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """For H heads of a chunk, as (b, h, c, Q): step sizes, zero where there is no token; logarithms of the
    decay from the entry (`since`; from a later document's first token), from the entry to tokens of the
    document that enters (`entry`), and to the end from tokens of the document that leaves (`end`). As (b, h,
    c): of the whole chunk (`total`). As (b, c, Q): document borders up to each token, counted from the token
    before the chunk. Without A, `dt` is the natural logarithm of the decay: its power of two goes to `logs`,
    and to `steps` 1 where there is a token.
    """
    chunk, part, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.arange(0, Q)
    heads = part * H + tl.arange(0, H)
    begin = chunk * Q
    exists = t < length - begin
    mask = exists[:, None] & (heads[None, :] < h)
    rate = tl.zeros((H,), tl.float32) + LOG2E
    if A is not None:
        rate *= tl.load(A + heads, mask=heads < h, other=0.0)
    dt += row * dt_b + begin * dt_l
    raw = _raw_steps(dt, dt_l, dt_h, dt_bias, heads, t, mask)
    step = tl.where(mask, step_sizes(raw, dt_min, dt_max, SOFTPLUS, CLAMP), 0.0)
    by_token = step * rate[None, :]
    # The next token's, within the chunk: a sum without a token's own must not be a difference.
    has_next = mask & (t < Q - 1)[:, None] & (t + 1 < length - begin)[:, None]
    raw = _raw_steps(dt + dt_l, dt_l, dt_h, dt_bias, heads, t, has_next)
    next_step = tl.where(has_next, step_sizes(raw, dt_min, dt_max, SOFTPLUS, CLAMP), 0.0)
    to_end = tl.cumsum(next_step * rate[None, :], axis=0, reverse=True)
    from_entry = tl.cumsum(by_token, axis=0)
    whole = tl.sum(by_token, axis=0)

    at = ((row * h + heads) * chunks + chunk) * Q
    inside = heads[None, :] < h
    if A is None:
        tl.store(logs + at[None, :] + t[:, None], by_token, mask=inside)
        step = tl.where(mask, 1.0, 0.0)
    tl.store(steps + at[None, :] + t[:, None], step, mask=inside)
    if PACKED:
        seq_idx += row * length + begin
        here = tl.load(seq_idx + t, mask=exists, other=0)
        before = tl.load(seq_idx - 1 + t, mask=exists & (begin + t > 0), other=0)
        begins = tl.where(exists & (begin + t > 0) & (here != before), 1, 0)
        count = tl.cumsum(begins, axis=0)
        last = tl.max(count, axis=0)
        if part == 0:
            tl.store(borders + (row * chunks + chunk) * Q + t, count)
        # Documents are summed apart, so that none moves another by a rounding.
        new = tl.where(t > 0, begins, 0)[:, None] + tl.zeros((Q, H), tl.int32)
        own, _ = tl.associative_scan((by_token, new), 0, _add_within)
        tl.store(since + at[None, :] + t[:, None], own, mask=inside)
        from_entry = tl.where((count == 0)[:, None], from_entry, NEVER)
        to_end = tl.where((count == last)[:, None], to_end, NEVER)
        whole = tl.where(last == 0, whole, NEVER)
    tl.store(entry + at[None, :] + t[:, None], from_entry, mask=inside)
    tl.store(end + at[None, :] + t[:, None], to_end, mask=inside)
    tl.store(total + (row * h + heads) * chunks + chunk, whole, mask=heads < h)


@triton.jit
def finish(
    dt, A, dt_bias, steps, total, dsteps, dlogs, inflow, overlap, ddt, dA, ddt_bias,
    dt_b, dt_l, dt_h, length, h, chunks, cells, dt_min, dt_max,
    PARTS: tl.constexpr, Q: tl.constexpr, H: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw step sizes (b, l, h) and, by chunk, of A and of the bias (b, c, h).

    From what the other kernels found, as (b, h, c, Q) each: `dsteps`, of step sizes but by their decays;
    `dlogs`, of the decays' natural logarithms but through the state that enters; `inflow` (in PARTS, `cells`
    numbers apart), what each token reads from that state; and as (b, h, c), in PARTS, its `overlap` with the
    gradient of the state that leaves.
    """
    chunk, part, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.arange(0, Q)
    heads = part * H + tl.arange(0, H)
    begin = chunk * Q
    mask = (t < length - begin)[:, None] & (heads[None, :] < h)
    of_chunk = (row * h + heads) * chunks + chunk
    at = of_chunk[None, :] * Q + t[:, None]
    read = tl.zeros((Q, H), dtype=tl.float32)
    both = tl.zeros((H,), dtype=tl.float32)
    for i in range(PARTS):
        read += tl.load(inflow + i * cells * Q + at, mask=mask, other=0.0)
        both += tl.load(overlap + i * cells + of_chunk, mask=heads < h, other=0.0)
    # A decay before a token acts on all that passes it from the entry: to later tokens, and to the end.
    kept = tl.exp2(tl.load(total + of_chunk, mask=heads < h, other=0.0))
    dlog = (
        tl.load(dlogs + at, mask=mask, other=0.0)
        + tl.cumsum(read, axis=0, reverse=True)
        + (kept * both)[None, :]
    )
    dlog = tl.where(mask, dlog, 0.0)
    to = ddt + ((row * length + begin) * h + t[:, None] * h + heads[None, :])
    if A is None:
        tl.store(to, dlog.to(ddt.dtype.element_ty), mask=mask)
        return
    rate = tl.load(A + heads, mask=heads < h, other=0.0)
    found = tl.load(dsteps + at, mask=mask, other=0.0) + rate[None, :] * dlog
    raw = _raw_steps(dt + row * dt_b + begin * dt_l, dt_l, dt_h, dt_bias, heads, t, mask)
    if CLAMP:
        free = softplus(raw) if SOFTPLUS else raw
        found = tl.where((free >= dt_min) & (free <= dt_max), found, 0.0)
    if SOFTPLUS:
        found *= 1.0 / (1.0 + tl.exp(-raw))
    tl.store(to, found.to(ddt.dtype.element_ty), mask=mask)
    by_chunk = (row * chunks + chunk) * h + heads
    step = tl.load(steps + at, mask=mask, other=0.0)
    tl.store(dA + by_chunk, tl.sum(step * dlog, axis=0), mask=heads < h)
    tl.store(ddt_bias + by_chunk, tl.sum(tl.where(mask, found, 0.0), axis=0), mask=heads < h)
