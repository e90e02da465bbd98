"""The operators as an ONNX graph has them: right for every batch and length, whatever they are traced for.

Plain PyTorch, except for the two recurrences. A loop over tokens would be unrolled for the length at
hand, and PyTorch's own `scan` cannot be exported for an open length, so each is one registered operator here,
which becomes ONNX's `Scan`: `selective_scan` over tokens, with the state inside, and `linear_scan` over the
chunks of `ssd`, whose other work is matrix products. Memory and time grow linearly with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnxscript
import torch
from onnxscript import FLOAT
from onnxscript import opset18 as op
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops.ssd import reference as ssd_reference
from mambakit.ops.ssd.chunked import CHUNK, by_chunks

# ---------------------------------------------------------------------------------------------------------
# Recurrences: PyTorch's operators, of which only the shapes matter, and their translations

_library = torch.library.Library("mambakit_onnx", "DEF")
_library.define("linear_scan(Tensor a, Tensor u, Tensor entry) -> (Tensor, Tensor)")
_library.define("fold(Tensor u, Tensor steps, Tensor B, Tensor C) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("unfold(Tensor y, Tensor tokens) -> Tensor")
_library.define(
    "selective_scan(Tensor dt, Tensor u, Tensor A, Tensor B, Tensor C, Tensor entry) -> (Tensor, Tensor)"
)


def _linear_scan_shapes(a: Tensor, u: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(entry)


def _selective_scan_shapes(
    dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, entry: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(entry)


def _fold_shapes(*tensors: Tensor) -> list[Tensor]:
    chunks = torch.library.get_ctx().new_dynamic_size()  # one number for all, of which nothing is known
    return [t.new_empty(t.shape[0], chunks, CHUNK, *t.shape[2:]) for t in tensors]


def _unfold_shapes(y: Tensor, tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


torch.library.register_fake("mambakit_onnx::fold", _fold_shapes, lib=_library)
torch.library.register_fake("mambakit_onnx::unfold", _unfold_shapes, lib=_library)
torch.library.register_fake("mambakit_onnx::linear_scan", _linear_scan_shapes, lib=_library)
torch.library.register_fake("mambakit_onnx::selective_scan", _selective_scan_shapes, lib=_library)


@onnxscript.script(onnxscript.values.Opset("mambakit", 1), default_opset=op)
def _linear_scan_graph(a: FLOAT, u: FLOAT, entry: FLOAT) -> tuple[FLOAT, FLOAT]:
    """`h_t = a_t h_{t-1} + u_t` along the second axis."""

    @onnxscript.graph()
    def step(h, a_t, u_t):
        after = a_t * h + u_t
        return after, op.Identity(after)

    final, states = op.Scan(
        entry, a, u, body=step, num_scan_inputs=2, scan_input_axes=[1, 1], scan_output_axes=[1]
    )
    return states, final


@onnxscript.script(onnxscript.values.Opset("mambakit", 1), default_opset=op)
def _selective_scan_graph(
    dt: FLOAT, u: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, entry: FLOAT
) -> tuple[FLOAT, FLOAT]:
    """`h_t = exp(dt_t A) h_{t-1} + u_t B_t`, `y_t = h_t C_t` along the second axis."""

    @onnxscript.graph()
    def step(h, dt_t, u_t, B_t, C_t):
        after = op.Exp(dt_t * A) * h + u_t * B_t
        return after, op.MatMul(after, C_t)

    final, y = op.Scan(
        entry, dt, u, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
    )
    return y, final


@onnxscript.script(onnxscript.values.Opset("mambakit", 1), default_opset=op)
def _fold_graph(u: FLOAT, steps: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT, FLOAT, FLOAT]:
    """Whole chunks `(b, c, CHUNK, ...)`, the last filled up with zeros: nothing decays, nothing enters."""
    length = op.Shape(steps, start=1, end=2)
    missing = op.Mod(op.Neg(length), op.Constant(value_ints=[CHUNK]))
    zero = op.Constant(value_ints=[0])
    after_3 = op.Concat(zero, zero, zero, zero, missing, zero, axis=0)
    after_4 = op.Concat(zero, zero, zero, zero, zero, missing, zero, zero, axis=0)
    folded = op.Concat(op.Shape(steps, start=0, end=1), op.Constant(value_ints=[-1, CHUNK]), axis=0)
    u_folded = op.Reshape(op.Pad(u, after_4), op.Concat(folded, op.Shape(u, start=2), axis=0))
    steps_folded = op.Reshape(op.Pad(steps, after_3), op.Concat(folded, op.Shape(steps, start=2), axis=0))
    B_folded = op.Reshape(op.Pad(B, after_4), op.Concat(folded, op.Shape(B, start=2), axis=0))
    C_folded = op.Reshape(op.Pad(C, after_4), op.Concat(folded, op.Shape(C, start=2), axis=0))
    return u_folded, steps_folded, B_folded, C_folded


@onnxscript.script(onnxscript.values.Opset("mambakit", 1), default_opset=op)
def _unfold_graph(y: FLOAT, tokens: FLOAT) -> FLOAT:
    """As many tokens as there were."""
    return op.Slice(
        y, op.Constant(value_ints=[0]), op.Shape(tokens, start=1, end=2), op.Constant(value_ints=[1])
    )


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.mambakit_onnx.fold.default: _fold_graph,
    torch.ops.mambakit_onnx.unfold.default: _unfold_graph,
    torch.ops.mambakit_onnx.linear_scan.default: _linear_scan_graph,
    torch.ops.mambakit_onnx.selective_scan.default: _selective_scan_graph,
}
"""PyTorch's operator -> function in ONNX, for `torch.onnx.export`."""


# ---------------------------------------------------------------------------------------------------------
# The forms of the operators; arguments as in their references


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """`mambakit.ops.selective_scan` as a scan over tokens, or as one step of it."""
    assert seq_idx is None and initial_state is not None
    (_, length, _), n, groups = x.shape, A.shape[1], B.shape[2]
    dt = _step_size(dt, dt_bias, dt_softplus)
    parts = (groups, x.shape[2] // groups)  # B and C serve the channels of their group
    entry = initial_state.unflatten(1, parts)  # (b, g, d/g, n)
    dt_parts, u = (t.unflatten(2, parts).unsqueeze(-1) for t in (dt, dt * x))  # (b, l, g, d/g, 1)
    A, B, C = A.unflatten(0, parts), B.unsqueeze(3), C.unsqueeze(-1)  # (b, l, g, 1, n), (b, l, g, n, 1)
    if length == 1:
        final = torch.exp(dt_parts[:, 0] * A) * entry + u[:, 0] * B[:, 0]
        y = (final @ C[:, 0]).unsqueeze(1)
    else:
        y, final = torch.ops.mambakit_onnx.selective_scan(dt_parts, u, A, B, C, entry)
    y = y.flatten(2)  # (b, l, d)
    y = y if D is None else y + D * x
    y = y if z is None else y * F.silu(z)
    return y, final.reshape(-1, x.shape[2], n)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = torch.inf,
) -> tuple[Tensor, Tensor]:
    """`mambakit.ops.ssd` by chunks of one size whatever the length, or as one step."""
    assert seq_idx is None and initial_state is not None
    dt = _step_size(dt, dt_bias, dt_softplus)
    if (dt_min, dt_max) != (0.0, torch.inf):
        dt = dt.clamp(dt_min, dt_max)
    if x.shape[1] == 1:
        return ssd_reference.ssd(x, dt, A, B, C, D, initial_state=initial_state)
    folded = torch.ops.mambakit_onnx.fold(x * dt.unsqueeze(-1), dt * A, B, C)
    y, final = by_chunks(*folded, initial_state, scan=torch.ops.mambakit_onnx.linear_scan)
    y = torch.ops.mambakit_onnx.unfold(y, x)
    return y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x, final


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`mambakit.ops.causal_conv1d` as a depthwise convolution over the state and the inputs."""
    assert seq_idx is None and initial_state is not None
    window = torch.cat([initial_state, x], dim=1)  # (b, w - 1 + l, d)
    y = F.conv1d(window.mT, weight.unsqueeze(1), bias, groups=weight.shape[0]).mT
    return F.silu(y) if activation == "silu" else y, window[:, x.shape[1] :]


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """`softplus(dt + dt_bias)`; ONNX has no log1p, hence `log(1 + e) = 2 atanh(e / (2 + e))`."""
    dt = dt if dt_bias is None else dt + dt_bias
    if not dt_softplus:
        return dt
    e = torch.exp(-dt.abs())
    return dt.clamp(min=0) + 2 * torch.atanh(e / (2 + e))
