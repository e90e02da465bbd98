"""Mamba-1 with eigenvalues in [-1, 1]: the smallest change that lets it track states.

A decay in (0, 1) can only fade; parity needs a state that flips its sign. Here the transition is
`2 exp(dt A) - 1` instead of `exp(dt A)`, everything else is Mamba-1.

Source: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (2411.12537).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit import ops
from mambakit.layers.mamba1 import Mamba1, Mamba1Config
from mambakit.layers.mixer import recurrent_dtype
from mambakit.layers.selective_ssm import SelectiveSSM
from mambakit.ops.step_size import step_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignedMamba1Config(Mamba1Config, tag="signed_mamba1"):
    """Settings of a Mamba-1 mixer with eigenvalues in [-1, 1]; the same as Mamba-1's."""


class SignedSelectiveSSM(SelectiveSSM):
    """Selective SSM with transition `2 exp(dt A) - 1`; arguments as for `SelectiveSSM`."""

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
        """Apply `h_t = (2 exp(dt_t A) - 1) h_{t-1} + dt_t B_t x_t` and read it out."""
        work = recurrent_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dt = step_size(dt.to(work), self.dt_bias, True)  # (b, l, d)
            transition = 2 * torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log)) - 1  # (b, l, d, n)
            inputs = (dt * x).unsqueeze(-1) * B.to(work)  # (b, l, d, n)
            h, _ = ops.linear_scan(transition, inputs, state=state, seq_idx=seq_idx)
            y = (h * C.to(work)).sum(-1) + self.D * x
            y = y if z is None else y * F.silu(z.to(work))
        return y.to(x.dtype)


class SignedMamba1(Mamba1, config=SignedMamba1Config):
    """The Mamba-1 mixer with eigenvalues in [-1, 1]; arguments and state as for `Mamba1`."""

    ssm_class = SignedSelectiveSSM
