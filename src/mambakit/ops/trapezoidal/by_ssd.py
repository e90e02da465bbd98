"""The recurrence of Mamba-3 as one run of `ssd`, and so by its kernels: C++ on CPUs, Triton on GPUs.

A token reads of itself what it enters with, `w_t dt_t x_t k_t^T`: a small product. All that came before obeys

    past_t = a_t past_{t-1} + a_t (w_{t-1} dt_{t-1} + (1 - w_t) dt_t) x_{t-1} k_{t-1}^T

since the trapezoid only lets a token count more from the next one on. That is `ssd` with the decays given,
and with inputs and keys one token late. Nothing is subtracted, so no digits are lost. A rank is a token of
`ssd` that decays nothing; of the keys that enter with it, it sees its own rank's and those before, and the
others are added. Keys and queries were rotated by angles accumulated beforehand, in PyTorch, which knows the
derivatives. They go to the kernel in float32, whatever the activations' type: an angle's gradient is a
difference of large sums, which keys rounded to bfloat16 leave with an error of some percent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.chunks import fold, reach
from mambakit.ops.linear_scan.chunked import linear_scan
from mambakit.ops.shapes import same_document
from mambakit.ops.ssd import ssd
from mambakit.ops.step_size import step_size
from mambakit.ops.trapezoidal import reference
from mambakit.ops.trapezoidal.reference import outer, per_head, per_rank
from mambakit.ops.trapezoidal.rotation import rates, rotate, wrap

CHUNK = 64
"""Tokens over which angles are summed before they are reduced to `[-pi, pi]`."""


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
    """`mambakit.ops.trapezoidal` by `mambakit.ops.ssd`; the state in parts, in and out."""
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

    now, before = share * dt, (1 - share) * dt  # weights of its own input and of the last one's, (b, l, h)
    steps, follows = dt * A, None if seq_idx is None else same_document(seq_idx)
    late = torch.exp(steps[:, 1:]) * (now[:, :-1] + before[:, 1:])  # of a token, read by the next one
    u, keys = v[:, :-1] * late[:, :, None, :, None], k[:, :-1]
    if follows is not None:  # nothing crosses a border, whatever it is
        kept = follows[:, 1:, None, None, None]
        u, keys = torch.where(kept, u, 0.0), torch.where(kept, keys, 0.0)

    # The first token's past is the state before it; the last token enters the state that is left.
    past = x.new_zeros(batch, heads, p, n) if initial_ssm is None else initial_ssm.to(work)
    if initial_v is not None and initial_k is not None:
        past = past + before[:, 0, :, None, None] * outer(initial_v.to(work), initial_k.to(work), mimo_x)
    past = torch.exp(steps[:, 0, :, None, None]) * past
    first = torch.einsum("bhpn,brhn->brhp", past, q[:, 0]).unsqueeze(1)
    if follows is not None:
        past = torch.where(follows[:, 1, None, None, None], past, 0.0)
    others, past = _past(u, steps[:, 1:], keys, q[:, 1:], past, seq_idx)
    y = torch.cat([first, others], dim=1) + _itself(v, now, k, q)
    ssm = past + now[:, -1, :, None, None] * outer(x[:, -1], k[:, -1], mimo_x)
    if D is not None:
        y = torch.addcmul(y, D.to(work)[:, None], v)
    return y.to(out_type), angle[:, -1], ssm, k[:, -1], x[:, -1]


def _past(
    u: Tensor, steps: Tensor, k: Tensor, q: Tensor, state: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What tokens read of those before them, by `ssd` with a token for each rank.

    Args:
        u: What the token before each enters with `(b, l, r, h, p)`, nothing across a border.
        steps: Logarithms of the tokens' decays `(b, l, h)`.
        k: Input vectors of the token before each `(b, l, r, h, n)`.
        q: Output vectors of the tokens, likewise.
        state: The state before them `(b, h, p, n)`.
        seq_idx: Document numbers `(b, l + 1)`, from one token earlier on.

    Returns:
        Outputs `(b, l, r, h, p)` and the final state `(b, h, p, n)`.
    """
    r = u.shape[2]
    seq_idx = None if seq_idx is None else seq_idx[:, 1:]
    if r == 1:
        y, final = ssd(u[:, :, 0], steps, None, k[:, :, 0], q[:, :, 0], initial_state=state, seq_idx=seq_idx)
        return y.unsqueeze(2), final
    steps = F.pad(steps.unsqueeze(2), (0, 0, 0, r - 1)).flatten(1, 2)
    seq_idx = None if seq_idx is None else seq_idx.repeat_interleave(r, dim=1)
    rows = (t.flatten(1, 2) for t in (k, q))
    y, final = ssd(u.flatten(1, 2), steps, None, *rows, initial_state=state, seq_idx=seq_idx)
    return y.unflatten(1, (-1, r)) + _read(q, k, u, unseen=True), final


def _itself(v: Tensor, now: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """What tokens read of themselves: `sum_s now (q_r k_s) v_s`, `(b, l, r, h, p)`."""
    if v.shape[2] == 1:
        return v * (now.unsqueeze(2) * torch.linalg.vecdot(q, k)).unsqueeze(-1)
    return _read(q, k, v * now[:, :, None, :, None])


def _read(q: Tensor, k: Tensor, u: Tensor, unseen: bool = False) -> Tensor:
    """`sum_s (q_r k_s) u_s` over the ranks of each token, or those after `r` only: `(b, l, r, h, p)`."""
    q, k, u = (t.transpose(2, 3).contiguous() for t in (q, k, u))  # (b, l, h, r, ...): whole matrices
    scores = q @ k.mT
    return ((scores.triu(1) if unseen else scores) @ u).transpose(2, 3)


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
    size = min(CHUNK, length)
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
