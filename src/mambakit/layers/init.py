"""Initial values that several layers share, as published."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dt_bias_(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> Tensor:
    """Fill a bias so that `softplus(bias)` is log-uniform in `[dt_min, dt_max]`.

    `bias = dt + log(1 - exp(-dt))` is the inverse of softplus; the floor keeps it finite.

    Args:
        bias: Any shape; overwritten.
        dt_min: Least step size, in the time unit of `1 / A`.
        dt_max: Greatest step size.
        dt_init_floor: No step size below this.

    Returns:
        The bias.

    Source:
        Gu and Dao (2312.00752), section 3.6; Gu et al., "How to Train Your HiPPO" (2206.12037).
    """
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty_like(bias).uniform_(low, high).exp_().clamp_(min=dt_init_floor)
        return bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def check_dt_range(dt_min: float, dt_max: float) -> None:
    """Refuse a range of step sizes that is not `0 < dt_min <= dt_max`."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min={dt_min} and dt_max={dt_max}, expected 0 < dt_min <= dt_max")


def check_positive(**sizes: float) -> None:
    """Refuse any size that is not positive, naming it."""
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name}={size}, expected a positive number")
