"""Speculative decoding: a small model proposes tokens, the large one checks several of them in one reading.

Reading one token and reading five cost a large model about the same, since its weights are what takes time. A
*draft* model with the same vocabulary proposes `lookahead` tokens one by one; the large model reads them all
at once and scores each. A proposed token x, drawn from the draft's distribution q, stands with probability

    min(1, p(x) / q(x))

under the large model's p; the first that falls is replaced by a draw from max(0, p - q), normalised, and what
follows it is forgotten. If all stand, one more token is drawn from p. The result is distributed exactly as if
the large model had written alone, and greedily it is the same text.

A recurrent state cannot drop its last tokens as a cache of keys can, so it has to be brought back to the last
token that stands. Three ways: keep the state after every token, which is as many states as tokens; return to
the state before and read the tokens that stood once more, which is a second reading of all weights; or, as
here, return to the state before and leave the tokens that stood for the next check, which reads them together
with the next proposals. So a check is one reading, always, of a few tokens more. Only when many have piled up
(`_MOST_PENDING`) are they read for themselves. The draft reads what stands first and only then sets out from
a copy of its state, which costs it nothing more, as that is the next thing that it would read anyway.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2211.17192), algorithm
1 and appendix A.1; Chen et al. (2302.01318).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mambakit.generation.prompts import as_prompts, read
from mambakit.generation.sampling import Sampler, Sampling, draw, generator, penalise_repetition

if TYPE_CHECKING:
    from mambakit.layers.mixer import State
    from mambakit.models.language import LanguageModel

_MOST_PENDING = 16  # tokens that stand but are not in the state yet


@dataclasses.dataclass
class Acceptance:
    """How speculation went.

    Attributes:
        proposed: Tokens that the draft proposed.
        accepted: Those of them that stood.
        checks: Readings by the large model, the prompt's aside.
        written: Tokens that came of it, the first one after the prompt aside.
    """

    proposed: int = 0
    accepted: int = 0
    checks: int = 0
    written: int = 0

    @property
    def rate(self) -> float:
        """Share of the proposals that stood; NaN before there are any."""
        return self.accepted / self.proposed if self.proposed else float("nan")


def speculate(
    model: LanguageModel,
    draft: LanguageModel,
    tokens: Tensor | Sequence[int],
    *,
    max_tokens: int,
    lookahead: int = 4,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    prefill_chunk: int = 4096,
    acceptance: Acceptance | None = None,
) -> Iterator[int]:
    """Yield the tokens that a model writes, with the help of a smaller one.

    With temperature 0 they are those of `stream`; otherwise they have the same distribution, but a seed gives
    another text than there.

    Args:
        model: A language model; it runs in evaluation mode and without gradients, as does the draft.
        draft: A smaller one, with the same tokens.
        tokens: One prompt: `(l,)` or `(1, l)` integers, or a list of them.
        max_tokens: How many tokens to generate at most.
        lookahead: Tokens that the draft proposes at a time.
        sampling: How to choose; it shapes the distributions of both models. `None` is plain sampling.
        stop_tokens: Tokens that end the text; the one that does is yielded.
        vocab_size: Tokens from this number on are never chosen.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        acceptance: Counts what was proposed and accepted.

    Yields:
        Token numbers.

    Raises:
        ValueError: More prompts than one, models with different vocabularies or devices, or a count below 1.
    """
    prompt = tokens if isinstance(tokens, Tensor) and tokens.ndim == 2 else [tokens]
    prompts = as_prompts(prompt, device=model.embedding.weight.device)
    if len(prompts.tokens) != 1:
        raise ValueError(f"speculate: {len(prompts.tokens)} prompts, expected one")
    counts = {"max_tokens": max_tokens, "lookahead": lookahead, "prefill_chunk": prefill_chunk}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"speculate: {name} is {value}, expected at least 1")
    sizes = [one.config.vocab_size if vocab_size is None else vocab_size for one in (model, draft)]
    if len(set(sizes)) > 1 or max(sizes) > min(model.config.vocab_size, draft.config.vocab_size):
        raise ValueError(
            f"speculate: vocabularies of {model.config.vocab_size} and {draft.config.vocab_size} tokens, "
            f"expected the same, or a vocab_size that both have (it is {vocab_size})"
        )
    if draft.embedding.weight.device != model.embedding.weight.device:
        raise ValueError(
            f"speculate: the draft is on {draft.embedding.weight.device}, "
            f"the model on {model.embedding.weight.device}"
        )
    chooser = _Chooser(sampling or Sampling(), prompts.tokens, sizes[0])
    counted = Acceptance() if acceptance is None else acceptance
    writer = _Writer(model, draft, chooser, lookahead, counted)
    return _speculate(writer, prompts.tokens, max_tokens, frozenset(stop_tokens), prefill_chunk)


@torch.no_grad()
def _speculate(
    writer: _Writer, prompt: Tensor, max_tokens: int, stop_tokens: frozenset[int], chunk: int
) -> Iterator[int]:
    modes = [(one, one.training) for one in (writer.model, writer.draft)]
    try:
        for one, _ in modes:
            one.eval()
        made, new = 0, [writer.begin(prompt, chunk)]
        while True:
            for token in new:
                made += 1
                yield token
                if made == max_tokens or token in stop_tokens:
                    return
            new = writer.advance()
    finally:
        for one, was_training in modes:
            one.train(was_training)


class _Chooser:
    """From logits to distributions, and from those to tokens, for one row.

    Args:
        sampling: The settings.
        prompt: The tokens before `(1, l)`; they count for the repetition penalty.
        vocab_size: Tokens from this number on have no chance.
    """

    def __init__(self, sampling: Sampling, prompt: Tensor, vocab_size: int) -> None:
        self.sampling, self.vocab_size = sampling, vocab_size
        self._filter = Sampler(sampling, prompt, vocab_size).filter
        seed = np.random.SeedSequence().entropy if sampling.seed is None else sampling.seed
        self._random = generator(seed)
        seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=prompt.device)
        self.seen = seen.scatter_(1, prompt[prompt < vocab_size][None], True)

    def distribution(self, logits: Tensor, since: Sequence[int] = ()) -> Tensor:
        """Probabilities `(v,)`, float64, of the token after `since`, which were written beyond `seen`.

        Greedy choice is the distribution that has all its mass on one token.
        """
        logits = logits[None, : self.vocab_size].float()  # as `Sampler` takes them
        if self.sampling.repetition_penalty != 1:
            seen = self.seen.clone()
            seen[0, list(since)] = True
            logits = penalise_repetition(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return torch.zeros_like(logits[0], dtype=torch.float64).index_fill_(0, logits[0].argmax(), 1.0)
        return self._filter(logits)[0].double().softmax(-1)

    def draw(self, probabilities: Tensor) -> int:
        """One token of these probabilities `(v,)`."""
        uniform = torch.tensor([self.uniform()], dtype=torch.float64, device=probabilities.device)
        return int(draw(probabilities.log()[None], uniform))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()


def verify(
    proposed: Sequence[int], q: Sequence[Tensor], p: Sequence[Tensor], chooser: _Chooser
) -> tuple[int, int]:
    """Accept or reject proposed tokens so that what stands is distributed as p.

    Args:
        proposed: Tokens `x_1 .. x_k`, each drawn from its `q`.
        q: The draft's distributions `(v,)`, k of them.
        p: The model's `(v,)`, k + 1 of them; the last follows `x_k`.
        chooser: Draws.

    Returns:
        How many stand, and the token after them.
    """
    for count, (token, ours, theirs) in enumerate(zip(proposed, q, p, strict=False)):
        if chooser.uniform() * float(ours[token]) >= float(theirs[token]):
            rest = (theirs - ours).clamp(min=0)
            return count, chooser.draw(rest if rest.sum() > 0 else theirs)  # they may differ by rounding only
    return len(proposed), chooser.draw(p[-1])


class _Writer:
    """The two models, their states, and what they are still to read.

    `state` lacks the last tokens that stand, `pending`; the draft's lacks `unread`.
    """

    def __init__(
        self,
        model: LanguageModel,
        draft: LanguageModel,
        chooser: _Chooser,
        lookahead: int,
        acceptance: Acceptance,
    ) -> None:
        self.model, self.draft, self.chooser = model, draft, chooser
        self.lookahead, self.acceptance = lookahead, acceptance

    def begin(self, prompt: Tensor, chunk: int) -> int:
        """Read the prompt `(1, l)` and choose the first token."""
        self.device = prompt.device
        room = prompt.shape[1] + 256
        self.state, self.draft_state = (m.init_state(1, max_length=room) for m in (self.model, self.draft))
        prompts = as_prompts(prompt)
        logits = self.model.lm_head(read(self.model, prompts, self.state, chunk))[0]
        read(self.draft, prompts, self.draft_state, chunk)
        first = self.chooser.draw(self.chooser.distribution(logits))
        self.pending, self.unread = [first], []
        self._stands([first])
        return first

    def advance(self) -> list[int]:
        """Propose, check, and return the tokens that stand; one at least."""
        proposed, q = self._propose()
        if len(self.pending) > _MOST_PENDING:
            self._scores(self.state, self.model, self.pending[:-1])
            self.pending = self.pending[-1:]
        ahead = self.state.clone()
        logits = self._scores(ahead, self.model, self.pending + proposed)[-len(proposed) - 1 :]
        p = [self.chooser.distribution(row, proposed[:i]) for i, row in enumerate(logits)]
        count, after = verify(proposed, q, p, self.chooser)
        new = [*proposed[:count], after]
        if count == len(proposed):
            self.state, self.pending = ahead, [after]
        else:
            self.pending += new
        self._stands(new)
        self._count(len(proposed), count)
        return new

    def _propose(self) -> tuple[list[int], list[Tensor]]:
        """Tokens of the draft, and the distributions that they were drawn from."""
        logits = self._scores(self.draft_state, self.draft, self.unread)[-1]
        self.unread = []
        ahead, proposed, q = self.draft_state.clone(), [], []
        while True:
            q.append(self.chooser.distribution(logits, proposed))
            proposed.append(self.chooser.draw(q[-1]))
            if len(proposed) == self.lookahead:
                return proposed, q
            logits = self._scores(ahead, self.draft, proposed[-1:])[-1]

    def _scores(self, state: State, model: LanguageModel, tokens: list[int]) -> Tensor:
        """Read tokens; logits after each `(l, v)`."""
        return model(torch.tensor([tokens], device=self.device), state)[0]

    def _stands(self, tokens: list[int]) -> None:
        self.unread += tokens
        self.chooser.seen[0, tokens] = True

    def _count(self, proposed: int, accepted: int) -> None:
        counts = self.acceptance
        counts.proposed += proposed
        counts.accepted += accepted
        counts.checks += 1
        counts.written += accepted + 1
