"""The selective state space model inside a Mamba-1 block: projections into dt, B and C, and the scan.

A part of its own because Mamba-1, the vision models' directions and the hybrids all hold one or several of
them. `dt` is projected through a bottleneck of `dt_rank`; its bias is a parameter of its own, added in
float32 inside the operator (published checkpoints call it `dt_proj.bias`).

Source: Gu and Dao, "Mamba" (2312.00752), sections 3.2 and 3.6.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mambakit import ops
from mambakit.layers import init
from mambakit.layers.norm import RMSNorm


class SelectiveSSM(nn.Module):
    """`y = SSM(A, B(x), C(x), dt(x))(x)`, gated by `silu(z)`.

    Args:
        d_inner: Channels `d`.
        d_state: States per channel `n`.
        dt_rank: Width `r` of the step size's bottleneck.
        dt_min: Least initial step size, in the time unit of `1 / A`.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        dt_init: `"random"`: uniform in plus or minus `dt_scale / sqrt(r)`; `"constant"`: that value.
        dt_scale: Scale of the initial step size projection.
        inner_norm: RMS norms of dt (before its projection), B and C: `"none"`, `"plain"` without weights as
            in Falcon Mamba, or `"learned"` as in Jamba.
        inner_norm_eps: Added to the mean square in them.
        device: Where the parameters live.
        dtype: Type of the projections; `A_log`, `D` and `dt_bias` are float32 or wider.
    """

    ssm_parameters: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        inner_norm: str = "none",
        inner_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scalar = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.split = (dt_rank, d_state, d_state)
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.x_proj = nn.Linear(d_inner, sum(self.split), bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=False, device=device, dtype=dtype)
        self.dt_bias = nn.Parameter(torch.empty(d_inner, device=device, dtype=scalar))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, device=device, dtype=scalar))
        self.D = nn.Parameter(torch.empty(d_inner, device=device, dtype=scalar))
        self.dt_norm, self.B_norm, self.C_norm = (
            nn.Identity()
            if inner_norm == "none"
            else RMSNorm(size, eps=inner_norm_eps, scale=inner_norm == "learned", device=device, dtype=dtype)
            for size in self.split
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: `A = -(1, ..., n)` (S4D-Real), `D = 1`, `dt` log-uniform."""
        self.x_proj.reset_parameters()
        for norm in (self.dt_norm, self.B_norm, self.C_norm):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        bound = self.dt_proj.in_features**-0.5 * self.dt_scale
        if self.dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            nn.init.constant_(self.dt_proj.weight, bound)
        init.dt_bias_(self.dt_bias, *self.dt_range)
        with torch.no_grad():
            n = self.A_log.shape[1]
            self.A_log.copy_(torch.arange(1, n + 1, dtype=self.A_log.dtype).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(
        self, x: Tensor, z: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Scan a sequence.

        Args:
            x: Inputs `(b, l, d)`.
            z: Gates `(b, l, d)`, before the SiLU.
            state: State `(b, d, n)`, overwritten in place.
            seq_idx: Document number of each token `(b, l)`.

        Returns:
            Outputs `(b, l, d)`.
        """
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)  # (b, l, r), (b, l, n), (b, l, n)
        dt, B, C = self.dt_proj(self.dt_norm(dt)), self.B_norm(B).unsqueeze(2), self.C_norm(C).unsqueeze(2)
        return self.scan(x, dt, B, C, z, state, seq_idx)

    def scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor | None,
        state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> Tensor:
        """Apply the recurrence to projected inputs; a variant of the recurrence overrides this."""
        A = -torch.exp(self.A_log)
        y, _ = ops.selective_scan(
            x, dt, A, B, C, self.D, z, self.dt_bias, dt_softplus=True, state=state, seq_idx=seq_idx
        )
        return y
