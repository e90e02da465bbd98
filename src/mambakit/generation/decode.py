"""Running a language model token by token.

The prompts go through the model's ordinary forward in pieces, each handing its state to the next (so a long
prompt needs the memory of one piece); then every new token goes through the same forward with length one, or,
for models that they take, through the decode engine (on a CPU) or a recorded step (on a GPU), which continue
the very same state. Prompts of different lengths are padded (`prompts`): every row is what it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.generation.engine import DecodeEngine, engine_for
from mambakit.generation.prompts import Prompts, as_prompts, read
from mambakit.generation.recorded import RecordedDecoder
from mambakit.generation.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from mambakit.layers.mixer import State
    from mambakit.models.language import LanguageModel

_ROOM = 4096  # new tokens for which a growing cache makes room at once; beyond, it grows by itself


def stream(
    model: LanguageModel,
    tokens: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int,
    min_tokens: int = 0,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    state: State | None = None,
    history: Tensor | None = None,
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Iterator[Tensor]:
    """Yield new tokens as they are chosen.

    Args:
        model: A language model; it runs in evaluation mode and without gradients while the stream is open.
        tokens: The prompts: `(b, l)` integers, l >= 1, or a list of prompts of any lengths.
        max_tokens: How many tokens to generate at most, per row.
        min_tokens: Before so many tokens none of `stop_tokens` is chosen.
        sampling: How to choose; `None` is plain sampling from the model's distribution.
        seeds: A seed for each row; by default row i has `sampling.seed + i`.
        stop_tokens: Tokens that end a row. A row that has ended repeats its stop token until all have.
        vocab_size: Tokens from this number on are never chosen, for a model whose vocabulary is rounded up;
            `None` allows all.
        mask: Which of `tokens` `(b, l)` are text; the others are padding, on the left or on the right.
        state: The model's state before the prompt, updated in place; `None` starts from an empty one. When
            the stream ends it covers everything but the last token that was yielded.
        history: Tokens `(b, m)` that the state has read; they count for the repetition penalty.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        engine: Decode engine for the new tokens: one that was made of this model, or `float32`, `bfloat16`,
            `int8`, `int4` to make one with weights in this form (CPU); `recorded` for a step recorded once
            and replayed (GPU); `off` for the model's own forward; `auto` for whichever of them loses no
            precision, can be had and is worth making.

    Yields:
        The next token of each row `(b,)`, int64.

    Raises:
        ValueError: An empty prompt, a count or a mask that makes no sense, prompts of different lengths that
            are to continue a state, or an unknown engine.
    """
    prompts = as_prompts(tokens, mask, model.embedding.weight.device)
    _check(max_tokens, min_tokens, prefill_chunk)
    # Checked here, at the call, not at the first step: a generator's body waits until it is iterated.
    seen = (
        prompts.tokens if history is None else torch.cat([history.to(prompts.tokens), prompts.tokens], dim=1)
    )
    sampler = Sampler(sampling or Sampling(), seen, vocab_size, seeds)
    batch, length = prompts.tokens.shape
    if state is None:
        state = model.init_state(batch, max_length=length + min(max_tokens, _ROOM))
    elif prompts.is_ragged:
        raise ValueError(
            "prompts of different lengths cannot continue a state: padding would come between; "
            "give prompts of one length, or one row at a time"
        )
    chosen = engine_for(model, engine, state, batch, max_tokens)
    ends = _Ends(stop_tokens, min_tokens, prompts.tokens.device)
    return _stream(model, prompts, max_tokens, sampler, ends, state, prefill_chunk, chosen)


def generate(
    model: LanguageModel,
    tokens: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int,
    min_tokens: int = 0,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    state: State | None = None,
    history: Tensor | None = None,
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Tensor:
    """Generate a continuation of each prompt; the arguments are those of `stream`.

    Args:
        model: A language model.
        tokens: The prompts: `(b, l)` integers, or a list of prompts of any lengths.
        max_tokens: How many tokens to generate at most, per row.
        min_tokens: Before so many tokens none of `stop_tokens` is chosen.
        sampling: How to choose; `None` is plain sampling.
        seeds: A seed for each row.
        stop_tokens: Tokens that end a row.
        vocab_size: Tokens from this number on are never chosen.
        mask: Which of `tokens` `(b, l)` are text and not padding.
        state: The model's state before the prompt, updated in place.
        history: Tokens `(b, m)` that the state has read.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        engine: Decode engine for the new tokens.

    Returns:
        The new tokens `(b, at most max_tokens)`, int64, without the prompt. A row that has ended repeats its
        stop token.

    Raises:
        ValueError: As for `stream`.
    """
    steps = stream(
        model,
        tokens,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        seeds=seeds,
        stop_tokens=stop_tokens,
        vocab_size=vocab_size,
        mask=mask,
        state=state,
        history=history,
        prefill_chunk=prefill_chunk,
        engine=engine,
    )
    return torch.stack(list(steps), dim=1)


class _Ends:
    """Where rows end: at a stop token, which may not be chosen too early."""

    def __init__(self, tokens: Sequence[int], least: int, device: torch.device) -> None:
        self.tokens = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.least = least if len(tokens) else 0

    def forbid(self, logits: Tensor, made: int) -> Tensor:
        """Logits `(b, v)` after `made` tokens, without those that would end a row too early."""
        if made >= self.least:
            return logits
        return logits.index_fill(1, self.tokens[self.tokens < logits.shape[1]], -torch.inf)

    def among(self, token: Tensor) -> Tensor:
        """Whether the tokens `(b,)` end their rows."""
        return torch.isin(token, self.tokens)


@torch.no_grad()
def _stream(
    model: LanguageModel,
    prompts: Prompts,
    max_tokens: int,
    sampler: Sampler,
    ends: _Ends,
    state: State,
    prefill_chunk: int,
    engine: DecodeEngine | RecordedDecoder | None,
) -> Iterator[Tensor]:
    ended = torch.zeros(len(prompts.tokens), dtype=torch.bool, device=prompts.tokens.device)
    was_training = model.training
    model.eval()
    try:
        logits = model.lm_head(
            read(model, prompts, state, prefill_chunk)
        )  # (b, v); of the last position only
        token, buffer = sampler(ends.forbid(logits, 0)), None
        for made in range(1, max_tokens + 1):
            yield token
            if len(ends.tokens):
                ended = ended | ends.among(token)
            if made == max_tokens or (len(ends.tokens) and ended.all()):
                return
            if engine is None:
                logits = model(token[:, None], state)[:, -1]  # (b, v)
            else:
                logits = buffer = engine.step(token, state, out=buffer)
            token = torch.where(ended, token, sampler(ends.forbid(logits, made)))
    finally:
        model.train(was_training)


def _check(max_tokens: int, min_tokens: int, prefill_chunk: int) -> None:
    for name, value in (("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"generate: {name} is {value}, expected at least 1")
    if not 0 <= min_tokens <= max_tokens:
        raise ValueError(f"generate: min_tokens is {min_tokens}, expected 0 to max_tokens={max_tokens}")
