"""The MLP as a mixer, gated or plain: the `-` of patterns such as `"M-M-*-"`.

Gated: `out_proj(x' * act(gate))` with `x', gate` from one projection; with SiLU this is SwiGLU. Plain:
`out_proj(act(in_proj(x)))`. It mixes channels, never tokens, so its state is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.config import unknown
from mambakit.layers.init import check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu2": _relu2}
"""Activations of the gate by name; `relu2` is the squared ReLU (So et al., 2109.08668)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(MixerConfig, tag="mlp"):
    """Settings of a gated MLP.

    Attributes:
        expand: Hidden channels per channel of the model, before rounding.
        multiple_of: The hidden channels are rounded up to a multiple of this.
        d_hidden: Hidden channels outright, not rounded; replaces `expand`.
        activation: `silu`, `gelu` or `relu2`.
        bias: Whether the projections have biases.
        gate_scale: Factor on the gate, before its activation.
        out_scale: Factor on the output.
    """

    expand: float = 8 / 3
    multiple_of: int = 128
    d_hidden: int | None = None
    activation: str = "silu"
    bias: bool = False
    gate_scale: float = 1.0
    out_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes and activations that do not exist."""
        check_positive(expand=self.expand, multiple_of=self.multiple_of)
        if self.d_hidden is not None:
            check_positive(d_hidden=self.d_hidden)
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown("activation", self.activation, ACTIVATIONS))

    def hidden(self, d_model: int) -> int:
        """Hidden channels for a model of width `d_model`."""
        if self.d_hidden is not None:
            return self.d_hidden
        return -(-int(self.expand * d_model) // self.multiple_of) * self.multiple_of


class GatedMLP(Mixer, config=GatedMLPConfig):
    """Two-layer perceptron with a multiplicative gate.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Source:
        Shazeer, "GLU variants improve transformer" (2002.05202), equation 6.
    """

    multiplies_first: ClassVar[bool] = True
    parts: ClassVar[int] = 2
    """How many times the hidden channels the first projection gives."""

    def __init__(
        self,
        d_model: int,
        config: GatedMLPConfig = GatedMLPConfig(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden(d_model)
        self.in_proj = nn.Linear(d_model, self.parts * hidden, bias=config.bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden, d_model, bias=config.bias, device=device, dtype=dtype)
        self._reset_biases()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Transform every token on its own.

        Args:
            x: Activations `(b, l, d_model)`.
            state: Empty.
            context: Not needed.

        Returns:
            Activations `(b, l, d_model)`.
        """
        return self.finish(self.in_proj(x))

    def finish(self, hidden: Tensor) -> Tensor:
        """Go on from `in_proj`; a block that adds something to that projection calls this.

        Args:
            hidden: What `in_proj` gives `(b, l, 2 f)`, or `(b, l, f)` without a gate.

        Returns:
            Activations `(b, l, d_model)`.
        """
        config = self.config
        value, gate = hidden.chunk(2, dim=-1)  # (b, l, f) each
        gate = gate if config.gate_scale == 1 else config.gate_scale * gate
        y = self.out_proj(value * ACTIVATIONS[config.activation](gate))
        return y if config.out_scale == 1 else config.out_scale * y

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases start at zero."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_biases()

    def _reset_biases(self) -> None:
        for proj in (self.in_proj, self.out_proj):
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(GatedMLPConfig, tag="plain_mlp"):
    """Settings of an MLP without a gate: a gated one's without `gate_scale`, and

    Attributes:
        expand: Hidden channels per channel of the model, before rounding; four times as many.
        activation: `silu`, `gelu` or `relu2`, of the hidden channels themselves.
    """

    expand: float = 4
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Refuse sizes and activations that do not exist, and a scale of a gate that there is not."""
        super().__post_init__()
        if self.gate_scale != 1:
            raise ValueError(f"gate_scale={self.gate_scale}, expected 1: a plain MLP has no gate")


class MLP(GatedMLP, config=MLPConfig):
    """Two-layer perceptron `out_proj(act(in_proj(x)))`; arguments as for `GatedMLP`.

    Source:
        Vaswani et al., "Attention is all you need" (1706.03762), section 3.3; with a squared ReLU: So et al.
        (2109.08668).
    """

    parts = 1

    def finish(self, hidden: Tensor) -> Tensor:
        """Go on from `in_proj`; arguments as for `GatedMLP`."""
        y = self.out_proj(ACTIVATIONS[self.config.activation](hidden))
        return y if self.config.out_scale == 1 else self.config.out_scale * y
