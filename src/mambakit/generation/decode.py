"""Running a language model token by token.

The prompt goes through the model's ordinary forward in pieces, each handing its state to the next (so a long
prompt needs the memory of one piece); then every new token goes through the same forward with length one, or,
for models that they take, through the decode engine (on a CPU) or a recorded step (on a GPU), which continue
the very same state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.generation.engine import DecodeEngine, engine_for
from mambakit.generation.recorded import RecordedDecoder
from mambakit.generation.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from mambakit.layers.mixer import State
    from mambakit.models.language import LanguageModel

_ROOM = 4096  # new tokens for which a growing cache makes room at once; beyond, it grows by itself


def stream(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    state: State | None = None,
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Iterator[Tensor]:
    """Yield new tokens as they are chosen.

    Args:
        model: A language model; it runs in evaluation mode and without gradients while the stream is open.
        tokens: The prompts `(b, l)`, integers, all of one length, l >= 1.
        max_tokens: How many tokens to generate at most, per row.
        sampling: How to choose; `None` is plain sampling from the model's distribution.
        stop_tokens: Tokens that end a row. A row that has ended repeats its stop token until all have.
        vocab_size: Tokens from this number on are never chosen, for a model whose vocabulary is rounded up;
            `None` allows all.
        state: The model's state before the prompt, updated in place; `None` starts from an empty one. When
            the stream ends it covers everything but the last token that was yielded.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        engine: Decode engine for the new tokens: one that was made of this model, or `float32`, `bfloat16`,
            `int8`, `int4` to make one with weights in this form (CPU); `recorded` for a step recorded once
            and replayed (GPU); `off` for the model's own forward; `auto` for whichever of them loses no
            precision, can be had and is worth making.

    Yields:
        The next token of each row `(b,)`, int64.

    Raises:
        ValueError: An empty prompt, a count below 1, or an unknown engine.
    """
    _check(tokens, max_tokens, prefill_chunk)
    # Checked here, at the call, not at the first step: a generator's body waits until it is iterated.
    sampler = Sampler(sampling or Sampling(), tokens, vocab_size)
    if state is None:
        batch, length = tokens.shape
        state = model.init_state(batch, max_length=length + min(max_tokens, _ROOM))
    chosen = engine_for(model, engine, state, tokens.shape[0], max_tokens)
    return _stream(model, tokens, max_tokens, sampler, stop_tokens, state, prefill_chunk, chosen)


def generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    state: State | None = None,
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Tensor:
    """Generate a continuation of each prompt; the arguments are those of `stream`.

    Args:
        model: A language model.
        tokens: The prompts `(b, l)`, integers.
        max_tokens: How many tokens to generate at most, per row.
        sampling: How to choose; `None` is plain sampling.
        stop_tokens: Tokens that end a row.
        vocab_size: Tokens from this number on are never chosen.
        state: The model's state before the prompt, updated in place.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        engine: Decode engine for the new tokens.

    Returns:
        The new tokens `(b, at most max_tokens)`, int64, without the prompt.

    Raises:
        ValueError: As for `stream`.
    """
    steps = stream(
        model,
        tokens,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        vocab_size=vocab_size,
        state=state,
        prefill_chunk=prefill_chunk,
        engine=engine,
    )
    return torch.stack(list(steps), dim=1)


@torch.no_grad()
def _stream(
    model: LanguageModel,
    tokens: Tensor,
    max_tokens: int,
    sampler: Sampler,
    stop_tokens: Sequence[int],
    state: State,
    prefill_chunk: int,
    engine: DecodeEngine | RecordedDecoder | None,
) -> Iterator[Tensor]:
    batch, logits = len(tokens), None
    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    was_training = model.training
    model.eval()
    try:
        for piece in tokens.split(prefill_chunk, dim=1):
            features = model.features(piece, state)[:, -1]  # (b, d); only the last position is ever scored
        token = sampler(model.lm_head(features))
        for remaining in reversed(range(max_tokens)):
            yield token
            if len(stops):
                ended = ended | torch.isin(token, stops)
            if remaining == 0 or (len(stops) and ended.all()):
                return
            if engine is None:
                logits = model(token[:, None], state)[:, -1]  # (b, v)
            else:
                logits = engine.step(token, state, out=logits)
            token = torch.where(ended, token, sampler(logits))
    finally:
        model.train(was_training)


def _check(tokens: Tensor, max_tokens: int, prefill_chunk: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (b, l) with l >= 1")
    for name, value in (("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"generate: {name} is {value}, expected at least 1")
