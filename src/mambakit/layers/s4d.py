"""S4D: S4 with a diagonal state matrix.

Dropping S4's low-rank term leaves one complex number per mode: the kernel is a sum of damped waves (a
Vandermonde product), the recurrence is element-wise, and with a well chosen diagonal nothing is lost. Mamba's
`A` is the real case of it. Differs from S4 (`s4.py`, where the block around it stands) only in the system.

Source: Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models"
(2206.11893).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from mambakit import ops
from mambakit.config import unknown
from mambakit.layers import hippo
from mambakit.layers.s4 import S4Block, S4BlockConfig
from mambakit.ops.long_conv import DISCRETIZATIONS

_SYSTEMS = {"legs": hippo.s4d_legs, "lin": hippo.s4d_lin, "inv": hippo.s4d_inv, "real": hippo.s4d_real}


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4DConfig(S4BlockConfig, tag="s4d"):
    """Settings of an S4D mixer; see `S4BlockConfig` for the others.

    Attributes:
        init: Initial diagonal: `"lin"` damped Fourier modes, `"inv"` and `"legs"` after HiPPO-LegS, `"real"`
            pure decays; see `hippo.py`.
        discretization: `"zoh"` or `"bilinear"`.
    """

    init: Literal["lin", "inv", "legs", "real"] = "lin"
    discretization: Literal["zoh", "bilinear"] = "zoh"

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have and names that mean nothing."""
        super().__post_init__()
        for name, value, valid in (
            ("init", self.init, _SYSTEMS),
            ("discretization", self.discretization, DISCRETIZATIONS),
        ):
            if value not in valid:
                raise ValueError(unknown(name, value, valid))


class S4D(S4Block, config=S4DConfig):
    """The S4D mixer: state matrix `diag(A)`.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the projection; the systems' parameters are float32 or wider.
    """

    def __init__(
        self,
        d_model: int,
        config: S4DConfig = S4DConfig(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config, device=device, dtype=dtype)
        self.reset_parameters()

    def convolve(self, x: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Run the channels' systems by `ops.s4d_conv`; see `S4Block.convolve`."""
        dt, A, B, C = self.system()
        rule = self.config.discretization
        y, _ = ops.s4d_conv(x, dt, A, B, C, self.D, discretization=rule, state=state, seq_idx=seq_idx)
        return y

    def initial_system(self) -> dict[str, Tensor]:
        """The diagonal and input vector that `config.init` names."""
        A, B = _SYSTEMS[self.config.init](self.config.d_state)
        return {"A": A, "B": B}
