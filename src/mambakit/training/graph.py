"""A training step recorded once and replayed as one CUDA graph.

Small models on a fast GPU spend their time launching kernels, not running them. A recorded step launches
all of them at once; it computes exactly what the recorded calls compute, from the same addresses. So
everything that changes from step to step lives in tensors that are overwritten in place: the batch, the
learning rates, the step's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mambakit.config import ConfigError

WARM_UP = 3
"""Steps run normally first, so that libraries and the optimiser have made what they keep."""


class StepGraph:
    """Runs a step normally a few times, records it, and from then on replays it.

    Args:
        step: `step(parts, targets) -> outputs`: device work only, which leaves gradients behind.
        forget: Drops the gradients of a step that was run normally.
    """

    def __init__(
        self, step: Callable[[list[dict[str, Tensor]], int], Any], forget: Callable[[], None]
    ) -> None:
        self._step, self._forget = step, forget
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()
        self._warm = 0

    def __call__(self, parts: list[dict[str, Tensor]], targets: int) -> Any:
        """Do one step.

        Args:
            parts: The batch in parts, on the device.
            targets: Labels of the whole step.

        Returns:
            What the step returns; overwritten by the next call.

        Raises:
            ConfigError: A batch of another shape, or another number of labels, than the recorded one.
        """
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._normally(parts, targets)
        signature = targets, [_shapes(part) for part in parts]
        if self._graph is None:
            self._record(parts, targets)
            self._signature = signature
        if signature != self._signature:
            raise ConfigError(
                f"train.cuda_graph: the step was recorded for {self._signature}, this batch is {signature}; "
                "batches of changing shape or number of labels need cuda_graph=false"
            )
        for static, part in zip(self._inputs, parts, strict=True):
            for name, tensor in part.items():
                static[name].copy_(tensor)
        self._graph.replay()
        return self._outputs

    def _normally(self, parts: list[dict[str, Tensor]], targets: int) -> Any:
        # On the stream of the recording, which asks for warmed-up libraries there.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = self._step(parts, targets)
            self._forget()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, parts: list[dict[str, Tensor]], targets: int) -> None:
        self._inputs = [{name: tensor.clone() for name, tensor in part.items()} for part in parts]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads pin memory for the loader meanwhile; only this one is recorded.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._outputs = self._step(self._inputs, targets)
        self._graph = graph


def _shapes(part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in part.items()}
