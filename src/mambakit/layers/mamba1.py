"""Mamba-1: the selective state space block.

One projection makes a stream and a gate; the stream passes a short causal convolution, then a selective SSM
whose step, input and output weights depend on the token; the gated result is projected back. Differs from
Mamba-2 in the order (dt, B, C come from the convolved stream, one after the other) and in having a decay
rate for every channel and state.

    x -> in_proj -> stream -> conv1d -> silu -> SSM --*--> out_proj
              \\---> gate -----------------> silu ---/

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2312.00752), figure 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mambakit.config import unknown
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.init import check_dt_range, check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State, example, recurrent_dtype
from mambakit.layers.selective_ssm import SelectiveSSM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Config(MixerConfig, tag="mamba1"):
    """Settings of a Mamba-1 mixer; the defaults are the published ones.

    Attributes:
        d_state: States per channel.
        d_conv: Width of the causal convolution, tokens.
        expand: Inner channels per channel of the model.
        dt_rank: Bottleneck of the step size; `"auto"` is `ceil(d_model / 16)`.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        dt_init: How the step size's projection starts.
        dt_scale: Its scale.
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have one.
        inner_norm: RMS norms of dt, B and C inside the block: `"none"`, `"plain"` (without weights, Falcon
            Mamba) or `"learned"` (Jamba).
        inner_norm_eps: Added to the mean square in them.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    conv_bias: bool = True
    bias: bool = False
    inner_norm: Literal["none", "plain", "learned"] = "none"
    inner_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        check_positive(d_state=self.d_state, d_conv=self.d_conv, expand=self.expand)
        check_dt_range(self.dt_min, self.dt_max)
        if self.dt_rank != "auto":
            check_positive(dt_rank=self.dt_rank)
        if self.inner_norm not in ("none", "plain", "learned"):
            raise ValueError(unknown("inner_norm", self.inner_norm, ("none", "plain", "learned")))

    def d_inner(self, d_model: int) -> int:
        """Inner channels for a model of width `d_model`."""
        return int(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        """Bottleneck of the step size for a model of width `d_model`."""
        return math.ceil(d_model / 16) if self.dt_rank == "auto" else self.dt_rank


class Mamba1(Mixer, config=Mamba1Config):
    """The Mamba-1 mixer.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars are float32 or wider.
    """

    multiplies_first: ClassVar[bool] = True
    ssm_class: ClassVar[type[SelectiveSSM]] = SelectiveSSM

    def __init__(
        self,
        d_model: int,
        config: Mamba1Config = Mamba1Config(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        d_inner = config.d_inner(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=config.bias, **made)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, bias=config.conv_bias, activation="silu", **made)
        self.ssm = self.ssm_class(
            d_inner,
            config.d_state,
            config.rank(d_model),
            **self.ssm_settings(),
            **made,
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=config.bias, **made)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: `conv` `(b, w-1, d)` and `ssm` `(b, d, n)`, overwritten in place.
            context: Its `seq_idx` separates documents.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        seq_idx = None if context is None else context.seq_idx
        stream, gate = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d) each
        stream = self.conv1d(stream, state=None if state is None else state["conv"], seq_idx=seq_idx)
        y = self.ssm(stream, gate, None if state is None else state["ssm"], seq_idx)  # (b, l, d)
        return self.out_proj(y)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: the last `w-1` inputs of the convolution and the SSM's `(d, n)` state."""
        d_inner, weight = self.out_proj.in_features, example(self.in_proj)
        device, dtype = device or weight.device, dtype or weight.dtype
        return State(
            {
                "conv": torch.zeros(batch, self.config.d_conv - 1, d_inner, device=device, dtype=dtype),
                "ssm": torch.zeros(
                    batch, d_inner, self.config.d_state, device=device, dtype=recurrent_dtype(dtype)
                ),
            }
        )

    def ssm_settings(self) -> dict[str, float | str]:
        """What the SSM is given besides its sizes."""
        names = ("dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "inner_norm", "inner_norm_eps")
        return {name: getattr(self.config, name) for name in names}

    def reset_parameters(self) -> None:
        """Initialise as published: linear layers by PyTorch's default, the SSM by its own rules."""
        for part in (self.in_proj, self.conv1d, self.ssm, self.out_proj):
            part.reset_parameters()
