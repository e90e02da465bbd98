"""The step size of the selective operators: bias, softplus, clamp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_IDENTITY_ABOVE = 40.0
"""From here on `softplus(x) = x` to the last bit of float64, and `exp(x)` must not be formed."""


def step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float = 0.0, dt_max: float = torch.inf
) -> Tensor:
    """`clamp(softplus(dt + dt_bias), dt_min, dt_max)`, each part only where asked for.

    Args:
        dt: Raw step sizes `(..., d)`.
        dt_bias: Added to them `(d,)`.
        dt_softplus: Apply `log(1 + exp(.))`, computed without overflow.
        dt_min: Least result.
        dt_max: Greatest result.

    Returns:
        Step sizes `(..., d)` in the type of `dt`.
    """
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt, threshold=_IDENTITY_ABOVE) if dt_softplus else dt
    return dt if (dt_min, dt_max) == (0.0, torch.inf) else dt.clamp(dt_min, dt_max)
