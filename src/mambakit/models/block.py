"""The residual block that every model is a list of: `x + scale * dropout(mixer(norm(x)))`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.layers.mixer import Context, MixerConfig, State
from mambakit.layers.norm import RMSNorm


class Block(nn.Module):
    """One pre-norm residual branch.

    The residual stream `x` keeps its own type (float32 where the backbone says so); the norm's output is cast
    to the parameters' type before the mixer.

    Args:
        d_model: Width of the residual stream, channels.
        mixer: Config of the mixer.
        norm_eps: Added to the mean square in the norm.
        scale: Factor on the branch.
        dropout: Probability that an element of the branch is dropped in training.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        mixer: MixerConfig,
        *,
        norm_eps: float = 1e-5,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm = RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = mixer.build(d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Add the branch to the stream.

        Args:
            x: Residual stream `(b, l, d_model)`.
            state: The mixer's state, overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            Residual stream `(b, l, d_model)`, in the type of `x` or wider.

        Raises:
            ValueError: Shapes that do not fit.
        """
        normed = self.norm(x).to(self.norm.weight.dtype)
        branch = self.dropout(self.mixer(normed, state, context))
        return x + (branch if self.scale == 1 else self.scale * branch)
