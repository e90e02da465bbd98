"""Mamba-2: the state space dual block.

All inputs of the recurrence (gate, stream, B, C, dt) come from one projection in parallel; the convolution
runs over stream, B and C together; the recurrence has one decay per head, so it is computed with matrix
products; a gated RMS norm stands before the output projection. Differs from Mamba-1 in all four.

    u -> in_proj -> z ------------------------------------\\
             \\----> x B C -> conv1d -> silu -> SSD -> norm(y * silu(z)) -> out_proj
              \\---> dt -----------------------/

Source: Dao and Gu, "Transformers are SSMs" (2405.21060), section 7 and figure 6.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit import ops
from mambakit.layers import init
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.init import check_dt_range, check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State, example, recurrent_dtype
from mambakit.layers.norm import GatedRMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig, tag="mamba2"):
    """Settings of a Mamba-2 mixer; the defaults are the published ones.

    Attributes:
        d_state: State columns per head, `n`.
        d_conv: Width of the causal convolution, tokens.
        expand: Inner channels per channel of the model.
        headdim: Channels per head, `p`.
        ngroups: Groups of heads that share B and C.
        A_init_range: Initial decay rates are uniform in this range (as `-A`).
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        dt_limit: Step sizes are clamped to this range while running.
        norm_eps: Added to the mean square in the gated norm.
        norm_before_gate: Normalise first and gate then (off in all published Mamba-2 models).
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have one.
        gated_norm: Whether the gated output is normalised; without, it is `y * silu(z)`.
        in_scales: Factors on what `in_proj` gives, for z, x, B, C and dt; `None` is none.
    """

    d_state: int = 128
    d_conv: int = 4
    expand: float = 2
    headdim: int = 64
    ngroups: int = 1
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    norm_eps: float = 1e-5
    norm_before_gate: bool = False
    conv_bias: bool = True
    bias: bool = False
    gated_norm: bool = True
    in_scales: tuple[float, float, float, float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        check_positive(d_state=self.d_state, d_conv=self.d_conv, expand=self.expand)
        check_positive(headdim=self.headdim, ngroups=self.ngroups)
        check_dt_range(self.dt_min, self.dt_max)
        if not 0 < self.A_init_range[0] <= self.A_init_range[1]:
            raise ValueError(f"A_init_range={self.A_init_range}, expected 0 < least <= greatest")

    def d_inner(self, d_model: int) -> int:
        """Inner channels for a model of width `d_model`."""
        return int(self.expand * d_model)

    def nheads(self, d_model: int) -> int:
        """Heads for a model of width `d_model`.

        Raises:
            ValueError: The inner channels are no multiple of `headdim`, or the heads none of `ngroups`.
        """
        heads, rest = divmod(self.d_inner(d_model), self.headdim)
        if rest or heads % self.ngroups:
            raise ValueError(
                f"d_model={d_model} with expand={self.expand} gives {self.d_inner(d_model)} inner channels, "
                f"expected a multiple of headdim={self.headdim} in heads divisible by ngroups={self.ngroups}"
            )
        return heads


class Mamba2(Mixer, config=Mamba2Config):
    """The Mamba-2 mixer.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars are float32 or wider.
    """

    multiplies_first: ClassVar[bool] = True
    ssm_parameters: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})

    def __init__(
        self,
        d_model: int,
        config: Mamba2Config = Mamba2Config(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        scalar = {"device": device, "dtype": recurrent_dtype(dtype or torch.get_default_dtype())}
        d_inner, heads = config.d_inner(d_model), config.nheads(d_model)
        conv_channels = d_inner + 2 * config.ngroups * config.d_state
        self.split = (d_inner, conv_channels, heads)
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=config.bias, **made)
        self.conv1d = CausalConv1d(
            conv_channels, config.d_conv, bias=config.conv_bias, activation="silu", **made
        )
        self.dt_bias = nn.Parameter(torch.empty(heads, **scalar))
        self.A_log = nn.Parameter(torch.empty(heads, **scalar))
        self.D = nn.Parameter(torch.empty(heads, **scalar))
        self.norm = None
        if config.gated_norm:
            self.norm = GatedRMSNorm(
                d_inner,
                eps=config.norm_eps,
                group_size=d_inner // config.ngroups,
                norm_before_gate=config.norm_before_gate,
                **made,
            )
        self.out_proj = nn.Linear(d_inner, d_model, bias=config.bias, **made)
        self._reset_scalars()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: `conv` `(b, w-1, d + 2 g n)` and `ssm` `(b, h, p, n)`, overwritten in place.
            context: Its `seq_idx` separates documents.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        config, (d_inner, _, _) = self.config, self.split
        seq_idx = None if context is None else context.seq_idx
        projected = self.in_proj(x) if config.in_scales is None else self._scaled(self.in_proj(x))
        z, xBC, dt = projected.split(self.split, dim=-1)  # (b, l, d), (b, l, d + 2 g n), (b, l, h)
        xBC = self.conv1d(xBC, state=None if state is None else state["conv"], seq_idx=seq_idx)
        stream, B, C = xBC.split((d_inner, *2 * [config.ngroups * config.d_state]), dim=-1)
        y, _ = ops.ssd(
            stream.unflatten(-1, (-1, config.headdim)),  # (b, l, h, p)
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (config.ngroups, -1)),  # (b, l, g, n)
            C.unflatten(-1, (config.ngroups, -1)),
            self.D,
            self.dt_bias,
            dt_softplus=True,
            dt_limit=config.dt_limit,
            state=None if state is None else state["ssm"],
            seq_idx=seq_idx,
        )
        y = y.flatten(-2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: the last `w-1` inputs of the convolution and the `(h, p, n)` SSM state."""
        config, weight = self.config, example(self.in_proj)
        device, dtype = device or weight.device, dtype or weight.dtype
        _, conv_channels, heads = self.split
        ssm = (batch, heads, config.headdim, config.d_state)
        return State(
            {
                "conv": torch.zeros(batch, config.d_conv - 1, conv_channels, device=device, dtype=dtype),
                "ssm": torch.zeros(ssm, device=device, dtype=recurrent_dtype(dtype)),
            }
        )

    def reset_parameters(self) -> None:
        """Initialise as published: `-A` uniform in `A_init_range`, `D = 1`, `dt` log-uniform."""
        for part in self.children():
            part.reset_parameters()
        self._reset_scalars()

    def _scaled(self, projected: Tensor) -> Tensor:
        """Multiply the sections z, x, B, C and dt by their factors."""
        states = self.config.ngroups * self.config.d_state
        sizes = torch.tensor([self.split[0], self.split[0], states, states, self.split[2]])
        scales = torch.tensor(self.config.in_scales, dtype=projected.dtype).repeat_interleave(sizes)
        return projected * scales.to(projected.device)

    def _reset_scalars(self) -> None:
        config = self.config
        init.dt_bias_(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        with torch.no_grad():
            self.A_log.uniform_(*config.A_init_range).log_()
            self.D.fill_(1.0)
