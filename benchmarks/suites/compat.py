"""transformers' own models learning and reading, on our kernels (`mambakit.compat`) and on its PyTorch code.

Both variants are the same classes with the same weights and take turns in one process; the first runs within
`compat.install()`. On a CPU 4 of the 24 layers of the 130M shapes, one sequence of 512 tokens; on a GPU all
layers, and as much as its PyTorch code has memory for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.runner import Bench, Case, Opened, Ready
from benchmarks.suites import OURS
from benchmarks.suites.models import KINDS, random_model
from benchmarks.work import block_flops, head_flops, weight_bytes
from mambakit import compat
from mambakit.testing import speakers

# size, batch, length, whether training multiplies matrices in bf16
GPU = (("130m", 2, 1024, True),)
CPU = (("130m/6", 1, 512, False),)
QUICK = (("toy", 2, 40, False),)


def cases(bench: Bench) -> Iterator[Case]:
    """A training step and a prompt, by both models."""
    table = QUICK if bench.quick else GPU if bench.device.type == "cuda" else CPU
    for size, batch, length, autocast in table:
        for kind in KINDS:
            for verb in ("learn", "read"):
                name = f"{verb} {kind} {size} b{batch} l{length} in transformers"
                at = {"kind": kind, "size": size, "b": batch, "l": length, "verb": verb}
                yield Case(name, functools.partial(_open, bench, at, autocast), torch.float32, at)


def _open(bench: Bench, at: dict[str, Any], autocast: bool) -> Opened:
    model = random_model(at["kind"], at["size"], torch.float32, bench.device)
    tokens = torch.randint(model.config.vocab_size, (at["b"], at["l"] + 1), device=bench.device)

    def ready(name: str, within: Callable[[], contextlib.AbstractContextManager[Any]]) -> Ready:
        speaker = peers.load("transformers").models[at["kind"]](model)
        with within():
            if at["verb"] == "read":
                error = speakers.check_reading(name, speaker, model)
                run = speakers.reading(speaker, tokens[:, :-1])
            else:
                error = speakers.check_learning(name, speaker, model)
                run = speakers.learning(speaker, tokens[:, :-1], tokens[:, 1:], autocast)

        def timed() -> Tensor:
            with within():
                return run()

        return Ready(timed, error)

    count, factor = at["b"] * at["l"], 3 if at["verb"] == "learn" else 1
    flops = block_flops(model, count, at["l"])
    flops += head_flops(model, count if at["verb"] == "learn" else at["b"])
    moved = (11 if at["verb"] == "learn" else 1) * weight_bytes(model)
    variants = {
        f"{OURS} in transformers": functools.partial(ready, "transformers, installed", compat.install),
        "transformers": functools.partial(ready, "transformers", contextlib.nullcontext),
    }
    return Opened(variants, moved, factor * flops, count)
