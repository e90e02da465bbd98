"""The suites: which work is measured, at which sizes, against whom."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from mambakit.ops.dispatch import registry

if TYPE_CHECKING:
    from benchmarks.runner import Bench, Case

NAMES = ("operators", "modules", "models", "scaling", "compat")

OURS = "mambakit"
"""How the names of our own variants begin."""


def ours(device: torch.device) -> dict[str, str | None]:
    """Our variants of whole layers and models -> the backend to force: as it comes, and without kernels."""
    meant_for = {
        getattr(op.backends[name], "device", None) for op in registry.values() for name in op.kernels
    }
    return {OURS: None, **({f"{OURS} chunked": "chunked"} if device.type in meant_for else {})}


def cases(name: str, bench: Bench) -> Iterable[Case]:
    """The cases of a suite for a device, most important first."""
    return importlib.import_module(f"benchmarks.suites.{name}").cases(bench)
