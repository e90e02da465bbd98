"""Triton kernels of state space duality: every product on the matrix units, every state in float32.

The step sizes and the logarithms of decays come from `triton_steps.py`.

The forward pass is one kernel: a program owns a head of a row and walks through its chunks of Q tokens
with the state in registers, so that no state but the last goes to memory. B C^T is computed again for every
head, which is cheaper than a pass over memory.

The backward pass is three. `states` walks the chunks twice, forwards for the state that enters each chunk
and backwards for the gradient of the one that leaves it, and writes both. `input_gradients` and
`matrix_gradients` are then parallel over chunks: a program loops over the heads that share a chunk's B and
C, so that B C^T is computed once, and the gradients of B and C are summed in registers. (Both in one kernel
need twice the registers there are.)

Where rows x heads fill no GPU, time is split into segments; `summarise` gives what a segment leaves behind
on its own, walking from the border that matters until all is forgotten, and every program folds the
summaries before its own.

Lengths: b batch, l tokens, h heads, p channels of a head, g groups, n states, c chunks of Q tokens; P and N
are p and n padded to powers of two. See MATH.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambakit.ops.ssd.triton_steps import LOG2E, NEVER, step_sizes

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GONE = tl.constexpr(-40.0)  # 2 to this power counts as nothing


@triton.jit
def _load(base, stride, exists, Q: tl.constexpr, size: tl.constexpr, SIZE: tl.constexpr):
    """Rows of a chunk (Q, SIZE), zero where there is no token or element. Offsets inside are 32 bits wide."""
    t, e = tl.arange(0, Q), tl.arange(0, SIZE)
    mask = exists[:, None] & (e[None, :] < size)
    return tl.load(base + (t[:, None] * stride + e[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(base, stride, values, exists, Q: tl.constexpr, size: tl.constexpr, SIZE: tl.constexpr):
    t, e = tl.arange(0, Q), tl.arange(0, SIZE)
    mask = exists[:, None] & (e[None, :] < size)
    tl.store(base + (t[:, None] * stride + e[None, :]), values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_state(base, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, P), tl.arange(0, N)
    inside = (i[:, None] < p) & (j[None, :] < n)
    return tl.load(base + (i[:, None] * n + j[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_state(base, state, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, P), tl.arange(0, N)
    inside = (i[:, None] < p) & (j[None, :] < n)
    tl.store(base + (i[:, None] * n + j[None, :]), state.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _fold(
    state, local, passed, begin, end, step, h,
    p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The state that enters a segment: fold the summaries (segments, h, ...) from `begin` towards `end`."""
    j = begin
    while j != end:
        decay = tl.exp2(tl.load(passed + j * h))
        own = _load_state(local + j * h * p * n, p, n, P, N)
        state = tl.where(decay == 0.0, own, decay * state + own)
        j += step
    return state


@triton.jit
def _rate(A, head):
    """What turns `logs` into powers of two: step sizes by A; without it they are that already."""
    return 1.0 if A is None else tl.load(A + head) * LOG2E


@triton.jit
def _pair_decays(
    logs, since, borders, at, rate,
    TO_ROWS: tl.constexpr, Q: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Decay (Q, Q) from each token to each one that sees it, the earlier token along columns or,
    with TO_ROWS, along rows.

    EXACT sums pair by pair. Differences of one running sum are cheaper but have only its absolute precision,
    enough for activations of 16 bits.
    """
    t = tl.arange(0, Q)
    if TO_ROWS:
        sees = t[:, None] <= t[None, :]
    else:
        sees = t[:, None] >= t[None, :]
    if PACKED:
        document = tl.load(borders + t)
        sees = sees & (document[:, None] == document[None, :])
    if EXACT:
        own = tl.load(logs + at + t) * rate
        if TO_ROWS:
            found = tl.cumsum(tl.where(t[None, :] > t[:, None], own[None, :], 0.0), axis=1)
        else:
            found = tl.cumsum(tl.where(t[:, None] > t[None, :], own[:, None], 0.0), axis=0)
    else:
        own = tl.load(since + at + t)
        found = own[None, :] - own[:, None] if TO_ROWS else own[:, None] - own[None, :]
    return tl.exp2(tl.where(sees, found, NEVER))


@triton.jit
def summarise(
    u, v, steps, entry, end, total, local, passed,
    u_b, u_l, u_h, v_b, v_l, v_g, length, h, heads_per_group, segment, segments, chunks,
    REVERSE: tl.constexpr, MONOTONE: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What a segment adds to a state that passes it, and the logarithm of what it keeps of it.

    Forwards (u, v = x, B) the state at its end; REVERSE (u, v = dy, C) the gradient at its start.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, part, row = pid % h, (pid // h) % segments, pid // h // segments
    t = tl.arange(0, Q)
    first = part * segment
    stop = tl.minimum(first + segment, length)
    count = (stop - first + Q - 1) // Q
    u += row * u_b + head * u_h
    v += row * v_b + (head // heads_per_group) * v_g
    state = tl.zeros((P, N), dtype=tl.float32)
    since = tl.full((), 0.0, tl.float32)  # logarithm of the decay up to the border that matters
    c = first * 0
    while (c < count) & (since > (GONE if MONOTONE else 0.1 * NEVER)):
        begin = first + (c if REVERSE else count - 1 - c) * Q
        at = (row * h + head) * chunks + begin // Q
        if REVERSE:
            weight = tl.exp2(since + tl.load(entry + at * Q + t))
        else:
            weight = tl.load(steps + at * Q + t) * tl.exp2(since + tl.load(end + at * Q + t))
        exists = t < stop - begin
        u_chunk = _load(u + begin * u_l, u_l, exists, Q, p, P)
        v_chunk = _load(v + begin * v_l, v_l, exists, Q, n, N)
        weighted = (u_chunk * weight[:, None]).to(u_chunk.dtype)
        state += _product(tl.trans(weighted), v_chunk, PRECISION)
        since += tl.load(total + at)
        c += 1
    where = (row * segments + part) * h + head
    _store_state(local + where * p * n, state, p, n, P, N)
    tl.store(passed + where, tl.where(since > GONE, since, NEVER) if MONOTONE else since)


@triton.jit
def forward(
    x, B, C, A, D, steps, logs, since, entry, end, total, borders, initial, y, final, local, passed,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_h, D_p,
    length, h, heads_per_group, segment, segments, chunks,
    Q: tl.constexpr, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and the final state, chunk after chunk."""
    pid = tl.program_id(0).to(tl.int64)
    head, part, row = pid % h, (pid // h) % segments, pid // h // segments
    t, i = tl.arange(0, Q), tl.arange(0, P)
    rate = _rate(A, head)
    first = part * segment
    stop = tl.minimum(first + segment, length)
    x += row * x_b + head * x_h
    y += (row * length * h + head) * p
    B += row * B_b + (head // heads_per_group) * B_g
    C += row * C_b + (head // heads_per_group) * C_g
    if D is not None:
        skip = tl.load(D + head * D_h + i * D_p, mask=i < p, other=0.0)
    if initial is not None:
        state = _load_state(initial + (row * h + head) * p * n, p, n, P, N)
    else:
        state = tl.zeros((P, N), dtype=tl.float32)
    if segments > 1:
        mine = row * segments * h + head
        state = _fold(state, local + mine * p * n, passed + mine, part * 0, part, 1, h, p, n, P, N)

    for begin in range(first, stop, Q):
        at = (row * h + head) * chunks + begin // Q
        exists = t < stop - begin
        x_chunk = _load(x + begin * x_l, x_l, exists, Q, p, P)
        B_chunk = _load(B + begin * B_l, B_l, exists, Q, n, N)
        C_chunk = _load(C + begin * C_l, C_l, exists, Q, n, N)
        step = tl.load(steps + at * Q + t)

        # What the state that enters still says, then what the chunk's own tokens say.
        out = _product(C_chunk, tl.trans(state.to(x_chunk.dtype)), PRECISION)
        out *= tl.exp2(tl.load(entry + at * Q + t))[:, None]
        scores = _product(C_chunk, tl.trans(B_chunk), PRECISION)  # (Q, Q)
        own = borders + (row * chunks + begin // Q) * Q if PACKED else borders
        scores *= _pair_decays(logs, since, own, at * Q, rate, False, Q, PACKED, EXACT)
        scores *= step[None, :]
        out += _product(scores.to(x_chunk.dtype), x_chunk, PRECISION)
        if D is not None:
            out += x_chunk.to(tl.float32) * skip[None, :]
        _store(y + begin * h * p, h * p, out, exists, Q, p, P)

        kept = tl.exp2(tl.load(total + at))
        weight = step * tl.exp2(tl.load(end + at * Q + t))
        state = tl.where(kept == 0.0, 0.0, state * kept)
        state += _product(tl.trans((x_chunk * weight[:, None]).to(x_chunk.dtype)), B_chunk, PRECISION)

    if part == segments - 1:
        _store_state(final + (row * h + head) * p * n, state, p, n, P, N)


@triton.jit
def states(
    x, dy, B, C, steps, entry, end, total, initial, dfinal, entering, leaving, dinitial,
    local, passed, dlocal, dpassed,
    x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g,
    length, h, heads_per_group, segment, segments, chunks,
    Q: tl.constexpr, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that enters every chunk (program axis 1 = 0), or the gradient of the one leaving it (1)."""
    pid = tl.program_id(0).to(tl.int64)
    head, part, row = pid % h, (pid // h) % segments, pid // h // segments
    t = tl.arange(0, Q)
    first = part * segment
    stop = tl.minimum(first + segment, length)
    count = (stop - first + Q - 1) // Q
    group = head // heads_per_group
    mine = row * segments * h + head
    reverse = tl.program_id(1) == 1
    state = tl.zeros((P, N), dtype=tl.float32)
    if reverse:
        u, u_l = dy + row * dy_b + head * dy_h, dy_l
        v, v_l = C + row * C_b + group * C_g, C_l
        out, logs = leaving, entry
        state = _load_state(dfinal + (row * h + head) * p * n, p, n, P, N)
        if segments > 1:
            from_end = part * 0 + segments - 1
            state = _fold(state, dlocal + mine * p * n, dpassed + mine, from_end, part, -1, h, p, n, P, N)
    else:
        u, u_l = x + row * x_b + head * x_h, x_l
        v, v_l = B + row * B_b + group * B_g, B_l
        out, logs = entering, end
        if initial is not None:
            state = _load_state(initial + (row * h + head) * p * n, p, n, P, N)
        if segments > 1:
            state = _fold(state, local + mine * p * n, passed + mine, part * 0, part, 1, h, p, n, P, N)

    for c in range(0, count):
        begin = first + tl.where(reverse, count - 1 - c, c) * Q
        where = (row * chunks + begin // Q) * h + head
        at = (row * h + head) * chunks + begin // Q
        exists = t < stop - begin
        _store_state(out + where * p * n, state, p, n, P, N)
        u_chunk = _load(u + begin * u_l, u_l, exists, Q, p, P)
        v_chunk = _load(v + begin * v_l, v_l, exists, Q, n, N)
        weight = tl.exp2(tl.load(logs + at * Q + t))
        weight *= tl.where(reverse, 1.0, tl.load(steps + at * Q + t))
        kept = tl.exp2(tl.load(total + at))
        state = tl.where(kept == 0.0, 0.0, state * kept)
        state += _product(tl.trans((u_chunk * weight[:, None]).to(u_chunk.dtype)), v_chunk, PRECISION)

    if dinitial is not None:
        if reverse & (part == 0):
            _store_state(dinitial + (row * h + head) * p * n, state, p, n, P, N)


@triton.jit
def input_gradients(
    x, dy, B, C, A, D, steps, logs, since, end, borders, leaving, dx, dsteps, dlogs, dD,
    x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g, D_h, D_p,
    length, h, groups, heads_per_group, heads_together, chunks,
    Q: tl.constexpr, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs, step sizes and decays, for some of the heads that share its B and C.

    Pairs of tokens are laid out (Q, Q) with the earlier one along rows, as the inputs' gradients need them.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts = (heads_per_group + heads_together - 1) // heads_together
    part, rest = pid % parts, pid // parts
    group, rest = rest % groups, rest // groups
    chunk, row = rest % chunks, rest // chunks
    begin = chunk * Q
    t, i = tl.arange(0, Q), tl.arange(0, P)
    exists = t < length - begin
    # For each token (column), 1 at itself and those after it; through float32, as the interpreter casts no
    # truth value to bf16.
    after = (t[:, None] >= t[None, :]).to(tl.float32).to(x.dtype.element_ty)
    if PACKED:
        borders += (row * chunks + chunk) * Q
    x += row * x_b + begin * x_l
    dy += row * dy_b + begin * dy_l
    dx += (row * length + begin) * h * p
    B_chunk = _load(B + row * B_b + group * B_g + begin * B_l, B_l, exists, Q, n, N)
    C_chunk = _load(C + row * C_b + group * C_g + begin * C_l, C_l, exists, Q, n, N)
    scores = _product(B_chunk, tl.trans(C_chunk), PRECISION)  # (Q, Q)

    head_0 = group * heads_per_group + part * heads_together
    head_1 = tl.minimum(head_0 + heads_together, (group + 1) * heads_per_group)
    for head in range(head_0, head_1):
        where = (row * chunks + chunk) * h + head
        at = ((row * h + head) * chunks + chunk) * Q
        x_chunk = _load(x + head * x_h, x_l, exists, Q, p, P)
        dy_chunk = _load(dy + head * dy_h, dy_l, exists, Q, p, P)
        dstate = _load_state(leaving + where * p * n, p, n, P, N)
        step = tl.load(steps + at + t)
        rate = _rate(A, head)

        # Pairs of tokens inside the chunk, and the decays that each token's pairs pass.
        weights = scores * _pair_decays(logs, since, borders, at, rate, True, Q, PACKED, EXACT)
        pairs = _product(x_chunk, tl.trans(dy_chunk), PRECISION) * weights * step[:, None]
        spanning = _product(pairs.to(x_chunk.dtype), after, PRECISION)
        dlog = tl.sum(tl.where(t[:, None] < t[None, :], spanning, 0.0), axis=0)

        # Inputs: through the state that leaves, and through later outputs.
        dinput = _product(B_chunk, tl.trans(dstate), PRECISION) * tl.exp2(tl.load(end + at + t))[:, None]
        x_wide = x_chunk.to(tl.float32)
        outflow = step * tl.sum(dinput * x_wide, axis=1)
        dinput += _product(weights.to(x_chunk.dtype), dy_chunk, PRECISION)
        tl.store(dsteps + at + t, tl.sum(dinput * x_wide, axis=1))
        dinput *= step[:, None]
        if D is not None:
            dy_wide = dy_chunk.to(tl.float32)
            dinput += dy_wide * tl.load(D + head * D_h + i * D_p, mask=i < p, other=0.0)[None, :]
            tl.store(dD + where * p + i, tl.sum(dy_wide * x_wide, axis=0), mask=i < p)
        _store(dx + head * p, h * p, dinput, exists, Q, p, P)

        # A token's decay acts on all that passes it: inside, and to the end (see `finish` for the entry).
        tl.store(dlogs + at + t, dlog + (tl.cumsum(outflow, axis=0) - outflow))


@triton.jit
def matrix_gradients(
    x, dy, B, C, A, steps, logs, since, entry, end, borders, entering, leaving, dB, dC, inflow, overlap,
    x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g,
    batch, length, h, groups, heads_per_group, heads_together, chunks,
    Q: tl.constexpr, p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's B and C, for S of its states (program axis 1), over some of the heads that
    share them; and for each head what it reads from the state that enters, and that state's overlap with
    `leaving`.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts = (heads_per_group + heads_together - 1) // heads_together
    part, rest = pid % parts, pid // parts
    group, rest = rest % groups, rest // groups
    chunk, row = rest % chunks, rest // chunks
    begin = chunk * Q
    t, i, j = tl.arange(0, Q), tl.arange(0, P), tl.program_id(1) * S + tl.arange(0, S)
    exists = t < length - begin
    in_B = exists[:, None] & (j[None, :] < n)
    cells, in_state = i[:, None] * n + j[None, :], (i[:, None] < p) & (j[None, :] < n)
    if PACKED:
        borders += (row * chunks + chunk) * Q
    x += row * x_b + begin * x_l
    dy += row * dy_b + begin * dy_l
    dscores = tl.zeros((Q, Q), dtype=tl.float32)
    dB_sum = tl.zeros((Q, S), dtype=tl.float32)
    dC_sum = tl.zeros((Q, S), dtype=tl.float32)

    head_0 = group * heads_per_group + part * heads_together
    head_1 = tl.minimum(head_0 + heads_together, (group + 1) * heads_per_group)
    B += row * B_b + group * B_g + begin * B_l
    C += row * C_b + group * C_g + begin * C_l
    C_chunk = tl.load(C + (t[:, None] * C_l + j[None, :]), mask=in_B, other=0.0)
    for head in range(head_0, head_1):
        where = ((row * chunks + chunk) * h + head) * p * n
        at = ((row * h + head) * chunks + chunk) * Q
        x_chunk = _load(x + head * x_h, x_l, exists, Q, p, P)
        dy_chunk = _load(dy + head * dy_h, dy_l, exists, Q, p, P)
        state = tl.load(entering + where + cells, mask=in_state, other=0.0)
        dstate = tl.load(leaving + where + cells, mask=in_state, other=0.0)
        step = tl.load(steps + at + t)
        rate = _rate(A, head)
        decays = _pair_decays(logs, since, borders, at, rate, True, Q, PACKED, EXACT)
        dscores += _product(x_chunk, tl.trans(dy_chunk), PRECISION) * decays * step[:, None]
        read = (dy_chunk * tl.exp2(tl.load(entry + at + t))[:, None]).to(x_chunk.dtype)
        written = (x_chunk * (tl.exp2(tl.load(end + at + t)) * step)[:, None]).to(x_chunk.dtype)
        dB_sum += _product(written, dstate, PRECISION)
        reads = _product(read, state, PRECISION)
        dC_sum += reads
        part_of = tl.program_id(1).to(tl.int64) * batch * h * chunks
        tl.store(inflow + part_of * Q + at + t, tl.sum(reads * C_chunk, axis=1))
        shared = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1), axis=0)
        tl.store(overlap + part_of + at // Q, shared)

    B_chunk = tl.load(B + (t[:, None] * B_l + j[None, :]), mask=in_B, other=0.0)
    dscores = dscores.to(B_chunk.dtype)
    dB_sum += _product(dscores, C_chunk, PRECISION)
    dC_sum += _product(tl.trans(dscores), B_chunk, PRECISION)
    to = (((part * batch + row) * length + begin) * groups + group) * n + t[:, None] * groups * n + j[None, :]
    tl.store(dB + to, dB_sum, mask=in_B)
    tl.store(dC + to, dC_sum, mask=in_B)


@triton.jit
def step(
    x, dt, A, B, C, D, dt_bias, initial, y, final,
    x_b, x_h, dt_b, dt_h, B_b, B_g, C_b, C_g, D_h, D_p,
    h, heads_per_group, dt_min, dt_max,
    p: tl.constexpr, n: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """One token: the state is read, moved on and written back."""
    pid = tl.program_id(0).to(tl.int64)
    head, row = pid % h, pid // h
    i, j = tl.arange(0, P), tl.arange(0, N)
    raw = tl.load(dt + row * dt_b + head * dt_h).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head)
    steps = step_sizes(raw, dt_min, dt_max, SOFTPLUS, CLAMP)
    group = head // heads_per_group
    x_t = tl.load(x + row * x_b + head * x_h + i, mask=i < p, other=0.0).to(tl.float32)
    B_t = tl.load(B + row * B_b + group * B_g + j, mask=j < n, other=0.0).to(tl.float32)
    C_t = tl.load(C + row * C_b + group * C_g + j, mask=j < n, other=0.0).to(tl.float32)
    rate = LOG2E if A is None else tl.load(A + head) * LOG2E
    decay = tl.exp2(steps * rate)
    u_t = x_t if A is None else steps * x_t
    state = u_t[:, None] * B_t[None, :]
    if initial is not None:
        state += decay * _load_state(initial + (row * h + head) * p * n, p, n, P, N).to(tl.float32)
    out = tl.sum(state * C_t[None, :], axis=1)
    if D is not None:
        out += x_t * tl.load(D + head * D_h + i * D_p, mask=i < p, other=0.0)
    _store_state(final + (row * h + head) * p * n, state, p, n, P, N)
    tl.store(y + (row * h + head) * p + i, out.to(y.dtype.element_ty), mask=i < p)
