"""Mamba-3: Mamba-2's block with a trapezoidal rule, rotating states, and no convolution.

The decay rate comes from the data as well; B and C are normalised, get a bias per head and turn by angles
that the data accumulates; with a rank (MIMO) every head reads and writes several vectors per step. Two taps
of the trapezoid and the biases do what the convolution did in Mamba-2, and no norm stands before the output
projection.

    u -> in_proj -> z ---------------------------------------------\\
             \\----> x ------------------------> trapezoidal -> y * silu(z) -> out_proj
              \\---> B C -> norm, + bias, rotate ---/
               \\--> dt A trap angles -------------/

With rank `r`, `x` and `z` are scaled by `mimo_x` and `mimo_z` for each rank, and `mimo_o` weighs the sum.

Source: "Mamba-3" (2603.15569), section 3; parameters and their names as in the published implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit import ops
from mambakit.config import unknown
from mambakit.layers import init
from mambakit.layers.init import check_dt_range, check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State, example, recurrent_dtype
from mambakit.layers.norm import GatedRMSNorm, RMSNorm

_EPS = 1e-5  # of all norms, as published


def heavy_tail(x: Tensor) -> Tensor:
    """`1 + x` for `x >= 0`, `1 / (1 - x)` below: falls as `1 / |x|` where softplus falls as `e^x`.

    Source: the published implementation, since June 2026.
    """
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "heavy_tail": heavy_tail}
"""What makes decay rates positive, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba3Config(MixerConfig, tag="mamba3"):
    """Settings of a Mamba-3 mixer; the defaults are the published ones.

    Attributes:
        d_state: State columns per head, `n`.
        expand: Inner channels per channel of the model.
        headdim: Channels per head, `p`.
        ngroups: Groups of heads that share B and C.
        rope_fraction: Share of the state's columns that rotate, 0.5 or 1.
        rope_layout: Which columns form a pair: `interleaved` (neighbours), `half` (one of each half), or
            `auto`, as published: `half` for MIMO.
        mimo_rank: Vectors that every head reads and writes per step; `None` for SISO, which is rank 1 without
            scales.
        a_activation: `softplus` (the paper, released versions) or `heavy_tail` (the published implementation
            since June 2026). Checkpoints do not say which they were trained with.
        A_floor: No decay rate below this, as `-A`.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        is_outproj_norm: Normalise every head before the gate, as hybrids with attention want.
    """

    d_state: int = 128
    expand: float = 2
    headdim: int = 64
    ngroups: int = 1
    rope_fraction: float = 0.5
    rope_layout: Literal["auto", "interleaved", "half"] = "auto"
    mimo_rank: int | None = None
    a_activation: str = "softplus"
    A_floor: float = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    is_outproj_norm: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes and settings that no block can have."""
        check_positive(d_state=self.d_state, expand=self.expand, headdim=self.headdim, ngroups=self.ngroups)
        check_positive(A_floor=self.A_floor)
        check_dt_range(self.dt_min, self.dt_max)
        if self.mimo_rank is not None:
            check_positive(mimo_rank=self.mimo_rank)
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction={self.rope_fraction}, expected 0.5 or 1")
        if self.angles < 1:
            raise ValueError(f"d_state={self.d_state} has no pair to rotate, expected at least 4")
        if self.rope_layout not in ("auto", "interleaved", "half"):
            raise ValueError(unknown("rope_layout", self.rope_layout, ("auto", "interleaved", "half")))
        if self.a_activation not in ACTIVATIONS:
            raise ValueError(unknown("a_activation", self.a_activation, ACTIVATIONS))

    @property
    def rank(self) -> int:
        """Vectors per head and step, `r`."""
        return self.mimo_rank or 1

    @property
    def angles(self) -> int:
        """Pairs of columns that rotate, `s`."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring columns form a pair."""
        return self.rope_layout == "interleaved" or (self.rope_layout == "auto" and self.mimo_rank is None)

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


class Mamba3(Mixer, config=Mamba3Config):
    """The Mamba-3 mixer.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; those of the recurrence are float32 or wider.
    """

    multiplies_first: ClassVar[bool] = True
    ssm_parameters: ClassVar[frozenset[str]] = frozenset({"D", "dt_bias"})

    def __init__(
        self,
        d_model: int,
        config: Mamba3Config = Mamba3Config(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": recurrent_dtype(dtype or torch.get_default_dtype())}
        d_inner, heads, n, r = config.d_inner(d_model), config.nheads(d_model), config.d_state, config.rank
        self.split = (d_inner, d_inner, *2 * [r * config.ngroups * n], *3 * [heads], config.angles)
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False, **made)
        self.dt_bias = nn.Parameter(torch.empty(heads, **wide))
        self.B_bias = nn.Parameter(torch.empty(heads, r, n, **wide))
        self.C_bias = nn.Parameter(torch.empty(heads, r, n, **wide))
        self.B_norm = RMSNorm(n, eps=_EPS, **made)
        self.C_norm = RMSNorm(n, eps=_EPS, **made)
        for name in ("mimo_x", "mimo_z", "mimo_o"):
            scale = None if config.mimo_rank is None else torch.empty(heads, r, config.headdim, **wide)
            self.register_parameter(name, None if scale is None else nn.Parameter(scale))
        self.D = nn.Parameter(torch.empty(heads, **wide))
        if config.is_outproj_norm:
            norm = {"eps": _EPS, "group_size": config.headdim, "norm_before_gate": True}
            self.norm = GatedRMSNorm(d_inner, **norm, **made)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **made)
        self._reset_own()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: `angle`, `ssm`, `k` and `v` as in `ops.TrapezoidalState`, overwritten in place.
            context: Its `seq_idx` separates documents.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        config = self.config
        z, stream, B, C, dt, A, trap, angles = self.in_proj(x).split(self.split, dim=-1)
        groups = (config.rank, config.ngroups, config.d_state)
        rate = ACTIVATIONS[config.a_activation](A.to(self.dt_bias.dtype)).clamp(min=config.A_floor)
        y, _ = ops.trapezoidal(
            stream.unflatten(-1, (-1, config.headdim)),  # (b, l, h, p)
            dt,
            -rate,
            self.B_norm(B.unflatten(-1, groups)),  # (b, l, r, g, n)
            self.C_norm(C.unflatten(-1, groups)),
            trap,
            angles,
            self.B_bias,
            self.C_bias,
            self.mimo_x,
            self.D,
            self.dt_bias,
            dt_softplus=True,
            interleaved=config.interleaved,
            state=None if state is None else ops.TrapezoidalState(**state),
            seq_idx=None if context is None else context.seq_idx,
        )
        return self.out_proj(self._gate(y, z))

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate the outputs of all ranks `(b, l, r, h, p)` by `z` `(b, l, d)` and sum them: `(b, l, d)`."""
        z = z.unflatten(-1, (1, -1, self.config.headdim))  # (b, l, 1, h, p)
        if self.mimo_z is not None:
            z = (z * self.mimo_z.transpose(0, 1)).to(y.dtype)
        if self.config.is_outproj_norm:
            y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, y.shape[-2:])
        else:
            y = y * F.silu(z)
        y = y.squeeze(2) if self.mimo_o is None else (y * self.mimo_o.transpose(0, 1)).sum(2)  # (b, l, h, p)
        return y.flatten(-2).to(z.dtype)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: angles, the `(h, p, n)` SSM state, and the last token's key and value."""
        config, weight = self.config, example(self.in_proj)
        made = {"device": device or weight.device, "dtype": recurrent_dtype(dtype or weight.dtype)}
        heads, n, p = self.D.numel(), config.d_state, config.headdim
        return State(
            {
                "angle": torch.zeros(batch, heads, config.angles, **made),
                "ssm": torch.zeros(batch, heads, p, n, **made),
                "k": torch.zeros(batch, config.rank, heads, n, **made),
                "v": torch.zeros(batch, heads, p, **made),
            }
        )

    def reset_parameters(self) -> None:
        """Initialise as published: biases and scales of ranks constant, `D = 1`, `dt` log-uniform."""
        parts = (self.in_proj, self.B_norm, self.C_norm, self.out_proj)
        for part in (*parts, self.norm) if self.config.is_outproj_norm else parts:
            part.reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        config = self.config
        init.dt_bias_(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        constants = {self.B_bias: 1.0, self.C_bias: 1.0, self.D: 1.0}
        if self.mimo_x is not None:
            constants |= {self.mimo_x: 1 / config.rank, self.mimo_z: 1.0, self.mimo_o: 1 / config.rank}
        for parameter, value in constants.items():
            nn.init.constant_(parameter, value)
