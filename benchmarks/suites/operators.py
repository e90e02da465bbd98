"""Operators, forward and with gradients, at the sizes of real models.

On a GPU the sizes of the published models (2.8B: 5,120 channels; 1.4B: 4,096; 130M: 1,536), at two ways of
cutting 16,384 tokens and at lengths where rows and channels fill no GPU. On a CPU those of the 130M model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers
from benchmarks.runner import Bench, Case, Opened, Ready
from benchmarks.suites import OURS
from mambakit.testing import workloads
from mambakit.testing.workloads import Call, Workload

F32, BF16 = torch.float32, torch.bfloat16

GPU = (
    (workloads.selective_scan(8, 2048, 4096), (BF16, F32)),
    (workloads.ssd(8, 2048, 64), (BF16,)),
    (workloads.causal_conv1d(8, 2048, 4096), (BF16,)),
    (workloads.norm(8, 2048, 2048), (F32, BF16)),
    (workloads.norm(8, 2048, 4096, gated=True), (BF16,)),
    (workloads.ssd(1, 65536, 24), (BF16,)),
    (workloads.ssd(8, 2048, 128, g=8), (BF16,)),
    (workloads.selective_scan(2, 8192, 4096), (BF16,)),
    (workloads.selective_scan(1, 65536, 1536), (BF16,)),
    (workloads.causal_conv1d(2, 8192, 4352), (BF16,)),
    (workloads.ssd(2, 8192, 64), (BF16,)),
    (workloads.selective_scan(1, 1048576, 1536), (BF16,)),
)
CPU = (
    (workloads.selective_scan(1, 1024, 1536), (F32, BF16)),
    (workloads.ssd(1, 2048, 24), (F32, BF16)),
    (workloads.causal_conv1d(1, 2048, 1536), (F32, BF16)),
    (workloads.norm(1, 2048, 768), (F32,)),
    (workloads.norm(1, 2048, 1536, gated=True), (F32, BF16)),
    # Short enough for those whose backward pass is quadratic in length.
    (workloads.selective_scan(1, 128, 1536), (F32,)),
    (workloads.selective_scan(1, 4096, 1536), (F32,)),
)
QUICK = (
    (workloads.selective_scan(1, 96, 80, n=4), (F32, BF16)),
    (workloads.ssd(1, 96, 2, p=8, n=8), (F32,)),
    (workloads.causal_conv1d(1, 64, 72), (F32,)),
    (workloads.norm(1, 16, 32), (F32,)),
    (workloads.norm(1, 16, 32, gated=True), (F32,)),
)


def cases(bench: Bench) -> Iterator[Case]:
    """Every operator, size and type; forward, then forward and backward."""
    table = QUICK if bench.quick else GPU if bench.device.type == "cuda" else CPU
    for work, dtypes in table:
        for dtype in dtypes:
            for backward in (False, True):
                yield _case(bench, work, dtype, backward)


def _case(bench: Bench, work: Workload, dtype: torch.dtype, backward: bool) -> Case:
    name = f"{work.name} {str(dtype)[6:]}{' with gradients' if backward else ''}"
    at = {**work.sizes, "backward": backward}
    return Case(name, lambda: _open(bench, work, dtype, backward), dtype, at)


def _open(bench: Bench, work: Workload, dtype: torch.dtype, backward: bool) -> Opened:
    inputs = work.inputs(dtype, bench.device)
    dy = work.gradient(inputs) if backward else None

    def ready(name: str, make: Callable[[], Call]) -> Ready:
        call = make()
        error = work.check(name, call, inputs, backward)
        theirs = None if dy is None else call.theirs(dy)
        return Ready(lambda: call.run(theirs), error)

    def ours(backend: str) -> Ready:
        small = bench.check(work.op, backend, dtype)
        checked = ready(f"{work.op}, backend {backend}", lambda: work.call(inputs, backend))
        return Ready(checked.run, max(small, checked.error))

    def theirs(peer: str) -> Ready:
        return ready(f"{work.op} of {peer}", lambda: peers.load(peer).operators[work.op](inputs))

    variants: dict[str, Any] = {
        f"{OURS} {backend}": lambda backend=backend: ours(backend) for backend in work.backends(inputs)
    }
    variants |= {peer: lambda peer=peer: theirs(peer) for peer in peers.offering(work.op, bench.device)}
    tokens = work.sizes["b"] * work.sizes["l"]
    return Opened(variants, work.moved(inputs, backward), work.flops(inputs, backward), tokens)
