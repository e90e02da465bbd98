"""A head and its cross entropy together, without all scores at once.

The scores of `n` tokens over a vocabulary of `v` are the largest tensor of a small language model. The loss
is a sum over tokens, so some tokens at a time are scored, their gradients taken at once, and their scores
dropped: memory for one chunk of scores, and no product computed twice. The head is called, not reached into:
it may be any module with parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.ops.cross_entropy import cross_entropy

SCORES = {"cpu": 2**26, "cuda": 2**27}
"""Most scores that exist at once: 256 MiB in float32. A GPU, which mostly scores in bfloat16, takes twice as
many: every chunk reads and writes the gradient of the head's weights, 1% of a training step at 130M."""


def summed_cross_entropy(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    *,
    scores: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `head(features)` against labels, summed over the rows.

    Args:
        head: Makes scores `(rows, v)` of features `(rows, d)`, each row for itself.
        features: Activations `(n, d)`.
        labels: The right column of each row `(n,)`, integers; -100 for a row that does not count.
        scores: Most scores to hold at once; by default `SCORES` of the device.
        vocab_size: `v`, where `head` does not tell it as `out_features`.

    Returns:
        The sum in nats, a differentiable scalar in float32 (float64 for float64 features), and the best
        column of each row `(n,)`. The sum can be differentiated once.

    Raises:
        ValueError: Shapes that do not fit, or a vocabulary of unknown size.
    """
    v = vocab_size or getattr(head, "out_features", None)
    if v is None:
        raise ValueError(
            f"summed_cross_entropy: {type(head).__name__} has no out_features, expected vocab_size"
        )
    if scores is None:
        scores = SCORES.get(features.device.type, SCORES["cpu"])
    rows = max(1, scores // v)
    if len(features) <= rows or torch.compiler.is_compiling():
        nats, best = cross_entropy(head(features), labels)
        return nats.sum(), best
    parameters = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (features.requires_grad or parameters):
        return _SummedCrossEntropy.apply(head, rows, features, labels, *parameters)
    parts = [cross_entropy(head(f), k) for f, k in zip(features.split(rows), labels.split(rows), strict=True)]
    return torch.stack([nats.sum() for nats, _ in parts]).sum(), torch.cat([best for _, best in parts])


class _SummedCrossEntropy(torch.autograd.Function):
    """Chunk by chunk; the gradients are taken in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, rows: int, features: Tensor, labels: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
        grad_features = torch.empty_like(features)
        wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        grads = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(parameters, wide, strict=True)]
        best = []
        for start in range(0, len(features), rows):
            here = slice(start, start + rows)
            with torch.enable_grad():
                chunk = features[here].detach().requires_grad_()
                nats, guesses = cross_entropy(head(chunk), labels[here])
                nats = nats.sum()
                found = torch.autograd.grad(nats, [chunk, *parameters])
            total += nats.detach()
            best.append(guesses)
            grad_features[here] = found[0]
            for grad, more in zip(grads, found[1:], strict=True):
                grad += more
        ctx.save_for_backward(grad_features, *grads)
        ctx.dtypes = [p.dtype for p in parameters]
        best = torch.cat(best)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        grad_features, *grads = ctx.saved_tensors
        scaled = [(g * grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (None, None, (grad_features * grad).to(grad_features.dtype), None, *scaled)
