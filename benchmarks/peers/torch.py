"""PyTorch's own functions for the small operators, in the layout that they want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mambakit.testing.workloads import Call


def _causal_conv1d(inputs: Mapping[str, Any]) -> Call:
    """`conv1d` over channels-first data, padded and cut, then `silu`: what most Mamba code falls back to."""
    theirs = {
        "x": inputs["x"].detach().mT.contiguous().requires_grad_(),
        "weight": inputs["weight"],
        "bias": inputs["bias"],
    }
    d, w = inputs["weight"].shape

    def forward() -> Tensor:
        t = theirs
        y = F.conv1d(t["x"], t["weight"].unsqueeze(1), t["bias"], padding=w - 1, groups=d)
        return F.silu(y[..., : t["x"].shape[-1]])

    return Call(forward, theirs, dict.fromkeys(("y", "x"), lambda t: t.mT), lambda y: y.mT.contiguous())


def _norm(inputs: Mapping[str, Any]) -> Call:
    """`rms_norm`, with the gate before it where there is one."""
    theirs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def forward() -> Tensor:
        t = theirs
        u = t["x"] * F.silu(t["z"]) if "z" in t else t["x"]
        return F.rms_norm(u, t["weight"].shape, t["weight"], 1e-5)

    return Call(forward, theirs)


operators = {"causal_conv1d": _causal_conv1d, "norm": _norm}
