"""Language models of the published shapes with random weights: reading prompts, writing tokens, learning.

On a GPU: 130M, 1.4B and 2.8B in bf16. On a CPU: 130M, and 4 of its 24 layers for training, which is what the
memory of other implementations allows on small machines. Every peer gets our weights and must give our
logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.runner import Bench, Case, DeclinedError, Opened, Ready
from benchmarks.suites import OURS, ours
from benchmarks.work import block_flops, head_flops, weight_bytes
from mambakit import LanguageModel, LanguageModelConfig, Mamba1Config, Mamba2Config
from mambakit.generation import DecodeEngine, RecordedDecoder
from mambakit.testing import speakers, timing
from mambakit.testing.speakers import Ours, Speaker, Step

F32, BF16 = torch.float32, torch.bfloat16
KINDS = ("mamba1", "mamba2")

SIZES = {
    "130m": {"d_model": 768, "layers": 24},
    "130m/6": {"d_model": 768, "layers": 4},
    "1.4b": {"d_model": 2048, "layers": 48},
    "2.8b": {"d_model": 2560, "layers": 64},
    "toy": {"d_model": 32, "layers": 2, "vocabulary": 61},
}
VOCABULARY = 50288
"""The published 50,280, rounded up to whole vectors."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a case does.

    Attributes:
        verb: `read`, `write` or `learn`.
        size: Key of `SIZES`.
        batch: Sequences.
        length: Tokens of each (of a prompt, of a training sequence).
        dtype: Of the weights.
        autocast: Whether training multiplies matrices in bf16.
        only: Peers to compare with; by default all that offer the model.
    """

    verb: str
    size: str
    batch: int
    length: int
    dtype: torch.dtype
    autocast: bool = False
    only: tuple[str, ...] | None = None


GPU = (
    Work("write", "130m", 1, 1, BF16),
    Work("learn", "130m", 8, 2048, F32, autocast=True, only=("mamba_ssm",)),
    Work("write", "2.8b", 64, 1, BF16),
    Work("write", "2.8b", 1, 1, BF16),
    Work("read", "1.4b", 4, 4096, BF16, only=("mamba_ssm",)),
    Work("learn", "1.4b", 4, 2048, F32, autocast=True, only=("mamba_ssm",)),
    Work("write", "130m", 4, 1, BF16, only=("mamba_ssm",)),
    Work("write", "130m", 16, 1, BF16, only=("mamba_ssm",)),
    Work("write", "130m", 64, 1, BF16, only=("mamba_ssm",)),
    # What those get who have no nvcc: half a minute for mamba1.
    Work("learn", "130m", 2, 1024, F32, autocast=True, only=("transformers",)),
)
CPU = (
    Work("write", "130m", 1, 1, F32),
    Work("write", "130m", 1, 1, BF16),
    Work("read", "130m", 1, 512, F32),
    Work("read", "130m", 1, 512, BF16),
    Work("learn", "130m/6", 4, 512, F32),
    Work("write", "130m", 4, 1, F32),
    Work("write", "130m", 16, 1, F32),
)
QUICK = (
    Work("read", "toy", 1, 40, F32),
    Work("write", "toy", 1, 1, F32),
    Work("write", "toy", 3, 1, F32),
    Work("learn", "toy", 2, 40, F32),
)

SLOW = {("learn", "mamba1", "transformers"): 256}
"""Verb, kind, peer -> most tokens on a CPU: quadratic in length."""

ENGINE = {
    F32: {"float32": 2e-3},
    BF16: {"bfloat16": 6e-2, "int8": 6e-2, "int4": 0.5},
}
"""Type of the model -> forms in which the decode engine keeps its weights -> largest relative difference of
logits, as for the peer that quantises too."""

_NAMES = {"read": "prefill", "write": "decode", "learn": "train"}


def cases(bench: Bench) -> Iterator[Case]:
    """Every kind of work by both models."""
    table = QUICK if bench.quick else GPU if bench.device.type == "cuda" else CPU
    for work in table:
        for kind in KINDS:
            length = "" if work.verb == "write" else f" l{work.length}"
            precision = "autocast" if work.autocast else str(work.dtype)[6:]
            name = f"{_NAMES[work.verb]} {kind} {work.size} b{work.batch}{length} {precision}"
            at = {"kind": kind, "size": work.size, "b": work.batch, "l": work.length, "verb": work.verb}
            alone = work.verb == "learn" and bench.device.type == "cuda"
            yield Case(name, functools.partial(_open, bench, work, kind), work.dtype, at, together=not alone)


@functools.lru_cache(maxsize=1)
def random_model(kind: str, size: str, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """A language model of ours with random weights; one at a time is kept from case to case."""
    shape = {"vocabulary": VOCABULARY, **SIZES[size]}
    mixer = {"mamba1": Mamba1Config, "mamba2": Mamba2Config}[kind]
    small = {"toy": {"mamba1": {"d_state": 4}, "mamba2": {"d_state": 8, "headdim": 8}}}
    torch.manual_seed(0)
    return LanguageModel(
        LanguageModelConfig(
            vocab_size=shape["vocabulary"],
            d_model=shape["d_model"],
            pattern=f"{shape['layers']}M",
            mixers={"M": mixer(**small.get(size, {}).get(kind, {}))},
        ),
        device=device,
        dtype=dtype,
    ).eval()


def _open(bench: Bench, work: Work, kind: str) -> Opened:
    model = random_model(kind, work.size, work.dtype, bench.device)
    tokens = torch.randint(model.config.vocab_size, (work.batch, work.length + 1), device=bench.device)
    decoders = _decoders(model) if work.verb == "write" else {}
    variants: dict[str, Callable[[], Ready]] = {
        name: lambda name=name, make=make: _ready(bench, work, f"{kind}, {name}", make(), model, tokens)
        for name, make in decoders.items()
    }
    variants |= {
        name: functools.partial(_ready, bench, work, f"{kind}, {name}", Ours(model, backend), model, tokens)
        for name, backend in ours(bench.device).items()
    }
    for peer in peers.offering(f"models {kind}", bench.device):
        if work.only is None or peer in work.only:
            for name, make in _versions(peer, kind, work).items():
                variants[name] = functools.partial(_theirs, bench, work, kind, peer, make, model, tokens)
    return Opened(variants, *_needs(model, work), work.batch * work.length)


class _Generating(Ours):
    """A model that writes as `generate` lets it: by the decode engine, or by a recorded step on a GPU.

    Args:
        model: The model.
        decoder: What has `step`.
        bound: Largest relative difference of logits, where not that of the model's type.
    """

    def __init__(
        self, model: LanguageModel, decoder: DecodeEngine | RecordedDecoder, bound: float | None
    ) -> None:
        super().__init__(model)
        self._decoder, self.bound = decoder, bound
        self.weight_bytes = getattr(decoder, "weight_bytes", weight_bytes(model))

    def decoder(self, batch: int, prompt: Tensor | None = None) -> Step:
        """See `Speaker.decoder`; without a prompt."""
        state = self.module.init_state(batch)
        return lambda token: self._decoder.step(token, state)


def _decoders(model: LanguageModel) -> dict[str, Callable[[], _Generating]]:
    """Name -> makes a model with one of the decoders that its device has."""
    weight = model.embedding.weight

    def make(
        kind: type[DecodeEngine | RecordedDecoder], *form: str, bound: float | None = None
    ) -> _Generating:
        if (reason := kind.supports(model)) is not None:
            raise DeclinedError(reason)
        return _Generating(model, kind(model, *form), bound)

    if weight.is_cuda:
        return {f"{OURS} recorded": functools.partial(make, RecordedDecoder)}
    return {
        f"{OURS} engine {form}": functools.partial(make, DecodeEngine, form, bound=bound)
        for form, bound in ENGINE[weight.dtype].items()
    }


def _versions(peer: str, kind: str, work: Work) -> dict[str, dict[str, Any]]:
    """A peer's name, once for each of its types of weights -> what its constructor needs to be told."""
    if peer != "llama_cpp":
        return {peer: {}}
    if work.verb == "learn" or work.batch > 1:
        return {}  # it does not train, and its batches are another interface
    types = ("f32",) if work.dtype == F32 else ("bf16", "q8_0", "q4_0")
    return {f"{peer} {quantized}": {"quantized": quantized} for quantized in types}


def _theirs(
    bench: Bench,
    work: Work,
    kind: str,
    peer: str,
    options: dict[str, Any],
    model: LanguageModel,
    tokens: Tensor,
) -> Ready:
    longest = SLOW.get((work.verb, kind, peer), work.length)
    if work.length > longest and bench.device.type == "cpu":
        raise DeclinedError(f"its backward pass is quadratic in length; not timed beyond {longest}")
    speaker = peers.load(peer).models[kind](model, **options)
    if work.verb == "learn" and speaker.module is None:
        raise DeclinedError("does not train")
    return _ready(bench, work, f"{kind} of {peer}", speaker, model, tokens)


def _ready(
    bench: Bench, work: Work, name: str, speaker: Speaker, model: LanguageModel, tokens: Tensor
) -> Ready:
    """Check a model in the way that it will be used."""
    bound = getattr(speaker, "bound", None)
    if work.verb == "read":
        error = speakers.check_reading(name, speaker, model, bound)
        return Ready(speakers.reading(speaker, tokens[:, :-1]), error)
    if work.verb == "write":
        error = speakers.check_writing(name, speaker, model, bound)
        run = speakers.writing(speaker.decoder(work.batch), work.batch, bench.device)
        if isinstance(speaker, _Generating):
            run = timing.Recorded(run)
        weights = getattr(speaker, "weight_bytes", weight_bytes(model))  # some keep them smaller
        return Ready(run, error, moved=weights + _states(model, work))
    error = speakers.check_learning(name, speaker, model)
    if isinstance(speaker, Ours):  # a training step changes the weights, which others are to be given
        speaker = Ours(_copy(model), speaker.backend)
    run = speakers.learning(speaker, tokens[:, :-1], tokens[:, 1:], work.autocast)
    return Ready(run, error)


def _copy(model: LanguageModel) -> LanguageModel:
    weight = model.embedding.weight
    made = LanguageModel(model.config, device=weight.device, dtype=weight.dtype)
    made.load_state_dict(model.state_dict())
    return made


def _needs(model: LanguageModel, work: Work) -> tuple[float, float]:
    """Bytes and operations of one call.

    Weights once, and the states where tokens are written; in training the weights in both passes, gradients,
    and the optimiser's two moments, read and written.
    """
    tokens = work.batch * work.length
    weights = weight_bytes(model)
    flops = block_flops(model, tokens, work.length)
    if work.verb == "learn":
        return 11 * weights, 3 * (flops + head_flops(model, tokens))
    return weights + _states(model, work), flops + head_flops(model, work.batch)


def _states(model: LanguageModel, work: Work) -> int:
    """Bytes of recurrent states that one call reads and writes."""
    return 2 * model.init_state(work.batch).nbytes if work.verb == "write" else 0
