"""S4: a bank of linear state space models that starts as HiPPO-LegS.

Every channel runs its own linear time-invariant system over the sequence, a GELU follows, and a linear layer
with a gate (GLU) mixes the channels. Nothing depends on the token, so training is a convolution; the same
parameters run token by token as a recurrence. Differs from Mamba in exactly that, and from S4D (`s4d.py`,
which shares the block below) in its state matrix: diagonal plus low rank, which holds HiPPO-LegS exactly.

    x -> SSM per channel, + D x -> gelu -> dropout -> out_proj (2 d) -> a * sigmoid(b)

Source: Gu, Goel and Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2111.00396),
section 3.4; its published code for the parameters and the GLU.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit import ops
from mambakit.layers import hippo
from mambakit.layers.init import check_dt_range
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State, example, recurrent_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4BlockConfig(MixerConfig):
    """What the settings of S4 and S4D have in common; the defaults are the published ones.

    Attributes:
        d_state: Real states per channel, `N`; kept as `N / 2` complex modes, so even.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dropout: Probability that a channel is dropped, for a whole sequence, before the mixing.
    """

    d_state: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        if self.d_state < 2 or self.d_state % 2:
            raise ValueError(f"d_state={self.d_state}, expected an even number (modes are conjugate pairs)")
        check_dt_range(self.dt_min, self.dt_max)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected a probability below 1")


class S4Block(Mixer):
    """The block around the state space models; S4 and S4D say which systems they are.

    Complex parameters are stored as real ones with a last axis of two, which every optimiser and file format
    understands. `A = -exp(log_A_real) + i A_imag` keeps the systems stable.

    Args:
        d_model: Width of the residual stream, channels `d`.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the projection; the systems' parameters are float32 or wider.
    """

    ssm_parameters: ClassVar[frozenset[str]] = frozenset({"log_dt", "log_A_real", "A_imag", "B"})

    def __init__(
        self,
        d_model: int,
        config: S4BlockConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        scalar = {"device": device, "dtype": recurrent_dtype(dtype or torch.get_default_dtype())}
        modes = (d_model, config.d_state // 2)
        self.log_dt = nn.Parameter(torch.empty(d_model, **scalar))
        self.log_A_real = nn.Parameter(torch.empty(*modes, **scalar))
        self.A_imag = nn.Parameter(torch.empty(*modes, **scalar))
        self.B = nn.Parameter(torch.empty(*modes, 2, **scalar))
        self.C = nn.Parameter(torch.empty(*modes, 2, **scalar))
        self.D = nn.Parameter(torch.empty(d_model, **scalar))
        self.dropout = nn.Dropout1d(config.dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: `ssm` `(b, d, n, 2)`, real and imaginary parts, overwritten in place.
            context: Its `seq_idx` separates documents.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        seq_idx = None if context is None else context.seq_idx
        h = None if state is None else torch.view_as_complex(state["ssm"])  # (b, d, n)
        y = F.gelu(self.convolve(x, h, seq_idx))  # (b, l, d)
        y = self.dropout(y.mT).mT  # one draw per channel and sequence
        return F.glu(self.out_proj(y), dim=-1)  # (b, l, 2 d) -> (b, l, d)

    def convolve(self, x: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Run the channels' systems.

        Args:
            x: Activations `(b, l, d)`.
            state: State `(b, d, n)`, complex, overwritten in place.
            seq_idx: Document number of each token `(b, l)`.

        Returns:
            Their outputs `(b, l, d)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define convolve")

    def initial_system(self) -> dict[str, Tensor]:
        """Initial `A`, `B` and whatever else the system has, complex `(n,)`, the same for all channels."""
        raise NotImplementedError(f"{type(self).__name__} does not define initial_system")

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The continuous systems: `dt` `(d,)`, and `A`, `B`, `C` `(d, n)`, complex, in float32 or wider."""
        log_dt, log_A_real, A_imag = (
            t.to(recurrent_dtype(t.dtype)) for t in (self.log_dt, self.log_A_real, self.A_imag)
        )
        A = torch.complex(-torch.exp(log_A_real), A_imag)
        return torch.exp(log_dt), A, as_complex(self.B), as_complex(self.C)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: `(d, n)` complex numbers, as real and imaginary parts."""
        weight = example(self.out_proj)
        device, dtype = device or weight.device, recurrent_dtype(dtype or weight.dtype)
        return State({"ssm": torch.zeros(batch, *self.C.shape, device=device, dtype=dtype)})

    def reset_parameters(self) -> None:
        """Initialise as published: `dt` log-uniform, the system by theory, `C` and `D` standard normal."""
        self.out_proj.reset_parameters()
        with torch.no_grad():
            self.log_dt.uniform_(math.log(self.config.dt_min), math.log(self.config.dt_max))
            system = self.initial_system()
            A = system.pop("A")
            self.log_A_real.copy_(torch.log(-A.real).expand_as(self.log_A_real))
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
            for name, vector in system.items():
                parameter = getattr(self, name)
                parameter.copy_(torch.view_as_real(vector).expand_as(parameter))
            self.C.normal_(std=math.sqrt(0.5))
            self.D.normal_()


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4Config(S4BlockConfig, tag="s4"):
    """Settings of an S4 mixer: HiPPO-LegS, bilinear; see `S4BlockConfig`."""


class S4(S4Block, config=S4Config):
    """The S4 mixer: state matrix `diag(A) - P P^*`, initially HiPPO-LegS.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the projection; the systems' parameters are float32 or wider.
    """

    ssm_parameters: ClassVar[frozenset[str]] = S4Block.ssm_parameters | {"P"}

    def __init__(
        self,
        d_model: int,
        config: S4Config = S4Config(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, config, device=device, dtype=dtype)
        self.P = nn.Parameter(torch.empty_like(self.B))
        self.reset_parameters()

    def convolve(self, x: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """Run the channels' systems by `ops.s4_conv`; see `S4Block.convolve`."""
        dt, A, B, C = self.system()
        y, _ = ops.s4_conv(x, dt, A, as_complex(self.P), B, C, self.D, state=state, seq_idx=seq_idx)
        return y

    def initial_system(self) -> dict[str, Tensor]:
        """HiPPO-LegS in diagonal-plus-low-rank form."""
        legs = hippo.legs_nplr(self.config.d_state)
        return {"A": legs.A, "P": legs.P, "B": legs.B}


def as_complex(parameter: Tensor) -> Tensor:
    """View a real parameter `(..., 2)` as complex `(...)`, in float32 or wider."""
    return torch.view_as_complex(parameter.to(recurrent_dtype(parameter.dtype)))
