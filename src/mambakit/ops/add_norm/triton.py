"""The sum and its norm on GPUs: how the Triton kernels of `triton_kernels.py` are started, and on what.

Inputs may be slices of a larger tensor. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.ops import cuda, triton_utils
from mambakit.ops.add_norm.cpu import kept_outputs, rebuilt, saved_like, spent
from mambakit.ops.norm.triton import ELEMENTS, MOST_CHANNELS, PER_THREAD
from mambakit.ops.operands import scalars

__all__ = ["backward", "forward", "infer", "kept_outputs", "rebuilt", "saved_like", "spent", "unsupported"]

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)

kernels = triton_utils.Kernels("mambakit.ops.add_norm.triton_kernels")


def unsupported(x: Tensor, residual: Tensor, *_: Any) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := triton_utils.runs_on(x.device):
        return reason
    for tensor in (x, residual):
        if tensor.dtype not in dtypes:
            return f"takes float32, bfloat16 and float16, not {tensor.dtype}"
    if x.shape[-1] > MOST_CHANNELS:
        return f"takes up to {MOST_CHANNELS} channels, not {x.shape[-1]}"
    return None


def infer(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum."""
    return forward(*inputs)[0]


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """The same; the backward pass needs the sum, which is an output."""
    wide = torch.promote_types(x.dtype, residual.dtype)
    y, total = (torch.empty(x.shape, dtype=t, device=x.device) for t in (x.dtype, wide))
    branch, stream = _flat(x), _flat(residual)
    sizes, settings = _settings(branch, kind, eps)
    if y.numel():
        kernels.forward[(-(-branch.shape[0] // settings["R"]),)](
            branch, stream, scalars(weight), scalars(bias), y, total, branch.stride(0), stream.stride(0),
            **sizes, **settings,
        )  # fmt: skip
    return (y, total), []


def backward(
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of `x` and `residual`, which are one, and where given of `weight` and `bias`."""
    total, dy, dtotal = (_flat(t) for t in (saved[0], *grads))
    sizes, settings = _settings(total, kind, eps)
    blocks = -(-total.shape[0] // settings["R"])
    at_once = cuda.processors(x.device) * max(1, 32 // settings["num_warps"])  # as many as run together
    programs = max(1, min(blocks, at_once))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    same = x.dtype == residual.dtype
    dresidual = dx if same else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    dweight, dbias = (
        None if t is None else torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        for t in (weight, bias)
    )
    kernels.backward[(programs,)](
        total, scalars(weight), dy, dtotal, dx, None if same else dresidual, dweight, dbias,
        **sizes, **settings, maxnreg=64,
    )  # fmt: skip
    found = [dx, dresidual]
    found += [] if weight is None else [dweight.sum(0).to(weight.dtype)]
    return found if bias is None else [*found, dbias.sum(0).to(bias.dtype)]


def _settings(flat: Tensor, kind: str, eps: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and the settings of a compilation."""
    rows, d = flat.shape
    size = triton_utils.block(d, least=1)
    together = max(1, min(16, ELEMENTS // size))
    settings = {
        "R": together,
        "SIZE": size,
        "LAYER": kind == "layer",
        "num_warps": max(1, min(16, together * size // (32 * PER_THREAD))),
    }
    return {"rows": rows, "d": d, "eps": eps}, settings


def _flat(x: Tensor) -> Tensor:
    """Rows of channels `(rows, d)`, a copy only where no view can be had."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
