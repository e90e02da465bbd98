"""The recurrence of Mamba-3, one token at a time: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops.shapes import same_document
from mambakit.ops.step_size import step_size
from mambakit.ops.trapezoidal.rotation import rates, rotate, wrap


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
    """Literal recurrence of `mambakit.ops.trapezoidal`; the state in parts, in and out."""
    (batch, length, heads, p), (r, groups, n) = x.shape, B.shape[2:]
    out_type, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C, trap, angles = (t.to(work) for t in (x, dt, A, B, C, trap, angles))
    dt, share = step_size(dt, dt_bias, dt_softplus), torch.sigmoid(trap)
    B, C = (per_head(M, heads // groups, bias) for M, bias in ((B, B_bias), (C, C_bias)))  # (b, l, r, h, n)
    keep = None if seq_idx is None else same_document(seq_idx)
    shapes = ((heads, angles.shape[-1]), (heads, p, n), (r, heads, n), (heads, p))
    state = [
        x.new_zeros(batch, *shape) if given is None else given.to(work)
        for given, shape in zip((initial_angle, initial_ssm, initial_k, initial_v), shapes, strict=True)
    ]
    ys = []
    for t in range(length):
        if keep is not None:
            state = [torch.where(keep[:, t].view(-1, *[1] * (s.dim() - 1)), s, 0.0) for s in state]
        angle, ssm, k, v = state
        angle = wrap(angle + rates(angles[:, t], dt[:, t]))
        turn = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1), interleaved
        step, w = dt[:, t, :, None, None], share[:, t, :, None, None]  # (b, h, 1, 1)
        ssm = torch.exp(step * A[:, t, :, None, None]) * (ssm + (1 - w) * step * outer(v, k, mimo_x))
        k, v = rotate(B[:, t], *turn), x[:, t]
        ssm = ssm + w * step * outer(v, k, mimo_x)
        y = torch.einsum("bhpn,brhn->brhp", ssm, rotate(C[:, t], *turn))
        ys.append(y if D is None else y + D.to(work)[:, None] * per_rank(v, r, mimo_x))
        state = [angle, ssm, k, v]
    return torch.stack(ys, dim=1).to(out_type), *state


def per_head(vectors: Tensor, heads_per_group: int, bias: Tensor | None) -> Tensor:
    """Vectors of each head: its group's, `(..., r, g, n)` to `(..., r, h, n)`, plus its bias `(h, r, n)`."""
    vectors = vectors.repeat_interleave(heads_per_group, dim=-2)
    return vectors if bias is None else vectors + bias.to(vectors.dtype).transpose(0, 1)


def per_rank(x: Tensor, r: int, mimo_x: Tensor | None) -> Tensor:
    """The inputs of each rank, `(..., h, p)` to `(..., r, h, p)`, by the factors `(h, r, p)`."""
    x = x.unsqueeze(-3)
    return (
        x.expand(*x.shape[:-3], r, *x.shape[-2:])
        if mimo_x is None
        else x * mimo_x.to(x.dtype).transpose(0, 1)
    )


def outer(v: Tensor, k: Tensor, mimo_x: Tensor | None) -> Tensor:
    """`sum_r x_r k_r^T`, `(b, h, p, n)`."""
    return torch.einsum("brhp,brhn->bhpn", per_rank(v, k.shape[1], mimo_x), k)
