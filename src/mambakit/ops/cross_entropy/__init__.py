"""Cross entropy of scores against labels: the loss of language models, for one wide row per token.

A row of scores has as many numbers as the vocabulary, so what matters is how often it passes through memory:
once forwards and once (read, and the gradient written) backwards. See MATH.md beside this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.ops import shapes
from mambakit.ops.cross_entropy import chunked, reference, triton
from mambakit.ops.dispatch import Op

IGNORED = -100
"""The label of a row that does not count."""


def _fake(logits: Tensor, labels: Tensor) -> list[Tensor]:
    work = torch.promote_types(logits.dtype, torch.float32)
    return [logits.new_empty(len(logits), dtype=work), labels.new_empty(len(logits), dtype=torch.int64)]


_op = Op(
    "cross_entropy",
    {"triton": triton, "chunked": chunked, "reference": reference},
    outputs=2,
    fake=_fake,
    flops=lambda logits, *_: 4 * logits.numel(),
)


def cross_entropy(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Surprise of every row's label, and the row's best guess.

        nats_i = log(sum_j exp(logits_ij)) - logits_i,label_i,        best_i = argmax_j logits_ij

    Rows labelled -100 have 0 nats and no gradient. Everything is computed in float32 at least.

    Args:
        logits: Scores `(n, v)`, natural logarithms up to a constant per row.
        labels: The right column of each row `(n,)`, integers; -100 for a row that does not count.
        backend: Name of a backend; chosen automatically by default.

    Returns:
        Nats `(n,)` in float32 (float64 for float64 scores), and columns `(n,)`, int64, the first of equals.

    Raises:
        ValueError: Shapes that do not fit, or a backend that cannot take the inputs. A label outside the row
            is not looked for where that would make a GPU wait; its nats are NaN there.

    Source:
        The loss of equation 1 in Bengio et al., "A neural probabilistic language model" (2003).
    """
    shapes.check("cross_entropy", logits=(logits, "n v"), labels=(labels, "n"))
    return _op(logits, labels, backend=backend)
