"""`mamba_ssm.ops.triton.ssd_combined`: the recurrence of Mamba-2, on `ops.ssd`.

Layouts are those of our operator, so nothing is copied. Unlike theirs it runs on any device, honours
`cu_seqlens` and `dt_limit` everywhere, keeps states in float32 and has a derivative with each argument.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit import ops
from mambakit.compat.conv import activation_of
from mambakit.compat.documents import check_same_documents, seq_idx_of
from mambakit.compat.selective_scan import linear

_NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run the state space dual recurrence over a sequence; see `ops.ssd` for the formula.

    Args:
        x: Inputs `(b, l, h, p)`.
        dt: Step sizes `(b, l, h)`.
        A: Decay rates `(h,)`.
        B: Input vectors `(b, l, g, n)`.
        C: Output vectors `(b, l, g, n)`.
        chunk_size: Tokens per chunk of their kernels; ours choose their own, the result is the same.
        D: Skip weights `(h,)` or `(h, p)`.
        z: Gates `(b, l, h, p)`, before the SiLU.
        dt_bias: Added to `dt` `(h,)`.
        initial_states: State before the first token `(b, h, p, n)`, of the first document.
        seq_idx: Document number of each token `(b, l)`.
        cu_seqlens: Where each document of a single row begins `(documents + 1,)`; the same as its `seq_idx`.
        dt_softplus: Pass `dt + dt_bias` through softplus.
        dt_limit: Least and greatest step size after the softplus.
        return_final_states: Return the state after the last token, too.
        return_varlen_states: Return the state after the last token of every document of `cu_seqlens`, too.
        state_dtype: Type of the states that are returned; they are computed in float32 or wider anyway.

    Returns:
        Outputs `(b, l, h, p)`; then, if asked for, final states `(b, h, p, n)` and states of the documents
        `(documents, h, p, n)`.

    Raises:
        ValueError: Shapes that do not fit, `cu_seqlens` that are not these tokens or not the documents of
            `seq_idx`, `return_varlen_states` without `cu_seqlens`, or a chunk below one token.
    """
    if chunk_size < 1:
        raise ValueError(f"mamba_chunk_scan_combined: chunk_size is {chunk_size}, expected at least 1")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("mamba_chunk_scan_combined: return_varlen_states needs cu_seqlens")
    if cu_seqlens is not None:
        numbers = seq_idx_of(cu_seqlens, *x.shape[:2], "mamba_chunk_scan_combined")
        if seq_idx is not None:
            check_same_documents(seq_idx, numbers, "mamba_chunk_scan_combined")
        seq_idx = numbers
    scalars = {"dt_softplus": dt_softplus, "dt_limit": tuple(dt_limit)}
    if return_varlen_states:
        y, final, documents = _each_document(x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens, scalars)
    else:
        y, final = ops.ssd(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx=seq_idx, **scalars)
        documents = None
    y = y.contiguous() if z is None else y * F.silu(z)  # callers view it
    states = [final] if return_final_states else []
    states += [documents] if return_varlen_states else []
    if state_dtype is not None:
        states = [state.to(state_dtype) for state in states]
    return (y, *states) if states else y


def _each_document(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor,
    scalars: dict,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over documents one by one: outputs, the last document's state, and every one's."""
    bounds, ys, states = cu_seqlens.tolist(), [], []
    state = initial_states
    for start, end in itertools.pairwise(bounds):
        if start == end:  # no token: the state before it
            empty = x.new_zeros(
                1, *x.shape[2:], B.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32)
            )
            states.append(empty if state is None else state)
            continue
        parts = (t[:, start:end] for t in (x, dt))
        vectors = (t[:, start:end] for t in (B, C))
        y, after = ops.ssd(*parts, A, *vectors, D, dt_bias, state, **scalars)
        ys.append(y)
        states.append(after)
        state = None
    return torch.cat(ys, dim=1), states[-1], torch.cat(states)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` with fewer arguments."""
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 block after its first projection: convolution, recurrence, gated norm, last projection.

    Args:
        zxbcdt: `z, x, B, C, dt` side by side `(b, l, 2 d + 2 g n + h)` with `d = h p`; wider, the first `2 m`
            channels are `z0, x0`, and `silu(z0) * x0` comes first in what the last projection sees.
        conv1d_weight: Taps over `x, B, C` `(d + 2 g n, w)`.
        conv1d_bias: `(d + 2 g n,)`.
        dt_bias: Added to the step sizes `(h,)`, which then pass softplus.
        A: Decay rates `(h,)`.
        D: Skip weights `(h,)` or `(h, p)`.
        chunk_size: Tokens per chunk of their kernels; the result is the same.
        initial_states: State before the first token `(b, h, p, n)`; the convolution starts from zeros.
        seq_idx: Document number of each token `(b, l)`.
        dt_limit: Least and greatest step size after the softplus.
        return_final_states: Return the state after the last token, too.
        activation: Of the convolution: `None`, `"silu"` or `"swish"`.
        rmsnorm_weight: Weight of the RMS norm over each group's channels `(d,)`; without, there is the gate
            alone.
        rmsnorm_eps: Added to the mean square.
        outproj_weight: Last projection `(m, d)`.
        outproj_bias: Its bias `(m,)`.
        headdim: `p`; needed if `D` is `(h,)`.
        ngroups: Groups of heads that share `B` and `C`.
        norm_before_gate: `norm(y) * silu(z)` instead of `norm(y * silu(z))`.
        state_dtype: Type of the final states that are returned.

    Returns:
        Outputs `(b, l, m)`, and the final states `(b, h, p, n)` if asked for.

    Raises:
        ValueError: Shapes that do not fit, no `headdim` for a `D` of `(h,)`, a bias without a projection, or
            `chunk_size` below 1.
        NotImplementedError: Another activation.
    """
    where = "mamba_split_conv1d_scan_combined"
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"{where}: headdim is None, expected the channels per head as D has shape (h,)")
    if D.dim() == 2 and headdim not in (None, D.shape[1]):
        raise ValueError(f"{where}: headdim is {headdim}, but D has shape {tuple(D.shape)}")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError(f"{where}: outproj_bias is given, but outproj_weight is None")
    heads, headdim = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    d, xBC_size = heads * headdim, conv1d_weight.shape[0]
    n, rest = divmod(xBC_size - d, 2 * ngroups)
    extra, odd = divmod(zxbcdt.shape[-1] - d - xBC_size - heads, 2)
    if rest or odd or n < 1 or extra < 0:
        raise ValueError(
            f"{where}: zxbcdt has {zxbcdt.shape[-1]} channels and conv1d_weight {xBC_size}, expected "
            f"{2 * d + heads} + 2 g n and {d} + 2 g n for {heads} heads of {headdim} and g = {ngroups}"
        )
    z0, x0, z, xBC, dt = zxbcdt.split((extra, extra, d, xBC_size, heads), dim=-1)
    xBC, _ = ops.causal_conv1d(
        xBC, conv1d_weight, conv1d_bias, activation=activation_of(activation, where), seq_idx=seq_idx
    )
    x, B, C = xBC.split((d, ngroups * n, ngroups * n), dim=-1)
    y, *final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, n)),
        C.unflatten(-1, (ngroups, n)),
        chunk_size,
        D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        norm = {"eps": rmsnorm_eps, "group_size": d // ngroups, "norm_before_gate": norm_before_gate}
        y = ops.norm(y, rmsnorm_weight, z=z, **norm)
    y = y if extra == 0 else torch.cat([F.silu(z0) * x0, y], dim=-1)
    y = y if outproj_weight is None else linear(y, outproj_weight, outproj_bias)
    return (y, *final) if return_final_states else y
