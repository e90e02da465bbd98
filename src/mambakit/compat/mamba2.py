"""`mamba_ssm.modules.mamba2.Mamba2`: the Mamba-2 block with their arguments and parameter names.

Differs from `mambakit.layers.Mamba2` by what theirs has beyond the published models: a gated MLP beside the
recurrence (`d_ssm`), a skip weight per channel (`D_has_hdim`), no norm (`rmsnorm=False`). Unlike theirs,
`cu_seqlens` and `dt_limit` hold on every path, and every projection is called as a module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit import ops
from mambakit.compat.conv import causal_conv1d_varlen_states
from mambakit.compat.documents import check_same_documents, seq_idx_of
from mambakit.compat.gated_norm import RMSNorm
from mambakit.compat.generation import InferenceParams, states_of
from mambakit.compat.mamba import convolve
from mambakit.compat.ssd import mamba_chunk_scan_combined
from mambakit.layers import init
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.mixer import recurrent_dtype


class Mamba2(nn.Module):
    """A Mamba-2 block.

    Args:
        d_model: Width of the residual stream, channels.
        d_state: State columns per head.
        d_conv: Width of the convolution, tokens.
        conv_init: Initial taps are uniform within this; as `nn.Conv1d`'s by default.
        expand: Inner channels per channel of the model.
        headdim: Channels per head.
        d_ssm: Inner channels that the recurrence has, the others being a gated MLP; all by default.
        ngroups: Groups of heads that share B and C.
        A_init_range: Initial decay rates are uniform in this range (as `-A`).
        D_has_hdim: A skip weight per channel instead of per head.
        rmsnorm: Whether the gated output is normalised.
        norm_before_gate: Normalise first and gate then.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        dt_limit: Step sizes are clamped to this range while running.
        bias: Whether the first and last projections have a bias.
        conv_bias: Whether the convolution has one.
        chunk_size: Tokens per chunk of their kernels; the result is the same.
        use_mem_eff_path: Which kernels theirs uses; ours is one path with the same result.
        layer_idx: Number under which states are kept.
        process_group: Only `None`.
        sequence_parallel: Says nothing without a `process_group`.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        ValueError: Sizes that do not fit.
        NotImplementedError: A `process_group`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("Mamba2: process_group is given, expected None: no tensor parallelism")
        init.check_dt_range(dt_min, dt_max)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.headdim, self.ngroups = headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads, rest = divmod(self.d_ssm, headdim)
        if rest or not 0 < self.d_ssm <= self.d_inner or self.nheads % ngroups:
            raise ValueError(
                f"Mamba2: d_ssm is {self.d_ssm}, expected a multiple of headdim={headdim} up to "
                f"{self.d_inner}, in heads divisible by ngroups={ngroups}"
            )
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size, self.layer_idx = tuple(dt_limit), chunk_size, layer_idx
        self.use_mem_eff_path, self.activation = use_mem_eff_path, "silu"
        made = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": recurrent_dtype(dtype or torch.get_default_dtype())}
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        d_mlp = self.d_inner - self.d_ssm
        self.split = (d_mlp, d_mlp, self.d_ssm, conv_dim, self.nheads)  # z0, x0, z, xBC, dt
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=bias, **made)
        self.conv1d = CausalConv1d(conv_dim, d_conv, bias=conv_bias, activation="silu", **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **made))
        init.dt_bias_(self.dt_bias, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.empty(self.nheads, **made).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **wide))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        if rmsnorm:
            groups = {"group_size": self.d_ssm // ngroups, "norm_before_gate": norm_before_gate}
            self.norm = RMSNorm(self.d_ssm, eps=1e-5, **groups, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix a sequence, or continue one by any number of tokens.

        Args:
            u: Activations `(b, l, d_model)`, or `(b l, d_model)` with `seqlen`.
            seqlen: `l`.
            seq_idx: Document number of each token `(b, l)`.
            cu_seqlens: Where each document of a single row begins `(documents + 1,)`. With
                `inference_params`, the states of all documents are kept, a row of the batch each.
            inference_params: Where the sequences stand; this layer's states in it are overwritten.

        Returns:
            Activations of the shape of `u`.

        Raises:
            ValueError: Shapes or documents that do not fit, or `seq_idx` while sequences are continued.
        """
        shape = u.shape
        u = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if cu_seqlens is not None:
            numbers = seq_idx_of(cu_seqlens, *u.shape[:2], "Mamba2")
            if seq_idx is not None:
                check_same_documents(seq_idx, numbers, "Mamba2")
            seq_idx = numbers
        if inference_params is None:
            y = self._mix(u, None, None, seq_idx)
        elif cu_seqlens is not None and inference_params.seqlen_offset == 0:
            states = states_of(self, inference_params, len(cu_seqlens) - 1)
            y = self._mix(u, *states, seq_idx, cu_seqlens)
        elif seq_idx is not None:
            raise ValueError("Mamba2: seq_idx or cu_seqlens is given, but states continue one sequence a row")
        else:
            y = self._mix(u, *states_of(self, inference_params, len(u)), None)
        return y.reshape(shape)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue sequences, states overwritten in place.

        Args:
            hidden_states: Activations `(b, l, d_model)`; theirs takes one token.
            conv_state: Last inputs of the convolution `(b, d + 2 g n, w)`.
            ssm_state: State of the recurrence `(b, h, p, n)`.

        Returns:
            Activations `(b, l, d_model)` and the two states.
        """
        return self._mix(hidden_states, conv_state, ssm_state, None), conv_state, ssm_state

    def _mix(
        self,
        u: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        z0, x0, z, xBC, dt = self.in_proj(u).split(self.split, dim=-1)
        if cu_seqlens is not None:
            conv_state.copy_(causal_conv1d_varlen_states(xBC[0], cu_seqlens, self.d_conv))
        xBC = convolve(self.conv1d, xBC, None if cu_seqlens is not None else conv_state, seq_idx)
        n = self.ngroups * self.d_state
        x, B, C = xBC.split((self.d_ssm, n, n), dim=-1)
        inputs = (
            x.unflatten(-1, (-1, self.headdim)),  # (b, l, h, p)
            dt,
            -torch.exp(self.A_log.to(recurrent_dtype(self.A_log.dtype))),
            B.unflatten(-1, (self.ngroups, -1)),  # (b, l, g, n)
            C.unflatten(-1, (self.ngroups, -1)),
        )
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
        scalars = {"dt_softplus": True, "dt_limit": self.dt_limit}
        if cu_seqlens is not None:
            scalars |= {"dt_bias": self.dt_bias, "cu_seqlens": cu_seqlens, "return_varlen_states": True}
            y, states = mamba_chunk_scan_combined(*inputs, self.chunk_size, D, **scalars)
            ssm_state.copy_(states)
        else:
            y, _ = ops.ssd(*inputs, D, self.dt_bias, state=ssm_state, seq_idx=seq_idx, **scalars)
        y = y.flatten(-2)
        y = self.norm(y, z) if self.rmsnorm else y * F.silu(z)
        return self.out_proj(y if self.split[0] == 0 else torch.cat([F.silu(z0) * x0, y], dim=-1))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Make empty states: `(b, d + 2 g n, w)` of the convolution and, float32 or wider, `(b, h, p, n)`."""
        device, dtype = self.out_proj.weight.device, dtype or self.conv1d.weight.dtype
        conv = torch.zeros(batch_size, self.d_conv, len(self.conv1d.weight), device=device, dtype=dtype)
        ssm = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv.transpose(1, 2), torch.zeros(ssm, device=device, dtype=recurrent_dtype(dtype))
