"""Mamba and Mamba-2 mixers, projections included, forward and with the gradients of inputs and weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.runner import Bench, Case, DeclinedError, Opened, Ready
from benchmarks.suites import ours
from benchmarks.work import block_flops, weight_bytes
from mambakit import Mamba1Config, Mamba2Config, ops
from mambakit.layers.mixer import MixerConfig
from mambakit.testing.checks import AGREEMENT, check_same

F32, BF16 = torch.float32, torch.bfloat16

# d_model, batch, length, type
GPU = ((2048, 8, 2048, BF16), (2048, 1, 16384, BF16))
CPU = ((768, 1, 1024, F32), (768, 1, 1024, BF16))
QUICK = ((32, 1, 48, F32),)
SLOW_BACKWARD = {("transformers", "mamba1"): 256}
"""Peer and kind -> longest sequence with gradients: they are quadratic in length."""


def cases(bench: Bench) -> Iterator[Case]:
    """Both mixers; forward, then forward and backward."""
    small = {"d_state": 4}
    configs: dict[str, MixerConfig] = {
        "mamba1": Mamba1Config(**small) if bench.quick else Mamba1Config(),
        "mamba2": Mamba2Config(**small, headdim=8) if bench.quick else Mamba2Config(),
    }
    table = QUICK if bench.quick else GPU if bench.device.type == "cuda" else CPU
    for d_model, b, l, dtype in table:
        for kind, config in configs.items():
            for backward in (False, True):
                name = f"{kind} d_model{d_model} b{b} l{l} {str(dtype)[6:]}{' with gradients' * backward}"
                at = {"d_model": d_model, "b": b, "l": l, "backward": backward}
                yield Case(name, functools.partial(_open, bench, kind, config, at, dtype), dtype, at)


def _open(bench: Bench, kind: str, config: MixerConfig, at: dict[str, int], dtype: torch.dtype) -> Opened:
    torch.manual_seed(0)
    mixer = config.build(at["d_model"], device=bench.device, dtype=dtype)
    x = torch.randn(at["b"], at["l"], at["d_model"], device=bench.device, dtype=dtype)
    dy = torch.randn_like(x) if at["backward"] else None
    with ops.backend("reference"):
        short = x[:1, :64]
        right = _results(mixer, short, None if dy is None else dy[:1, :64])

    def ready(name: str, module: nn.Module, backend: str | None = None) -> Ready:
        def run(x: Tensor = x, dy: Tensor | None = dy) -> tuple[Tensor, ...]:
            with ops.backend(backend):
                return tuple(_results(module, x, dy).values())

        found = dict(zip(right, run(short, None if dy is None else dy[:1, :64]), strict=True))
        return Ready(run, check_same(name, found, right, AGREEMENT[dtype]))

    def theirs(peer: str) -> Ready:
        if dy is not None and at["l"] > (longest := SLOW_BACKWARD.get((peer, kind), at["l"])):
            raise DeclinedError(f"its backward pass is quadratic in length; not timed beyond {longest}")
        return ready(f"{kind} of {peer}", peers.load(peer).mixers[kind](mixer))

    variants: dict[str, Callable[[], Ready]] = {
        name: functools.partial(ready, f"{kind}, {name}", mixer, backend)
        for name, backend in ours(bench.device).items()
    }
    for peer in peers.offering(f"mixers {kind}", bench.device):
        variants[peer] = functools.partial(theirs, peer)
    tokens, factor = at["b"] * at["l"], 3 if at["backward"] else 1
    moved = factor * (weight_bytes(mixer) + 2 * x.nbytes)
    return Opened(variants, moved, factor * block_flops(mixer, tokens, at["l"]), tokens)


def _results(module: nn.Module, x: Tensor, dy: Tensor | None) -> dict[str, Tensor]:
    """Output and, under `dy`, the gradients of `x` and of the linear layers that every implementation has."""
    if dy is None:
        with torch.no_grad():
            return {"y": module(x)}
    x = x.detach().requires_grad_()
    y = module(x)
    weights = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, [x, *weights], dy)
    by_weight = {id(p): g for p, g in zip(weights, grads[1:], strict=True)}
    named = {f"d{n}": by_weight[id(getattr(module, n).weight)] for n in ("in_proj", "out_proj")}
    return {"y": y.detach(), "dx": grads[0], **named}
