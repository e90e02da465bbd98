"""Mamba-1 in heads: every head has its own projections into dt, B and C, from its own channels.

Mamba-1 with one head is Mamba-1. The channels of a head are neighbours; everything else, the convolution and
the two large projections, is Mamba-1's.

Source: Glorioso et al., "Zamba" (2405.16712); the layer is that of its published implementation.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from mambakit.layers.init import check_positive
from mambakit.layers.mamba1 import Mamba1, Mamba1Config
from mambakit.layers.selective_ssm import SelectiveSSM


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHeadMamba1Config(Mamba1Config, tag="multihead_mamba1"):
    """Settings of a Mamba-1 mixer in heads: Mamba-1's without inner norms, and

    Attributes:
        n_heads: Heads, a divisor of the inner channels.
    """

    n_heads: int = 2

    def __post_init__(self) -> None:
        """Refuse sizes that no block can have."""
        super().__post_init__()
        check_positive(n_heads=self.n_heads)
        if self.inner_norm != "none":
            raise ValueError(f"inner_norm={self.inner_norm!r}, expected 'none': heads have no inner norms")


class HeadLinear(nn.Module):
    """A linear map for each head: `y_h = weight_h x_h`.

    Args:
        n_heads: Heads `h`.
        d_in: Channels of a head in.
        d_out: Channels of a head out.
        device: Where the weight lives.
        dtype: Its type.
    """

    def __init__(
        self,
        n_heads: int,
        d_in: int,
        d_out: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, d_out, d_in, device=device, dtype=dtype))
        self.in_features = d_in  # of a head, as `torch.nn.Linear` calls it
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map every head of every token.

        Args:
            x: Activations `(b, l, h, d_in)`.

        Returns:
            Activations `(b, l, h, d_out)`.
        """
        return torch.einsum("blhi,hoi->blho", x, self.weight)

    def reset_parameters(self) -> None:
        """Draw every head as `torch.nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        heads, d_out, d_in = self.weight.shape
        return f"{heads} heads, {d_in} -> {d_out}"


class MultiHeadSSM(SelectiveSSM):
    """Selective SSMs of heads, in one scan whose groups are the heads; arguments as for `SelectiveSSM`, and

    Args:
        d_inner: Channels `d` of all heads.
        d_state: States per channel `n`.
        dt_rank: Width `r` of a head's bottleneck.
        n_heads: Heads `h`.
        device: Where the parameters live.
        dtype: Type of the projections.
        **start: Settings of the initial step size.

    Raises:
        ValueError: Channels that do not split evenly into heads.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        *,
        n_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **start: float | str,
    ) -> None:
        if d_inner % n_heads:
            raise ValueError(f"n_heads={n_heads}, expected a divisor of the {d_inner} inner channels")
        made = {"device": device, "dtype": dtype}
        super().__init__(d_inner, d_state, dt_rank, **start, **made)
        self.n_heads, channels = n_heads, d_inner // n_heads
        self.x_proj = HeadLinear(n_heads, channels, sum(self.split), **made)
        self.dt_proj = HeadLinear(n_heads, dt_rank, channels, **made)
        self.reset_parameters()

    def forward(
        self, x: Tensor, z: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Scan a sequence; arguments as for `SelectiveSSM`."""
        heads = x.unflatten(-1, (self.n_heads, -1))
        dt, B, C = self.x_proj(heads).split(self.split, dim=-1)  # (b, l, h, r), (b, l, h, n), (b, l, h, n)
        return self.scan(x, self.dt_proj(dt).flatten(-2), B, C, z, state, seq_idx)


class MultiHeadMamba1(Mamba1, config=MultiHeadMamba1Config):
    """The Mamba-1 mixer in heads; arguments and state as for `Mamba1`."""

    ssm_class = MultiHeadSSM

    def ssm_settings(self) -> dict[str, float | str]:
        """What the SSM is given besides its sizes."""
        return super().ssm_settings() | {"n_heads": self.config.n_heads}
