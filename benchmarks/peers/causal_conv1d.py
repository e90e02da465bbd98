"""causal_conv1d: the published CUDA kernel, in both of its layouts (ours is channels-last)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from mambakit.testing.workloads import Call


def _causal_conv1d(inputs: Mapping[str, Any]) -> Call:
    """Channels-last: the transposed view of our own tensor, which its kernel recognises by the strides."""
    theirs = {key: inputs[key] for key in ("x", "weight", "bias")}

    def forward() -> Tensor:
        t = theirs
        return causal_conv1d_fn(t["x"].mT, t["weight"], t["bias"], activation="silu").mT

    return Call(forward, theirs)


operators = {"causal_conv1d": _causal_conv1d}
