"""The recurrence of Mamba-3 by chunks: `ssd`'s blocks with other weights, over rotated keys and queries.

Unrolled, the trapezoid only changes the weight with which a token enters: `w_s dt_s` where it is read at
once, and `(1 - w_{s+1}) dt_{s+1}` more from the next token on. So a chunk is masked attention again,
between keys and queries that were rotated by angles accumulated beforehand. A rank takes a row of the chunk
like a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.chunks import fold, pairwise_decay, reach
from mambakit.ops.linear_scan.chunked import linear_scan
from mambakit.ops.shapes import same_document
from mambakit.ops.step_size import step_size
from mambakit.ops.trapezoidal import reference
from mambakit.ops.trapezoidal.reference import per_head, per_rank
from mambakit.ops.trapezoidal.rotation import rates, rotate, wrap

ROWS = 64
"""Rows of a chunk, tokens times ranks: where the quadratic and the state products cost about the same. Heads
with few channels and columns take half as many."""


def trapezoidal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_angle: Tensor | None = None,
    initial_ssm: Tensor | None = None,
    initial_k: Tensor | None = None,
    initial_v: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked form of `mambakit.ops.trapezoidal`; the state in parts, in and out."""
    initial = initial_angle, initial_ssm, initial_k, initial_v
    if x.shape[1] == 1:
        weights = B_bias, C_bias, mimo_x, D, dt_bias
        options = seq_idx, dt_softplus, interleaved
        return reference.trapezoidal(x, dt, A, B, C, trap, angles, *weights, *initial, *options)
    (batch, _, heads, p), (r, groups, n) = x.shape, B.shape[2:]
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C, trap, angles = (t.to(work) for t in (x, dt, A, B, C, trap, angles))
    dt, share = step_size(dt, dt_bias, dt_softplus), torch.sigmoid(trap)

    angle = _accumulate(angles, dt, initial_angle, seq_idx)  # (b, l, h, s)
    turn = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2), interleaved
    k = rotate(per_head(B, heads // groups, B_bias), *turn)  # (b, l, r, h, n)
    q = rotate(per_head(C, heads // groups, C_bias), *turn)
    v = per_rank(x, r, mimo_x)  # (b, l, r, h, p)

    entry = x.new_zeros(batch, heads, p, n) if initial_ssm is None else initial_ssm.to(work)
    before = (1 - share) * dt  # weight of the last token's input, (b, l, h)
    if initial_v is not None and initial_k is not None:
        last = torch.einsum("brhp,brhn->bhpn", per_rank(initial_v.to(work), r, mimo_x), initial_k.to(work))
        entry = entry + before[:, 0, :, None, None] * last
    if seq_idx is not None:
        before = torch.where(same_document(seq_idx).unsqueeze(-1), before, 0.0)
    y, ssm = _chunks(v, k, q, dt * A, share * dt, before, entry, seq_idx)
    if D is not None:
        y = torch.addcmul(y, D.to(work)[:, None], v)
    return y.to(out_type), angle[:, -1], ssm, k[:, -1], x[:, -1]


def _chunks(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    steps: Tensor,
    now: Tensor,
    before: Tensor,
    entry: Tensor,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over prepared keys, values and queries.

    Args:
        v: Inputs of each rank `(b, l, r, h, p)`.
        k: Rotated input vectors `(b, l, r, h, n)`.
        q: Rotated output vectors, likewise.
        steps: Logarithms of the decays `(b, l, h)`.
        now: Weight with which a token's own input enters `(b, l, h)`.
        before: Weight with which the last token's input enters once more, before the decay.
        entry: State before the first token, with what the token before it adds, `(b, h, p, n)`.
        seq_idx: Document numbers `(b, l)`.

    Returns:
        Outputs `(b, l, r, h, p)` and the final state `(b, h, p, n)`.
    """
    length, r, p, n = *v.shape[1:3], v.shape[-1], k.shape[-1]
    rows = ROWS if 4 * p * n >= ROWS * (p + n) else ROWS // 2
    size = min(max(1, rows // r), length)
    c = -(-length // size)
    # From the next token on, a token counts with what enters late as well.
    later = torch.cat([now[:, :-1] + before[:, 1:], now[:, -1:]], dim=1)
    # Whole chunks; in the padding nothing decays and nothing enters.
    v, k, q = (fold(t, c, size).movedim(4, 2).flatten(3, 4) for t in (v, k, q))  # (b, c, h, q r, ...)
    steps, now, later = (fold(t, c, size).transpose(2, 3) for t in (steps, now, later))  # (b, c, h, q)
    documents = None if seq_idx is None else fold(seq_idx, c, size, repeat_last=True)
    sees, from_entry = reach(documents, size, v.device)  # (..., q, q), (b, c, 1, q)

    # Inside a chunk: masked, decayed attention; a token reads of itself what enters at once.
    decay = pairwise_decay(steps)  # (b, c, h, q, q)
    itself = torch.eye(size, dtype=torch.bool, device=v.device)
    weights = torch.where(sees, decay * torch.where(itself, now.unsqueeze(-2), later.unsqueeze(-2)), 0.0)
    scores = (q @ k.mT).unflatten(-1, (size, r)).unflatten(-3, (size, r))  # (b, c, h, q, r, q, r)
    scores = (scores * weights[..., :, None, :, None]).flatten(-2).flatten(-3, -2)  # (b, c, h, q r, q r)
    y = scores @ v  # (b, c, h, q r, p)

    # What each chunk leaves behind on its own, and what it passes on of the state it was given.
    until_end = torch.where(sees[..., -1, :], decay[..., -1, :] * later, 0.0)  # (b, c, h, q)
    left = (v * until_end.repeat_interleave(r, dim=-1).unsqueeze(-1)).mT @ k  # (b, c, h, p, n)
    since_entry = steps.cumsum(-1).exp()  # (b, c, h, q)
    if from_entry is not None:
        since_entry = torch.where(from_entry, since_entry, 0.0)
    states, final = linear_scan(since_entry[..., -1, None, None].expand_as(left), left, entry)
    entering = torch.cat([entry.unsqueeze(1), states[:, :-1]], dim=1)

    # What the entering state contributes to every token of the chunk.
    y = torch.addcmul(y, q @ entering.mT, since_entry.repeat_interleave(r, dim=-1).unsqueeze(-1))
    y = y.unflatten(3, (size, r)).movedim(2, 4).flatten(1, 2)[:, :length]  # (b, l, r, h, p)
    return y, final


def _accumulate(angles: Tensor, dt: Tensor, start: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Angle of every token: the sum of the turns so far in its document, in `[-pi, pi]`.

    Added up in float64 where the device has it, so that differences of angles keep float32's digits, and so
    does the gradient, a sum over all later tokens.

    Args:
        angles: Raw rates `(b, l, s)`.
        dt: Step sizes `(b, l, h)`.
        start: Angles before the first token `(b, h, s)`.
        seq_idx: Document numbers `(b, l)`.

    Returns:
        Angles `(b, l, h, s)` in the type of `dt`.
    """
    wide = torch.float32 if dt.device.type == "mps" else torch.float64
    turns = wrap(rates(angles.to(wide), dt.to(wide)))  # (b, l, h, s)
    batch, length, *rest = turns.shape
    size = min(ROWS, length)
    c = -(-length // size)
    turns = fold(turns, c, size)  # (b, c, q, h, s)
    documents = None if seq_idx is None else fold(seq_idx, c, size, repeat_last=True)
    _, from_entry = reach(documents, size, turns.device)
    if seq_idx is None:
        sums = turns.cumsum(2)
    else:
        # Only its own document's turns are summed, so that no other document moves a bit.
        kept = same_document(documents.flatten(0, 1)).to(turns.dtype)[..., None, None]
        sums, _ = linear_scan(kept.expand_as(turns.flatten(0, 1)), turns.flatten(0, 1))
        sums = sums.unflatten(0, (batch, c))
        from_entry = from_entry.movedim(2, 3).unsqueeze(-1)  # (b, c, q, 1, 1)
    angle = turns.new_zeros(batch, *rest) if start is None else start.to(turns.dtype)
    entering = []
    for chunk in range(c):
        entering.append(angle)
        passed = angle if from_entry is None else torch.where(from_entry[:, chunk, -1], angle, 0.0)
        angle = wrap(passed + sums[:, chunk, -1])
    entered = torch.stack(entering, dim=1).unsqueeze(2)  # (b, c, 1, h, s)
    entered = entered if from_entry is None else torch.where(from_entry, entered, 0.0)
    return wrap(sums + entered).flatten(1, 2)[:, :length].to(dt.dtype)
