"""`mamba_ssm.ops.triton.selective_state_update`: one token of a selective recurrence, in place.

One function serves Mamba-1, whose decay rates are a matrix, and Mamba-2, whose rates are one scalar per head.
The second is recognised as in theirs, by `A`, `dt` and `dt_bias` being expanded along channels and states,
and goes to `ops.ssd`; everything else to `ops.selective_scan`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mambakit import ops
from mambakit.compat.conv import on_rows
from mambakit.compat.selective_scan import refuse_complex


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Take one step of the recurrence and overwrite the state.

    Args:
        state: `(b, p, n)` or `(b, h, p, n)`, of any floating-point type; with `state_batch_indices`, a pool
            of such rows.
        x: Inputs `(b, p)` or `(b, h, p)`.
        dt: Step sizes, shaped as `x`.
        A: Decay rates `(p, n)` or `(h, p, n)`.
        B: Input vectors `(b, n)` or `(b, g, n)`; heads, or channels without heads, are split into `g` groups.
        C: Output vectors, as `B`.
        D: Skip weights `(p,)` or `(h, p)`.
        z: Gates before the SiLU, shaped as `x`.
        dt_bias: Added to `dt` `(p,)` or `(h, p)`.
        dt_softplus: Pass `dt + dt_bias` through softplus.
        state_batch_indices: Row of the pool that each sequence uses `(b,)`, integers; a negative one is
            padding: its output is 0 and no state changes.

    Returns:
        Outputs of the shape and type of `x`; differentiable in the inputs, not in the state.

    Raises:
        ValueError: Shapes that do not fit.
        NotImplementedError: A complex `A`.
    """
    refuse_complex("selective_state_update", state=state, A=A)
    if state_batch_indices is not None:
        return on_rows(
            lambda rows: selective_state_update(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus),
            state,
            state_batch_indices,
        )
    if state.dim() not in (3, 4) or x.dim() != state.dim() - 1:
        raise ValueError(
            f"selective_state_update: state {tuple(state.shape)} and x {tuple(x.shape)}, expected "
            "(b, p, n) with (b, p), or (b, h, p, n) with (b, h, p)"
        )
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))  # (b, g, n)
    if state.dim() == 4 and _is_one_rate_per_head(A, dt, dt_bias):
        step_bias = None if dt_bias is None else dt_bias[:, 0]
        y, _ = ops.ssd(
            x.unsqueeze(1),
            dt[:, None, :, 0],
            A[:, 0, 0],
            B.unsqueeze(1),
            C.unsqueeze(1),
            D,
            step_bias,
            dt_softplus=dt_softplus,
            state=state,
        )
        y = y.squeeze(1)
        return y if z is None else y * F.silu(z)
    flat = state if state.dim() == 3 else state.flatten(1, 2)  # (b, h p, n): a view of dense states
    x_, dt_, z_ = (None if t is None else t.flatten(1).unsqueeze(1) for t in (x, dt, z))  # (b, 1, h p)
    y, _ = ops.selective_scan(
        x_,
        dt_,
        A.reshape(-1, A.shape[-1]),
        B.unsqueeze(1),
        C.unsqueeze(1),
        None if D is None else D.reshape(-1),
        z_,
        None if dt_bias is None else dt_bias.reshape(-1),
        dt_softplus=dt_softplus,
        state=flat,
    )
    if flat.data_ptr() != state.data_ptr():
        state.copy_(flat.unflatten(1, state.shape[1:3]))
    return y.reshape(x.shape)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """The same as `selective_state_update`, by the operators' references."""
    with ops.backend("reference"):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _is_one_rate_per_head(A: Tensor, dt: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether nothing differs between the channels of a head: its tensors are expanded along them."""
    return A.stride()[-2:] == (0, 0) and dt.stride(-1) == 0 and (dt_bias is None or dt_bias.stride(-1) == 0)
