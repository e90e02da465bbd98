"""Normalisation layers: RMSNorm and LayerNorm for residual blocks, GatedRMSNorm for Mamba-2.

Each is the operator `norm` with its parameters. Statistics and the weight's product are taken in float32 at
least, whatever the activations' type, and the output has the type of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.ops.add_norm import add_norm
from mambakit.ops.norm import norm


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight`, per token.

    Args:
        d_model: Channels.
        eps: Added to the mean square.
        scale: Whether to learn the weight; without, it is one.
        device: Where the weight lives.
        dtype: Type of the weight.

    Source:
        Zhang and Sennrich (1910.07467), equation 4.
    """

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(..., d_model)`.

        Args:
            x: Activations `(..., d_model)`.

        Returns:
            Activations of the same shape and type.

        Raises:
            ValueError: Another number of channels.
        """
        return norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream, and normalise the sum.

        Args:
            x: What the branch adds `(..., d_model)`.
            residual: The stream `(..., d_model)`.

        Returns:
            The normalised sum in the type of `x`, and the sum in the wider of both types.

        Raises:
            ValueError: Another number of channels, or two shapes.
        """
        return add_norm(x, residual, self.weight, eps=self.eps)

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.d_model}, eps={self.eps}, scale={self.weight is not None}"


class LayerNorm(nn.Module):
    """`y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, per token.

    Differs from `torch.nn.LayerNorm` in that low-precision activations may meet float32 parameters.

    Args:
        d_model: Channels.
        eps: Added to the variance.
        bias: Whether to learn the shift.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Source:
        Ba, Kiros and Hinton (1607.06450), equation 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(..., d_model)`.

        Args:
            x: Activations `(..., d_model)`.

        Returns:
            Activations of the same shape and type.

        Raises:
            ValueError: Another number of channels.
        """
        return norm(x, self.weight, self.bias, kind="layer", eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream, and normalise the sum; arguments as for `RMSNorm.add`."""
        return add_norm(x, residual, self.weight, self.bias, kind="layer", eps=self.eps)

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}"


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
"""Norms of residual blocks by name."""


class GatedRMSNorm(nn.Module):
    """RMS norm with a SiLU gate and, optionally, groups of channels: the norm before Mamba-2's `out_proj`.

    `y = rms(x * silu(z)) * weight`, or `y = rms(x) * weight * silu(z)` with `norm_before_gate`.

    Args:
        d_model: Channels.
        eps: Added to the mean square.
        group_size: Channels normalised together; all by default. With tensor parallelism or several
            `B`, `C` groups each group gets its own statistics.
        norm_before_gate: Gate the normalised output instead of the input.
        device: Where the weight lives.
        dtype: Type of the weight.

    Raises:
        ValueError: `d_model` is no multiple of `group_size`.

    Source:
        Dao and Gu (2405.21060), section 7.1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or d_model % group_size):
            raise ValueError(f"group_size={group_size}, expected a divisor of the {d_model} channels")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Gate and normalise `(..., d_model)`.

        Args:
            x: Activations `(..., d_model)`.
            z: Gate before the SiLU, of the same shape.

        Returns:
            Activations of the same shape and the type of `x`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        return norm(
            x,
            self.weight,
            eps=self.eps,
            z=z,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"{self.weight.numel()}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
