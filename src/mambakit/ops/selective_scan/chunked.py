"""The selective scan on top of the two-level linear scan, segment by segment.

Within a segment the `(b, l, d, n)` factors and inputs are built and handed to `linear_scan`. A segment is as
long as a fixed budget of elements allows, and is recomputed in the backward pass instead of stored, so that
memory beyond the inputs is one state per segment.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mambakit.ops.linear_scan.chunked import linear_scan
from mambakit.ops.selective_scan import reference
from mambakit.ops.step_size import step_size

SEGMENT_ELEMENTS = 2**26
"""Most elements of the expanded state that exist at once: 256 MiB in float32."""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Segmented form of `mambakit.ops.selective_scan`."""
    batch, length, d = x.shape
    if length == 1:
        return reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus)
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    A = A.to(work)
    state = x.new_zeros(batch, d, A.shape[1], dtype=work) if initial_state is None else initial_state.to(work)
    segment = max(64, SEGMENT_ELEMENTS // (batch * d * A.shape[1]))
    ys = []
    for start in range(0, length, segment):
        part = slice(start, start + segment)
        arguments = (x[:, part], dt[:, part], A, B[:, part], C[:, part], dt_bias, state)
        documents = None if seq_idx is None else _continuing(seq_idx, start, part)
        if torch.is_grad_enabled() and length > segment:
            y, state = checkpoint(
                _segment, *arguments, documents, dt_softplus, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, state = _segment(*arguments, documents, dt_softplus)
        ys.append(y)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
    y = y if D is None else y + D.to(work) * x.to(work)
    y = y if z is None else y * F.silu(z.to(work))
    return y.to(out_type), state


def _segment(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    state: Tensor,
    documents: tuple[Tensor, Tensor] | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, d = x.shape
    n, groups = A.shape[1], B.shape[2]
    x, dt, B, C = (t.to(A.dtype) for t in (x, dt, B, C))
    dt = step_size(dt, dt_bias, dt_softplus)
    # (b, l, g, d/g, n) lets B and C broadcast over the channels of their group.
    decay = torch.exp(dt[..., None] * A).view(batch, length, groups, d // groups, n)
    inputs = (dt * x).view(batch, length, groups, d // groups, 1) * B[:, :, :, None]
    state = state.view(batch, groups, d // groups, n)
    seq_idx = None
    if documents is not None:
        seq_idx, first = documents
        state = torch.where(first.view(-1, 1, 1, 1), state, torch.zeros_like(state))
    h, state = linear_scan(decay, inputs, state, seq_idx)
    y = torch.einsum("blgdn,blgn->blgd", h, C)
    return y.reshape(batch, length, d), state.reshape(batch, d, n)


def _continuing(seq_idx: Tensor, start: int, part: slice) -> tuple[Tensor, Tensor]:
    """The documents of a segment, and whether each row's first token continues the segment before."""
    before = seq_idx[:, max(start - 1, 0)]
    return seq_idx[:, part], before == seq_idx[:, start]
