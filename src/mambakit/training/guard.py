"""Stops a run at its first number that is not finite, and names the step and the tensor.

Asking a GPU after every step whether all is well would make it wait each time. So the verdict stays on the
device: the first bad step raises a flag that also makes the fused optimiser skip its update, from then on.
However late the flag is read, the weights are those from before the bad step, its batch is known by number,
and running it again shows where it went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """A run met a NaN or an infinity.

    Args:
        step: The optimiser step, counted from 1 as in the logs.
        tensor: What was found: the first non-finite tensor and how much of it.
        advice: What the user can do now.
    """

    def __init__(self, step: int, tensor: str, advice: str) -> None:
        super().__init__(f"step {step} is not finite; first non-finite tensor: {tensor}. {advice}")
        self.step = step
        self.tensor = tensor


class Guard:
    """Watches the loss and the gradient norm of every step.

    Attributes:
        tripped: 1.0 from the first bad step on, else 0.0; a scalar on the device, what AdamW calls
            `found_inf`.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self, step: int | Tensor, loss: Tensor, norm: Tensor) -> None:
        """Judge one step without waiting for the device.

        Args:
            step: Its number, from 1; a tensor where the call is recorded.
            loss: Scalar.
            norm: Norm of the whole gradient, scalar.
        """
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm.detach()))
        self._first += torch.where(bad & (self._first == 0), step, 0)
        self.tripped.copy_(self._first > 0)

    def first(self) -> int | None:
        """Number of the first bad step, or None; waits for the device."""
        return int(self._first) or None


def diagnose(
    model: nn.Module, batches: list[dict[str, Tensor]], loss: Callable[[dict[str, Tensor]], Tensor]
) -> str:
    """Run a step again and name the first tensor in it that is not finite.

    Args:
        model: The model with the weights from before the step. Its gradients are used up.
        batches: The parts of the step's batch.
        loss: What the step computes for one part, a scalar.

    Returns:
        A phrase such as `activation of backbone.blocks.3.mixer (12 of 4096 values)`.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if trouble := _trouble(tensor):
            return f"parameter {name} {trouble}"
    model.zero_grad(set_to_none=True)
    found: list[str] = []
    with torch.compiler.set_stance("force_eager"), _listening(model, found):
        for batch in batches:
            found += [
                f"{key} of the batch {trouble}"
                for key, value in batch.items()
                if (trouble := _trouble(value))
            ]
            value = loss(batch)
            if not found and (trouble := _trouble(value)):
                found.append(f"loss {trouble}")
            if not found:
                value.backward()
            if found:
                return found[0]
    return "none on a second run: the norm of finite gradients overflows, or chance (dropout) decided"


@contextmanager
def _listening(model: nn.Module, found: list[str]) -> Iterator[None]:
    """While entered, note activations in forward order and parameters' gradients in backward order."""

    def activation(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            for tensor in tensors:
                if not found and isinstance(tensor, Tensor) and (trouble := _trouble(tensor)):
                    found.append(f"activation of {name or 'the model'} {trouble}")

        return look

    def gradient(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if not found and parameter.grad is not None and (trouble := _trouble(parameter.grad)):
                found.append(f"gradient of {name} {trouble}")

        return look

    handles = [module.register_forward_hook(activation(name)) for name, module in model.named_modules()]
    handles += [
        parameter.register_post_accumulate_grad_hook(gradient(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trouble(tensor: Tensor) -> str:
    """How much of a tensor is not finite, in words; empty if all is well."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    return f"({bad} of {tensor.numel()} values)" if bad else ""
