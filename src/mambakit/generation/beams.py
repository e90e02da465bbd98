"""Beam search: the likeliest whole continuations instead of the likeliest next token.

Every prompt has `beams` unfinished texts. A step scores all their continuations by one token, keeps the best,
and lets each surviving text take the state of the text it continues: `State.select`, a copy of some rows,
whatever the model remembers. A text that ends leaves the beams with the score

    log p(text) / length ** length_penalty

and the best `beams` of these are kept. The search is over when no unfinished text can become better than the
worst of them, by the estimate that `early_stopping` names.

Source: Sutskever et al. (1409.3215), section 3.2; the length penalty: Wu et al. (1609.08144), section 7, in
the simpler form of common use. Candidates, scores and the three estimates are those of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mambakit.config import unknown
from mambakit.generation.prompts import Prompts, as_prompts, read

if TYPE_CHECKING:
    from mambakit.models.language import LanguageModel

EARLY_STOPPING = (False, True, "never")


@dataclasses.dataclass(frozen=True)
class Beam:
    """One continuation.

    Attributes:
        tokens: Its tokens, without the prompt; a stop token is the last of them.
        score: `log p / length ** length_penalty`, nats.
        ended: Whether it ended at a stop token, or where `max_tokens` cut it.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool


def beam_search(
    model: LanguageModel,
    tokens: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int,
    beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    prefill_chunk: int = 4096,
) -> list[list[Beam]]:
    """Search the likeliest continuations of each prompt.

    Args:
        model: A language model; it runs in evaluation mode and without gradients.
        tokens: The prompts: `(b, l)` integers, or a list of prompts of any lengths.
        max_tokens: Length at which a continuation is cut, tokens.
        beams: Unfinished texts of a prompt at a time, and continuations returned.
        length_penalty: Exponent of the length; above 0 favours long texts, as log-probabilities are negative.
        early_stopping: When a prompt with `beams` finished texts is done. `False`: when the best unfinished
            one, at its present length, scores below the worst of them; `"never"`: when it would at any
            length; `True`: at once.
        stop_tokens: Tokens that end a text.
        vocab_size: Tokens from this number on are never chosen.
        mask: Which of `tokens` `(b, l)` are text and not padding.
        prefill_chunk: The prompts are read in pieces of this many tokens.

    Returns:
        For each prompt its best continuations, at most `beams`, the best first.

    Raises:
        ValueError: A prompt, a mask or a count that makes no sense, an unknown `early_stopping`, or more
            beams than there are tokens.
    """
    prompts = as_prompts(tokens, mask, model.embedding.weight.device)
    for name, value in (("max_tokens", max_tokens), ("beams", beams), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"beam_search: {name} is {value}, expected at least 1")
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(unknown("early_stopping", early_stopping, map(str, EARLY_STOPPING)))
    choices = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    if beams * max(2, 1 + len(stop_tokens)) > choices:
        raise ValueError(f"beam_search: {beams} beams, too many for {choices} tokens to choose from")
    searches = [
        _Search(beams, max_tokens, length_penalty, early_stopping, frozenset(stop_tokens))
        for _ in prompts.tokens
    ]
    was_training = model.training
    model.eval()
    try:
        _run(model, prompts, searches, choices, prefill_chunk)
    finally:
        model.train(was_training)
    return [search.finished for search in searches]


@torch.no_grad()
def _run(
    model: LanguageModel, prompts: Prompts, searches: list[_Search], vocab_size: int, prefill_chunk: int
) -> None:
    """Search until all prompts are done."""
    beams, max_tokens = searches[0].beams, searches[0].max_tokens
    room = prompts.tokens.shape[1] + min(max_tokens, 4096)
    state = model.init_state(len(searches), max_length=room)
    logits = model.lm_head(read(model, prompts, state, prefill_chunk))
    # From one text of each prompt to as many rows as there are beams, of which the first alone counts yet.
    rows = torch.arange(len(searches), device=logits.device).repeat_interleave(beams)
    state, logits = state.select(rows), logits[rows]
    while True:
        logits = logits[:, :vocab_size]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        took, new = _advance(searches, scores.unflatten(0, (-1, beams)))
        if all(search.is_done for search in searches):
            return
        state = state.select(took)
        logits = model(new[:, None], state)[:, -1]


def _advance(searches: list[_Search], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step with every prompt.

    Args:
        searches: One for each prompt.
        scores: Log-probabilities of the next token `(b, beams, v)`.

    Returns:
        The row that each unfinished text continues, and its new token `(b beams,)` each.
    """
    took, new = [], []
    for number, search in enumerate(searches):
        beams = scores.shape[1]
        if not search.is_done:
            search.advance(scores[number])
        took += [number * beams + beam for beam in search.took]
        new += [text[-1] for text in search.texts]
    return torch.tensor(took, device=scores.device), torch.tensor(new, device=scores.device)


class _Search:
    """The beams of one prompt.

    Attributes:
        texts: Unfinished texts, the best first.
        took: The text that each of them continued.
        finished: The best finished texts, the best first.
        is_done: Whether the search is over.
    """

    def __init__(
        self,
        beams: int,
        max_tokens: int,
        length_penalty: float,
        early_stopping: bool | str,
        stop_tokens: frozenset[int],
    ) -> None:
        self.beams, self.max_tokens, self.penalty = beams, max_tokens, length_penalty
        self.early_stopping, self.stop_tokens = early_stopping, stop_tokens
        self.texts: list[tuple[int, ...]] = [()]
        self.scores = [0.0]
        self.took = list(range(beams))
        self.finished: list[Beam] = []
        self.is_done = False

    def advance(self, scores: Tensor) -> None:
        """Continue every text by one token; `scores` `(beams, v)` are log-probabilities."""
        own = torch.tensor(self.scores, dtype=scores.dtype, device=scores.device)
        totals = own[:, None] + scores[: len(self.texts)]
        # So many that as many unfinished ones remain if each stop token is among the best everywhere.
        count = max(2, 1 + len(self.stop_tokens)) * self.beams
        best, where = totals.flatten().topk(count)
        length = len(self.texts[0]) + 1
        is_last = length == self.max_tokens
        going: list[tuple[int, tuple[int, ...], float]] = []
        for rank, (total, place) in enumerate(zip(best.tolist(), where.tolist(), strict=True)):
            beam, token = divmod(place, scores.shape[1])
            text, ends = (*self.texts[beam], token), token in self.stop_tokens
            # A text that ends counts only among the best `beams`: worse ones are there as a reserve.
            if (ends or is_last) and rank < self.beams:
                self.finished.append(Beam(text, total / length**self.penalty, ends))
            if not ends and len(going) < self.beams:
                going.append((beam, text, total))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[: self.beams]
        self.took, self.texts, self.scores = (list(column) for column in zip(*going, strict=True))
        self.is_done = is_last or self._cannot_improve(length)

    def _cannot_improve(self, length: int) -> bool:
        if len(self.finished) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        grows = self.early_stopping == "never" and self.penalty > 0
        reach = self.max_tokens if grows else length
        return self.scores[0] / reach**self.penalty <= self.finished[-1].score
