"""`mamba_ssm.ops.selective_scan_interface`: the selective scan of Mamba-1, on `ops.selective_scan`.

Theirs is channels-first `(b, d, l)`, our operator channels-last: a transposed view of channels-last memory is
taken as it is, contiguous channels-first memory is copied once per tensor. Unlike theirs, the last state is
differentiable, and it runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit import ops


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective recurrence over a sequence; see `ops.selective_scan` for the formula.

    Args:
        u: Inputs `(b, d, l)`.
        delta: Step sizes `(b, d, l)`.
        A: Decay rates `(d, n)`.
        B: Input vectors `(b, n, l)`, `(b, g, n, l)`, or `(d, n)` for all tokens alike.
        C: Output vectors, as `B`.
        D: Skip weights `(d,)`.
        z: Gates `(b, d, l)`, before the SiLU.
        delta_bias: Added to `delta` `(d,)`.
        delta_softplus: Pass `delta + delta_bias` through softplus.
        return_last_state: Return the last state, too.

    Returns:
        Outputs `(b, d, l)`, and the last state `(b, d, n)` if asked for.

    Raises:
        ValueError: Shapes that do not fit.
        NotImplementedError: A complex `A`.
    """
    return _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, function="selective_scan_fn"
    )


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as `selective_scan_fn`, one token at a time."""
    return _scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        return_last_state,
        function="selective_scan_ref",
        backend="reference",
    )


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    *,
    function: str,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    refuse_complex(function, A=A, B=B, C=C)
    B, C = _channels_last(B, C, u, function)
    y, last = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        dt_softplus=delta_softplus,
        backend=backend,
    )
    y = y.transpose(1, 2)
    return (y, last) if return_last_state else y


def refuse_complex(function: str, **tensors: Tensor | None) -> None:
    """Refuse complex state spaces, which no operator of ours has.

    Raises:
        NotImplementedError: A complex tensor.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_complex():
            raise NotImplementedError(f"{function}: {name} is {tensor.dtype}, expected real numbers")


def _channels_last(B: Tensor, C: Tensor, u: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """`B` and `C` in any of their three shapes, as `(b, l, g, n)` with as many groups in both."""
    batch, _, length = u.shape
    found = []
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == 2:  # the same for all tokens, an own vector for every channel
            tensor = tensor.expand(batch, length, *tensor.shape)
        elif tensor.dim() == 3:
            tensor = tensor.transpose(1, 2).unsqueeze(2)
        elif tensor.dim() == 4:
            tensor = tensor.permute(0, 3, 1, 2)
        else:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}, expected (d, n), (b, n, l) "
                "or (b, g, n, l)"
            )
        found.append(tensor)
    groups = max(tensor.shape[2] for tensor in found)
    for name, tensor in zip("BC", found, strict=True):
        if groups % tensor.shape[2]:
            raise ValueError(f"{function}: {name} has {tensor.shape[2]} groups, the other one {groups}")
    B, C = (t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], dim=2) for t in found)
    return B, C


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba-1 block after its first projection: convolution, projections, scan, last projection.

    Args:
        xz: Stream and gate `(b, 2 d, l)`.
        conv1d_weight: Taps `(d, 1, w)`.
        conv1d_bias: `(d,)`.
        x_proj_weight: From the stream to step size, `B` and `C` `(r + 2 n, d)`; the part of one that is given
            may be missing.
        delta_proj_weight: From the bottleneck of the step size `(d, r)`.
        out_proj_weight: `(m, d)`.
        out_proj_bias: `(m,)`.
        A: Decay rates `(d, n)`.
        B: Input vectors in a shape of `selective_scan_fn`, in place of those from the stream.
        C: Output vectors, likewise.
        D: Skip weights `(d,)`.
        delta_bias: Added to the step sizes `(d,)`.
        B_proj_bias: Added to the projected `B` `(n,)`.
        C_proj_bias: Added to the projected `C` `(n,)`.
        delta_softplus: Pass step sizes through softplus.
        checkpoint_lvl: 0 or 1, how much theirs recomputes; no other result.
        b_rms_weight: RMS norm of `B` `(n,)`.
        c_rms_weight: RMS norm of `C` `(n,)`.
        dt_rms_weight: RMS norm of the step sizes after their projection `(d,)`.
        b_c_dt_rms_eps: Added to the mean square in these norms.

    Returns:
        Outputs `(b, l, m)`.

    Raises:
        ValueError: Shapes that do not fit, another `checkpoint_lvl`, or a bias of a `B` or `C` that is given.
        NotImplementedError: A complex `A`.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl is {checkpoint_lvl}, expected 0 or 1")
    refuse_complex("mamba_inner_fn", A=A, B=B, C=C)
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (b, l, d) each
    x, _ = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    projected = linear(x, x_proj_weight)  # step size first, B after it, C last
    dt = linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        dt = ops.norm(dt, dt_rms_weight, eps=b_c_dt_rms_eps)
    vectors = []
    for name, given, columns, bias, weight in (
        ("B", B, slice(rank, rank + n), B_proj_bias, b_rms_weight),
        ("C", C, slice(-n, None), C_proj_bias, c_rms_weight),
    ):
        if given is not None:
            if bias is not None or weight is not None:
                raise ValueError(f"mamba_inner_fn: {name} is given, so it has no projection's bias or norm")
            vectors.append(given)
            continue
        vector = projected[..., columns]
        vector = vector if bias is None else vector + bias.to(vector.dtype)
        vector = vector if weight is None else ops.norm(vector, weight, eps=b_c_dt_rms_eps)
        vectors.append(vector.transpose(1, 2))
    B, C = _channels_last(*vectors, xz[:, : x.shape[-1]], "mamba_inner_fn")
    y, _ = ops.selective_scan(x, dt, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus)
    return linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The same as `mamba_inner_fn`, one token at a time."""
    with ops.backend("reference"):
        return mamba_inner_fn(
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            out_proj_weight,
            out_proj_bias,
            A,
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` in the weight's type, or in autocast's."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
