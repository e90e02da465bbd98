"""The residual block that every model is a list of: `x + scale * dropout(mixer(norm(x)))`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.layers.mixer import Context, MixerConfig, State
from mambakit.layers.norm import NORMS


class Block(nn.Module):
    """One pre-norm residual branch.

    The residual stream `x` keeps its own type (float32 where the backbone says so); the norm's output is cast
    to the parameters' type before the mixer, or at once to autocast's where a matrix product comes first. A
    mixer that has its own norm (`prenorm` is false) gets the stream itself.

    Args:
        d_model: Width of the residual stream, channels.
        mixer: Config of the mixer.
        norm: Kind of norm, `rms` or `layer`.
        norm_eps: Added to the mean square, or the variance, in the norm.
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
        norm: str = "rms",
        norm_eps: float = 1e-5,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm = None
        if mixer.prenorm:
            self.norm = NORMS[norm](d_model, eps=norm_eps, device=device, dtype=dtype)
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
        x, branch = self.advance(x, None, state, context)
        return x + branch

    def advance(
        self,
        x: Tensor,
        branch: Tensor | None,
        state: State | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add an earlier block's branch to the stream, and compute this block's own.

        A stack of blocks hands a branch on unadded, because its sum and the next block's norm are one step
        over memory (`ops.add_norm`).

        Args:
            x: Residual stream `(b, l, d_model)`.
            branch: What the block before adds to it `(b, l, d_model)`, if anything.
            state: The mixer's state, overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            The stream with `branch` added, and what this block adds to it.

        Raises:
            ValueError: Shapes that do not fit.
        """
        weights = None if self.norm is None else self.norm.weight.dtype
        rounded = self.mixer.multiplies_first and torch.is_autocast_enabled(x.device.type)
        if self.norm is not None and branch is not None and (rounded or branch.dtype == weights):
            seen, x = self.norm.add(branch, x)
        else:
            x = x if branch is None else x + branch
            seen = x if self.norm is None else self.norm(x).to(weights)
        branch = self.dropout(self.mixer(seen, state, context))
        return x, branch if self.scale == 1 else self.scale * branch

    def reset_parameters(self) -> None:
        """Initialise norm and mixer anew."""
        if self.norm is not None:
            self.norm.reset_parameters()
        self.mixer.reset_parameters()
