"""Other implementations of the same work, each in a file of its own, imported when it is asked for.

`OFFERS` says who offers what, so that a peer which is not installed can be listed as missing. A peer's file
has, for what it offers, `operators[name](inputs) -> Call`, `mixers[kind](ours) -> module` and
`models[kind](ours) -> Speaker`, always with our weights. Install them with `pip install '.[bench]'` (CPUs) or
`'.[bench-gpu]'` (needs nvcc).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.testing.speakers import Step

DISTRIBUTIONS = {
    "transformers": "transformers",
    "mambapy": "mambapy",
    "llama_cpp": "llama-cpp-python",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
}
"""Peer -> the distribution that has it."""

ON = {
    "transformers": ("cpu", "cuda"),
    "mambapy": ("cpu", "cuda"),
    "llama_cpp": ("cpu",),
    "mamba_ssm": ("cuda",),
    "causal_conv1d": ("cuda",),
    "torch": ("cpu", "cuda"),
}
"""Peer -> devices on which it is compared."""

OFFERS = {
    "selective_scan": ("transformers", "mambapy", "mamba_ssm"),
    "ssd": ("transformers", "mamba_ssm"),
    "causal_conv1d": ("torch", "causal_conv1d"),
    "norm": ("torch", "mamba_ssm"),
    "mixers mamba1": ("transformers", "mambapy", "mamba_ssm"),
    "mixers mamba2": ("transformers", "mamba_ssm"),
    "models mamba1": ("transformers", "mambapy", "llama_cpp", "mamba_ssm"),
    "models mamba2": ("transformers", "llama_cpp", "mamba_ssm"),
}
"""What is measured -> who else does it."""


class MissingError(Exception):
    """A peer cannot be imported here, or its version lacks what is needed."""


def offering(what: str, device: torch.device) -> Iterator[str]:
    """Names of the peers to compare with, installed or not."""
    return (name for name in OFFERS.get(what, ()) if device.type in ON[name])


def load(name: str) -> ModuleType:
    """The file of a peer.

    Raises:
        MissingError: What it needs cannot be imported.
    """
    try:
        return importlib.import_module(f"benchmarks.peers.{name}")
    except ImportError as error:
        raise MissingError(f"{DISTRIBUTIONS.get(name, name)} cannot be imported: {error}") from error


def versions() -> dict[str, str | None]:
    """Version of every peer's distribution, `None` where it is not installed."""
    found: dict[str, str | None] = {}
    for distribution in DISTRIBUTIONS.values():
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def renamed(ours: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """Our weights under another library's names.

    Args:
        ours: A language model or mixer of ours.
        names: Part of our name -> part of theirs, applied in this order.

    Returns:
        Their state dict.
    """
    weights = {}
    for name, tensor in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor
    return weights


PUBLISHED = {"ssm.dt_bias": "dt_proj.bias", "ssm.": ""}
"""From our names inside a mixer to the published ones."""


class Theirs:
    """Another library's PyTorch model; its file says how to call it.

    Args:
        module: The model.
        logits: From tokens `(b, l)` to logits `(b, l, v)`, for training.
        read: See `Speaker.read`.
        decoder: See `Speaker.decoder`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        logits: Callable[[Tensor], Tensor],
        read: Callable[[Tensor], Tensor],
        decoder: Callable[[int], Step],
    ) -> None:
        self.module, self._logits, self.read, self.decoder = module, logits, read, decoder

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """See `Speaker.loss`."""
        return F.cross_entropy(self._logits(tokens).float().flatten(0, 1), labels.flatten())
