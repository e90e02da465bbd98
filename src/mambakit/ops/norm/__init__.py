"""Normalisation over channels: RMS or layer, optionally in groups, optionally gated.

One operator for the block norms (`rms`, `layer`), for Mamba-2's gated norm before its output projection and
for the grouped form used with several `B`, `C` groups. It has no recurrent state: tokens do not meet. See
MATH.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.config import unknown
from mambakit.ops.dispatch import Op
from mambakit.ops.norm import chunked, cpu, reference, triton

KINDS = ("rms", "layer")

_op = Op(
    "norm",
    {"cpu": cpu, "triton": triton, "chunked": chunked, "reference": reference},
    fake=lambda x, *_: [torch.empty_like(x, memory_format=torch.contiguous_format)],
    flops=lambda x, *_: 4 * x.numel(),
)


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise the channels of every token, then scale and shift them.

    With `u = x`, or `u = x * silu(z)` where a gate is given, over each group of channels:

        rms:    y = u / sqrt(mean(u^2) + eps) * weight + bias
        layer:  y = (u - mean(u)) / sqrt(var(u) + eps) * weight + bias

    With `norm_before_gate`, `y = norm(x) * silu(z)` instead. Everything is computed in float32 at least,
    the weight's product included, and rounded once at the end.

    Args:
        x: Inputs `(..., d)`.
        weight: Scale `(d,)`; 1 by default.
        bias: Shift `(d,)`; 0 by default.
        kind: `"rms"` (no centring) or `"layer"`.
        eps: Added to the mean square or variance, in the unit of `x` squared.
        z: Gate `(..., d)`, before the SiLU; same shape as `x`.
        group_size: Channels normalised together; all of them by default.
        norm_before_gate: Normalise first and gate afterwards. The default gates first, as Mamba-2 does.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(..., d)` in the type of `x`.

    Raises:
        ValueError: Shapes that do not fit, an unknown kind, channels not divisible into groups, or a
            backend that cannot take the inputs.

    Source:
        Zhang and Sennrich, "Root mean square layer normalization" (1910.07467), equation 4; Ba et al.,
        "Layer normalization" (1607.06450), equation 3; the gate: Dao and Gu, "Transformers are SSMs"
        (2405.21060), section 7.1.
    """
    if x.dim() == 0:
        raise ValueError("norm: x has shape (), expected (..., d)")
    for name, tensor, expected in (
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
        ("z", z, x.shape),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"norm: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    if kind not in KINDS:
        raise ValueError(f"norm: {unknown('kind', kind, KINDS)}")
    size = x.shape[-1] if group_size is None else group_size
    if size < 1 or x.shape[-1] % size:
        raise ValueError(f"norm: {x.shape[-1]} channels do not split evenly into groups of {size}")
    return _op(x, weight, bias, z, kind, eps, size, norm_before_gate, backend=backend)
