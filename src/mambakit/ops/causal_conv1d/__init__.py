"""Causal depthwise convolution: the short filter in front of every Mamba scan.

Each channel is filtered over time by its own `w` taps and looks only backwards. Differs from `long_conv` in
that the filter is a handful of stored numbers, so the state is simply the last `w - 1` inputs. See MATH.md
beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.config import unknown
from mambakit.ops import shapes
from mambakit.ops.causal_conv1d import chunked, cpu, cuda, reference
from mambakit.ops.dispatch import Op

ACTIVATIONS = ("silu",)


def _flops(x: Tensor, weight: Tensor, *_: object) -> int:
    return 2 * x.numel() * weight.shape[1]


def _fake(x: Tensor, weight: Tensor, *_: object) -> list[Tensor]:
    state = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [y, x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=state)]


_op = Op(
    "causal_conv1d",
    {"cpu": cpu, "cuda": cuda, "chunked": chunked, "reference": reference},
    outputs=2,
    fake=_fake,
    flops=_flops,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Filter every channel over time with its own causal taps.

    `y_t = act(bias + sum_k weight[:, k] x_{t - w + 1 + k})`: the last tap weighs the current token. Tokens
    before the first are those of the initial state (zeros by default); a tap that would reach into another
    document counts as zero.

    Args:
        x: Inputs `(b, l, d)`.
        weight: Taps `(d, w)`, oldest first (PyTorch's order of a `Conv1d` weight).
        bias: Added before the activation `(d,)`.
        initial_state: The `w - 1` inputs before the first token `(b, w - 1, d)`, oldest first;
            differentiable.
        activation: `None`, or `"silu"` for `y * sigmoid(y)`.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Outputs `(b, l, d)` in the type of `x`, and the final state `(b, w - 1, d)`: the last `w - 1` inputs,
        those of other documents than the last token's as zeros, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, an unknown activation, an empty sequence, or a backend that
            cannot take the inputs.

    Source:
        Gu and Dao, "Mamba" (2312.00752), section 3.4 and figure 3; the state as in section 3.3.
    """
    sizes = shapes.check(
        "causal_conv1d", x=(x, "b l d"), weight=(weight, "d w"), bias=(bias, "d"), seq_idx=(seq_idx, "b l")
    )
    expected = (sizes["b"], sizes["w"] - 1, sizes["d"])
    for name, tensor in (("initial_state", initial_state), ("state", state)):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, expected (b, w - 1, d) = {expected}"
            )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: {unknown('activation', activation, ACTIVATIONS)}")
    return _op(x, weight, bias, initial_state, seq_idx, activation, state=state, backend=backend)
