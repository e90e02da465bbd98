"""A million tokens of 4,096 channels: more elements than 32 bits count, so offsets must be 64 bits wide.

The last channels, which lie beyond the 2^31st element for the most part of the sequence, must come out as
they do by themselves, where every offset is small.
"""

from __future__ import annotations

import pytest
import torch

from mambakit import ops

LENGTH, CHANNELS, KEPT, HEAD = 2**20, 4096, 128, 64
GRADIENTS_NEED = 110 * 2**30
"""Bytes of memory: seven tensors of the size of `x` besides it."""

pytestmark = pytest.mark.gpu


def normal(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16)).mul_(scale)


def draw(op):
    """Name -> input, and the names of those with a channel dimension at the end (or heads before it)."""
    torch.manual_seed(0)
    d, heads = CHANNELS, CHANNELS // HEAD
    x = normal(1, LENGTH, d)
    if op == "causal_conv1d":
        return {"x": x, "weight": normal(d, 4), "bias": normal(d)}
    if op == "norm":
        return {"x": x, "weight": normal(d), "z": normal(1, LENGTH, d)}
    B, C = (normal(1, LENGTH, 1, 16) for _ in range(2))
    if op == "selective_scan":
        A = -torch.rand(d, 16, device="cuda") - 0.1
        return {
            "x": x,
            "dt": normal(1, LENGTH, d, scale=0.5),
            "A": A,
            "B": B,
            "C": C,
            "z": normal(1, LENGTH, d),
        }
    A = -torch.rand(heads, device="cuda") - 0.1
    dt = normal(1, LENGTH, heads, scale=0.5)
    return {"x": x.view(1, LENGTH, heads, HEAD), "dt": dt, "A": A, "B": B, "C": C}


def last(op, given):
    """The inputs of the last channels; of the last rows, where a row is one sum."""
    if op == "norm":
        return {k: v[:, -KEPT:].clone() if v.dim() == 3 else v for k, v in given.items()}
    heads = {"ssd": KEPT // HEAD}.get(op, KEPT)
    cut = {}
    for name, v in given.items():
        if name in ("B", "C"):
            cut[name] = v
        elif name in ("A", "weight", "bias"):
            cut[name] = v[-heads:].clone()
        else:
            cut[name] = v[:, :, -heads:].clone()
    return cut


def run(op, given, dy=None):
    """Outputs; with `dy`, the gradients of `x` and of what lies beside it."""
    settings = {"causal_conv1d": {"activation": "silu"}, "norm": {"group_size": CHANNELS}}
    settings |= {name: {"dt_softplus": True} for name in ("selective_scan", "ssd")}
    leaves = [given[k].requires_grad_(dy is not None) for k in ("x", "dt", "z") if k in given]
    with torch.set_grad_enabled(dy is not None):
        y = getattr(ops, op)(**given, **settings[op])
        y = y[0] if isinstance(y, tuple) else y
        return (y.detach(), *(torch.autograd.grad(y, leaves, dy) if dy is not None else ()))


def close(found, wanted):
    """To the rounding of bf16; every token of a sequence by itself."""
    found, wanted = found.float().flatten(2), wanted.float().flatten(2)
    difference = (found - wanted).norm(dim=-1) / (wanted.norm(dim=-1) + 0.1)
    assert difference.max() < 0.02, f"{difference.max()} at token {difference.argmax()}"


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv1d", "norm"])
def test_a_million_tokens_of_4096_channels(op, gradients):
    if gradients and torch.cuda.get_device_properties(0).total_memory < GRADIENTS_NEED:
        pytest.skip(f"needs {GRADIENTS_NEED >> 30} GiB of GPU memory")
    given = draw(op)
    dy = torch.randn_like(given["x"]) if gradients else None
    few = last(op, given)
    beside = None if dy is None else last(op, {"x": dy})["x"]
    wanted = run(op, few, beside)
    found = run(op, given, dy)
    assert found[0].numel() > 2**31
    for whole, part in zip(found, wanted, strict=True):
        close(last(op, {"x": whole})["x"], part)
        del whole
    torch.cuda.empty_cache()
