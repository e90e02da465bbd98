"""An exponential moving average of the weights, kept beside the model.

    average <- decay * average + (1 - decay) * weights      after every optimiser step

starting from the weights after the first step. Where a run keeps one, its evaluations and the model it leaves
behind are the average (Polyak and Juditsky, 1992, for the idea; the exponential form is common practice).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of a model's parameters; buffers are copied, tied parameters stay tied.

    `torch.optim.swa_utils.AveragedModel` does the same, but waits for the GPU in every step to look at its
    own counter.

    Args:
        model: The model in training; its copy is a deep one, so average before compiling.
        decay: Share of the old average kept in each step, in (0, 1).

    Attributes:
        module: The averaged model.
        updates: Number of steps averaged over.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights of one more step into the average."""
        averages, weights = list(self.module.parameters()), list(model.parameters())
        if self.updates:
            self._mix(averages, weights, self.updates)
        else:
            torch._foreach_copy_(averages, weights)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
