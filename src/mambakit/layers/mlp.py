"""The gated MLP as a mixer: the `-` of patterns such as `"M-M-*-"`.

`out_proj(x' * act(gate))` with `x', gate` from one projection. It mixes channels, never tokens, so its state
is empty. With SiLU this is SwiGLU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

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
    """

    expand: float = 8 / 3
    multiple_of: int = 128
    d_hidden: int | None = None
    activation: str = "silu"
    bias: bool = False

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
        self.in_proj = nn.Linear(d_model, 2 * hidden, bias=config.bias, device=device, dtype=dtype)
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
        value, gate = self.in_proj(x).chunk(2, dim=-1)  # (b, l, f) each
        return self.out_proj(value * ACTIVATIONS[self.config.activation](gate))

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases start at zero."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_biases()

    def _reset_biases(self) -> None:
        for proj in (self.in_proj, self.out_proj):
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
