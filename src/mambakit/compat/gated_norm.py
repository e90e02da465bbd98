"""`mamba_ssm.ops.triton.layernorm_gated`: norms with a gate and groups of channels, on `ops.norm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit import ops


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise and gate channels; see `ops.norm`.

    Args:
        x: Inputs `(..., d)`.
        weight: Scale `(d,)`.
        bias: Shift `(d,)`.
        z: Gates of the shape of `x`, before the SiLU.
        eps: Added to the variance or mean square.
        group_size: Channels normalised together; all by default.
        norm_before_gate: `norm(x) * silu(z)` instead of `norm(x * silu(z))`.
        is_rms_norm: RMS norm instead of layer norm.

    Returns:
        Outputs of the shape and type of `x`.

    Raises:
        ValueError: Shapes that do not fit.
    """
    kind = "rms" if is_rms_norm else "layer"
    settings = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}
    return ops.norm(x, weight, bias, kind=kind, z=z, **settings)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with `is_rms_norm`."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class LayerNorm(nn.Module):
    """A layer norm with an optional gate.

    Args:
        hidden_size: Channels.
        eps: Added to the variance.
        group_size: Channels normalised together; all by default.
        norm_before_gate: Gate the normalised output instead of the input.
        device: Where the parameters live.
        dtype: Their type.
    """

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = (
            None if self.is_rms_norm else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        )
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one and the shift to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise `(..., d)`, gated by `z` of the same shape if given."""
        settings = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, z, *settings)


class RMSNorm(LayerNorm):
    """The same without centring and shift; see `LayerNorm`."""

    is_rms_norm = True
