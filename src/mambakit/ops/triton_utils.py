"""What the Triton kernels of this library share: where they run, and how they are started.

Triton is imported with the first kernel, not with the package. Without a GPU, Triton's interpreter runs the
same kernels where `TRITON_INTERPRET=1` was set before that (`mambakit.testing.emulation`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

TRITON = "triton"
LEAST_CAPABILITY = (8, 0)


def runs_on(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None.

    Args:
        device: Where the inputs are.

    Returns:
        A reason for a user.
    """
    if device.type != "cuda":
        return f"takes tensors on a CUDA device, not on {device.type!r}"
    return _missing(device.index)


@functools.cache
def _missing(index: int | None) -> str | None:
    if importlib.util.find_spec(TRITON) is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"needs compute capability {LEAST_CAPABILITY}, this GPU has {capability}"
    return None


class Kernels:
    """A module of kernels, imported (and Triton with it) when the first of them is used.

    Args:
        module: Its full name.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        """A kernel by its name."""
        kernel = getattr(importlib.import_module(self._module), name)
        setattr(self, name, kernel)
        return kernel


def block(size: int, least: int = 16) -> int:
    """The power of two, at least `least` (of a matrix product's operand), that covers a size."""
    return max(least, 1 << (size - 1).bit_length())
