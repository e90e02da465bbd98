"""What length costs: time against length, and memory and time of a token against what has been read.

The operators of one layer of a given width: Mamba's scan (twice as many channels, 16 states), Mamba-2's
(twice as many channels in heads of 64, 128 states) and attention (heads of 64). Projections, which all three
need alike, are left out. Decoding runs models of the same width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Bench, Case, DeclinedError, Opened, Ready
from benchmarks.suites import OURS
from benchmarks.work import weight_bytes
from mambakit import LanguageModel, LanguageModelConfig, Mamba1Config
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mixer import State
from mambakit.testing import speakers, workloads
from mambakit.testing.workloads import Workload

F32, BF16 = torch.float32, torch.bfloat16
HEAD = 64
PIECE = 4096
"""Tokens read at once on the way to a context."""
MOST_SECONDS = {"cpu": 12.0, "cuda": 5.0}
"""Of one call; a variant whose next length would take longer is not measured there."""

MOST_READING = 120.0
"""Seconds on the way from one context to the next."""

WIDTH = {"cpu": 64, "cuda": 1024}
DECODER = {"cpu": {"d_model": 128, "layers": 2}, "cuda": {"d_model": 1024, "layers": 4}}
LETTERS = {"mamba1": "S", "mamba2": "M", "attention": "*"}


def cases(bench: Bench) -> Iterator[Case]:
    """Operators by length, forward and with gradients; then decoding by context."""
    kind = bench.device.type
    lengths = [2**k for k in (range(5, 8) if bench.quick else range(10, 21))]
    dtype = BF16 if kind == "cuda" else F32
    for backward in (False, True):
        for length in lengths:
            at = {"length": length, "backward": backward, "width": WIDTH[kind]}
            name = f"{'with gradients' if backward else 'forward'} length {length}"
            opened = functools.partial(_operators, bench, WIDTH[kind], length, backward, dtype)
            yield Case(name, opened, dtype, at, together=False, clocks=("host", "graph"))
    decoders = _Decoders(bench, dtype)
    for length in lengths:
        yield Case(
            f"decode after {length}",
            functools.partial(decoders.open, length),
            dtype,
            {"context": length, "width": decoders.sizes["d_model"], "layers": decoders.sizes["layers"]},
            together=False,
            clocks=("host", "events"),  # attention reads its length on the host, which no graph can
        )


# ---------------------------------------------------------------------------------------------------------
# Operators


def _operators(bench: Bench, width: int, length: int, backward: bool, dtype: torch.dtype) -> Opened:
    works = {
        "selective_scan": workloads.selective_scan(1, length, 2 * width),
        "ssd": workloads.ssd(1, length, 2 * width // HEAD),
        "attention": workloads.attention(1, length, width // HEAD),
    }
    variants: dict[str, Callable[[], Ready]] = {}
    for name, work in works.items():
        short = _at_length(work, 64).inputs(dtype, bench.device)
        for backend in work.backends(short):
            label = f"{OURS} {name} {backend}"
            variants[label] = functools.partial(_operator, bench, label, work, backend, backward, dtype)
    return Opened(variants, tokens=length)


def _at_length(work: Workload, length: int) -> Workload:
    """The same work at another length."""
    make = getattr(workloads, work.op)
    return make(**{**work.sizes, "l": length})


def _operator(
    bench: Bench, label: str, work: Workload, backend: str, backward: bool, dtype: torch.dtype
) -> Ready:
    length = work.sizes["l"]
    if before := bench.found("scaling", label, length=length // 2, backward=backward):
        if before["status"] != "measured":
            raise DeclinedError(f"not measured at {length // 2} either")
        expected = (4 if work.op == "attention" else 2) * before["median"]
        if expected > (limit := MOST_SECONDS[bench.device.type]):
            raise DeclinedError(f"would take about {expected:.0f} s; none is given more than {limit:g} s")
    error = bench.check(work.op, backend, dtype)
    inputs = work.inputs(dtype, bench.device)
    call = work.call(inputs, backend)
    if length <= 2 * PIECE:
        error = max(error, work.check(label, call, inputs, backward))
    dy = work.gradient(inputs) if backward else None
    moved, flops = work.moved(inputs, backward), work.flops(inputs, backward)
    return Ready(lambda: call.run(dy), error, moved, flops)


# ---------------------------------------------------------------------------------------------------------
# Decoding


class _Decoders:
    """One model of each kind, whose state has read ever more tokens.

    The scans' models really read them. Attention's cache is said to be as long as it should be, since filling
    it takes time squared; what it holds does not matter for time and memory.
    """

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        self.bench, self.dtype = bench, dtype
        self.sizes = {"d_model": 32, "layers": 1} if bench.quick else DECODER[bench.device.type]
        self.models: dict[str, tuple[LanguageModel, float]] = {}  # with the error that its check found
        self.states: dict[str, tuple[int, State]] = {}
        self.reading: dict[str, float] = {}  # seconds from one context to the next

    def open(self, context: int) -> Opened:
        """The case of one context."""
        makers = {"mamba1": self._scan, "mamba2": self._scan, "attention": self._attention}
        variants = {f"{OURS} {kind}": functools.partial(make, kind, context) for kind, make in makers.items()}
        return Opened(variants, tokens=1)

    def _model(self, kind: str) -> tuple[LanguageModel, float]:
        if kind not in self.models:
            heads = max(1, self.sizes["d_model"] // HEAD)
            torch.manual_seed(0)
            model = LanguageModel(
                LanguageModelConfig(
                    vocab_size=256,
                    d_model=self.sizes["d_model"],
                    pattern=f"{self.sizes['layers']}{LETTERS[kind]}",
                    mixers={"S": Mamba1Config(), "*": AttentionConfig(n_heads=heads)},
                ),
                device=self.bench.device,
                dtype=self.dtype,
            ).eval()
            error = speakers.check_writing(f"decoding of {kind}", speakers.Ours(model), model)
            self.models[kind] = model, error
        return self.models[kind]

    def _scan(self, kind: str, context: int) -> Ready:
        model, error = self._model(kind)
        read, state = self.states.get(kind, (0, model.init_state(1)))
        if (expected := 2 * self.reading.get(kind, 0.0)) > MOST_READING:
            raise DeclinedError(f"reading so far would take about {expected:.0f} s")
        begun = time.monotonic()
        with torch.no_grad():
            for start in range(read, context, PIECE):
                length = min(PIECE, context - start)
                tokens = torch.randint(256, (1, length), device=self.bench.device)
                model.features(tokens, state)
        self.states[kind] = context, state
        self.reading[kind] = time.monotonic() - begun
        moved = weight_bytes(model) + 2 * state.nbytes
        facts = _memory(state, self.bench.device)
        return Ready(_step(model, state.clone(), self.bench.device), error, moved, facts=facts)

    def _attention(self, kind: str, context: int) -> Ready:
        model, error = self._model(kind)
        state = model.init_state(1, max_length=context + 1)
        step = _step(model, state, self.bench.device)
        lengths = [block["length"] for block in state.values()]

        def run() -> Any:
            for length in lengths:
                length.fill_(context)
            return step()

        moved = weight_bytes(model) + state.nbytes
        return Ready(run, error, moved, facts=_memory(state, self.bench.device))


def _step(model: LanguageModel, state: State, device: torch.device) -> Callable[[], Any]:
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def run() -> Any:
        with torch.no_grad():
            return token.copy_(model(token, state)[:, -1:].argmax(-1))

    return run


def _memory(state: State, device: torch.device) -> dict[str, int]:
    """Bytes of the state, and of everything that the process (or the GPU's tensors) holds."""
    found = {"state_bytes": state.nbytes}
    if device.type == "cuda":
        return {**found, "held_bytes": torch.cuda.memory_allocated(device)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text(encoding="ascii").split()[1])
        found["held_bytes"] = pages * 4096
    return found
