"""The short causal convolution as a layer: the operator `causal_conv1d` with its parameters.

Parameters have the names, shapes and initial values of a depthwise `torch.nn.Conv1d`, which is what published
Mamba checkpoints hold under `conv1d.weight` and `conv1d.bias`; activations stay `(b, l, d)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mambakit.ops.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """`y_t = act(bias + sum_k weight[:, 0, k] x_{t - w + 1 + k})`, each channel by its own taps.

    Args:
        channels: Channels `d`.
        width: Taps `w`.
        bias: Whether to learn a bias.
        activation: `None` or `"silu"`.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: A width below 1.

    Source:
        Gu and Dao (2312.00752), section 3.4.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = True,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}, expected at least one tap")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Filter a sequence, or continue one.

        Args:
            x: Activations `(b, l, d)`.
            state: The last `w - 1` inputs `(b, w - 1, d)`, overwritten in place.
            seq_idx: Document number of each token `(b, l)`.

        Returns:
            Activations `(b, l, d)`.

        Raises:
            ValueError: Shapes that do not fit, or an unknown activation.
        """
        weight = self.weight.squeeze(1)  # (d, w)
        y, _ = causal_conv1d(x, weight, self.bias, activation=self.activation, state=state, seq_idx=seq_idx)
        return y

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within `1 / sqrt(w)`, as `torch.nn.Conv1d` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        channels, _, width = self.weight.shape
        return f"{channels}, width={width}, bias={self.bias is not None}, activation={self.activation}"
