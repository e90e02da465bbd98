"""Cross entropy on GPUs: how the Triton kernels of `triton_kernels.py` are started, and on what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.ops import triton_utils
from mambakit.ops.operands import rows

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096
"""Scores that a program holds at once."""

kernels = triton_utils.Kernels("mambakit.ops.cross_entropy.triton_kernels")


def unsupported(logits: Tensor, labels: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := triton_utils.runs_on(logits.device):
        return reason
    if logits.dtype not in dtypes:
        return f"takes float32, bfloat16 and float16, not {logits.dtype}"
    return None


def infer(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and best columns."""
    return forward(logits, labels)[0]


def forward(logits: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Nats and best columns, and the logarithm of every row's sum."""
    scores = rows(logits, logits.dtype)
    count, v = scores.shape
    nats, log_sums = (torch.empty(count, dtype=torch.float32, device=scores.device) for _ in range(2))
    best = torch.empty(count, dtype=torch.int64, device=scores.device)
    if count:
        block = min(BLOCK, triton_utils.block(v))
        kernels.forward[(count,)](
            scores, labels.contiguous(), nats, best, log_sums, scores.stride(0), v, BLOCK=block, num_warps=8
        )
    return (nats, best), [log_sums]


def saved_like(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The logarithm of every row's sum, unfilled."""
    return [logits.new_empty(len(logits), dtype=torch.float32)]


def backward(
    saved: Sequence[Tensor], grads: Sequence[Tensor], logits: Tensor, labels: Tensor
) -> list[Tensor | None]:
    """The gradient of the scores."""
    scores = rows(logits, logits.dtype)
    count, v = scores.shape
    found = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if count:
        block = min(BLOCK, triton_utils.block(v))
        kernels.backward[(count, -(-v // block))](
            scores,
            labels.contiguous(),
            saved[0],
            grads[0],
            found,
            scores.stride(0),
            v,
            BLOCK=block,
            num_warps=8,
        )
    return [found, None]
