"""The norms on GPUs: how the Triton kernels of `triton_kernels.py` are started, and on what.

Inputs may be slices of a larger tensor. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.ops import cuda, triton_utils
from mambakit.ops.operands import scalars

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 16384
"""Of a group, whose row has to stay in the registers of one program."""
ELEMENTS = 1024
"""Least of a program's rows together."""
PER_THREAD = 8
"""Elements of a thread: the backward pass holds ten numbers for each."""

kernels = triton_utils.Kernels("mambakit.ops.norm.triton_kernels")


def unsupported(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := triton_utils.runs_on(x.device):
        return reason
    if x.dtype not in dtypes:
        return f"takes float32, bfloat16 and float16, not {x.dtype}"
    if group_size > MOST_CHANNELS:
        return f"takes groups of up to {MOST_CHANNELS} channels, not {group_size}"
    return None


def infer(*inputs: Any) -> tuple[Tensor]:
    """The outputs."""
    return forward(*inputs)[0]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[tuple[Tensor], list[Tensor]]:
    """The outputs; the backward pass needs nothing but the inputs."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, gate, sizes, settings = _layout(x, z, kind, eps, group_size, norm_before_gate)
    if y.numel():
        grid = (-(-flat.shape[0] // settings["R"]), x.shape[-1] // group_size)
        kernels.forward[grid](
            flat, scalars(weight), scalars(bias), gate, y, *_row_strides(flat, gate), **sizes, **settings
        )
    return (y,), []


def saved_like(*inputs: Any) -> list[Tensor]:
    """Nothing."""
    return []


def backward(
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> list[Tensor]:
    """Gradients of the tensor inputs, in their order."""
    flat, gate, sizes, settings = _layout(x, z, kind, eps, group_size, norm_before_gate)
    groups = x.shape[-1] // group_size
    blocks = -(-flat.shape[0] // settings["R"])
    at_once = cuda.processors(x.device) * max(1, 32 // settings["num_warps"])  # as many as run together
    programs = max(1, min(blocks, -(-at_once // groups)))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    dweight, dbias = (
        None if t is None else torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        for t in (weight, bias)
    )
    dy = grads[0].reshape(flat.shape)
    kernels.backward[(programs, groups)](
        flat, scalars(weight), scalars(bias), gate, dy, dx, dz, dweight, dbias,
        *_row_strides(flat, gate, dy), **sizes, **settings, maxnreg=64,
    )  # fmt: skip
    found = [dx]
    found += [] if weight is None else [dweight.sum(0).to(weight.dtype)]
    found += [] if bias is None else [dbias.sum(0).to(bias.dtype)]
    return found if z is None else [*found, dz]


def _layout(
    x: Tensor, z: Tensor | None, kind: str, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, dict[str, Any], dict[str, Any]]:
    """Inputs as rows of channels, sizes, and the settings of a compilation."""
    flat, gate = _flat(x), None if z is None else _flat(z)
    size = triton_utils.block(group_size, least=1)
    sizes = {"rows": flat.shape[0], "d": x.shape[-1], "size": group_size, "eps": eps}
    together = max(1, min(16, ELEMENTS // size))
    settings = {
        "R": together,
        "SIZE": size,
        "LAYER": kind == "layer",
        "GATE_LAST": norm_before_gate,
        "num_warps": max(1, min(16, together * size // (32 * PER_THREAD))),
    }
    return flat, gate, sizes, settings


def _flat(x: Tensor) -> Tensor:
    """Rows of channels `(rows, d)`, a copy only where no view can be had."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _row_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]
