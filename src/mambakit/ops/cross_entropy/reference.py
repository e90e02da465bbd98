"""Cross entropy by its formula: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of `mambakit.ops.cross_entropy`, term by term."""
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != -100
    wanted = work.gather(1, torch.where(counts, labels, 0).long()[:, None])[:, 0]
    top = work.detach().amax(1)
    nats = top + (work - top[:, None]).exp().sum(1).log() - wanted
    return torch.where(counts, nats, torch.zeros_like(nats)), work.detach().argmax(1)
