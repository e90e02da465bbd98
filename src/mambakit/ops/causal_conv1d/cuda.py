"""The causal convolution on NVIDIA GPUs: what the kernels need to be told, and how its work is divided.

Inputs may be slices of a larger tensor: only their last axis has to be contiguous. All sums have a fixed
order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops import cuda
from mambakit.ops.operands import rows, scalars

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)
MOST_TAPS = 8
CHANNELS = {"forward": 2, "backward": 4}
"""Of a thread: few make many threads, which hide the way to memory; more share what a token costs."""
THREADS = 256
TOKENS = 64 * (THREADS // 32)
"""Tokens of a block: strips of 64, one per warp."""

_POINTERS = """
    x dy y dx weight bias initial dfinal seq_idx final dinitial dweight dbias
"""
_INTEGERS = "x_b x_l dy_b dy_l length d token_blocks channel_blocks"


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_longlong) for name in _INTEGERS.split()),
    ]


SOURCE = cuda.Source(Path(__file__).parent, "strip.cuh", _Params)


def unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := cuda.runs_on(x.device):
        return reason
    if x.dtype not in dtypes:
        return f"takes float32, bfloat16 and float16, not {x.dtype}"
    if weight.shape[1] > MOST_TAPS:
        return f"takes up to {MOST_TAPS} taps, not {weight.shape[1]}"
    return None


def infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state."""
    outputs, _ = forward(x, weight, bias, initial_state, seq_idx, activation)
    return (outputs[0], initial_state.copy_(outputs[1])) if in_place else outputs


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Outputs and final state; the backward pass needs nothing but the inputs."""
    call = _Call(x, weight, bias, initial_state, seq_idx, activation)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = call.new_state()
    call.launch("forward", {"y": y, "final": final})
    return (y, final), []


def saved_like(*inputs: Tensor | str | None) -> list[Tensor]:
    """Nothing."""
    return []


def backward(
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> list[Tensor | None]:
    """Gradients of the tensor inputs, in their order."""
    call = _Call(x, weight, bias, initial_state, seq_idx, activation)
    dy, dfinal = rows(grads[0], x.dtype), scalars(grads[1])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = None if initial_state is None else call.new_state()
    blocks = x.shape[0] * call.token_blocks
    dweight = torch.empty(blocks, *weight.shape, dtype=torch.float32, device=x.device)
    dbias = torch.empty(blocks, weight.shape[0], dtype=torch.float32, device=x.device)
    outputs = {"dx": dx, "dinitial": dinitial, "dweight": dweight, "dbias": dbias}
    call.launch("backward", {"dy": dy, "dfinal": dfinal, **outputs})
    found = [dx, dweight.sum(0).to(weight.dtype)]
    if bias is not None:
        found.append(dbias.sum(0).to(bias.dtype))
    if initial_state is not None:
        found.append(dinitial.to(initial_state.dtype))
    return found if seq_idx is None else [*found, None]


class _Call:
    """One use of the kernels: the inputs as they need them, and the launches."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        activation: str | None,
    ) -> None:
        self.x, self.activation = rows(x, x.dtype), activation
        self.weight, self.bias, self.initial = (scalars(t) for t in (weight, bias, initial))
        self.seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        self.token_blocks = -(-x.shape[1] // TOKENS)

    def new_state(self) -> Tensor:
        batch, _, d = self.x.shape
        return torch.empty(batch, self.weight.shape[1] - 1, d, dtype=torch.float32, device=self.x.device)

    def launch(self, name: str, tensors: dict[str, Tensor | None]) -> None:
        x, taps, channels = self.x, self.weight.shape[1], CHANNELS[name]
        batch, length, d = x.shape
        given = {"x": x, "weight": self.weight, "bias": self.bias, "initial": self.initial}
        params = _Params()
        for key, tensor in {**given, "seq_idx": self.seq_idx, **tensors}.items():
            setattr(params, key, cuda.address(tensor))
        params.x_b, params.x_l = x.stride()[:2]
        if (dy := tensors.get("dy")) is not None:
            params.dy_b, params.dy_l = dy.stride()[:2]
        params.length, params.d, params.token_blocks = length, d, self.token_blocks
        params.channel_blocks = -(-d // (32 * channels))
        size = channels * x.element_size()
        settings = {
            "IO": cuda.TYPES[x.dtype],
            "W": taps,
            "CH": channels,
            "ALIGNED": int(d % channels == 0 and cuda.is_aligned(x, dy, to=size)),
            "PACKED": int(self.seq_idx is not None),
            "SILU": int(self.activation == "silu"),
        }
        shared = 4 * (THREADS // 32) * (taps + 1) * 32 * channels if name == "backward" else 0
        SOURCE.launch(
            name,
            settings,
            params,
            blocks=batch * self.token_blocks * params.channel_blocks,
            threads=THREADS,
            shared=shared,
            device=x.device,
        )
