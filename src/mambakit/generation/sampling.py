"""Choosing the next token: filters on the logits, then one draw.

The filters are small functions `(b, v) -> (b, v)` that set what they refuse to minus infinity. `Sampler`
applies them in the order in which the field applies them: repetition penalty, temperature, top-k, top-p,
min-p. The draw inverts the cumulative distribution at one uniform number per row, taken from a counter-based
generator of that row, so a row's text depends on its own seed and logits only: not on its neighbours in the
batch, not on the device's random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambakit.config import Config


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How to choose tokens; every default leaves the model's distribution as it is.

    Args:
        temperature: Divides the logits; 0 takes the most likely token (greedy), dimensionless.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probabilities reach this sum, in (0, 1].
        min_p: Keep tokens at least this fraction as likely as the most likely one, in [0, 1).
        repetition_penalty: Above 1, makes tokens of the prompt and of the text so far less likely.
        seed: Row i of a batch draws from seed + i; `None` takes a fresh seed from the system.

    Raises:
        ValueError: A value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        for name, value, fits, expected in (
            (
                "temperature",
                self.temperature,
                0 <= self.temperature < float("inf"),
                "a number >= 0 (0 is greedy)",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "a whole number >= 0 (0 keeps all tokens)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "a number in [0, 1)"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < float("inf"),
                "a number > 0",
            ),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "a whole number >= 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}, expected {expected}")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that have already appeared less likely.

    A seen token's logit `x` becomes `x / penalty` where positive and `x * penalty` where negative, so that a
    penalty above 1 lowers it on both sides of zero.

    Args:
        logits: Unnormalised log-probabilities `(b, v)`.
        seen: Boolean `(b, v)`, true where the row's text holds the token.
        penalty: Factor, 1 leaves everything as it is.

    Returns:
        New logits `(b, v)`.

    Source:
        Keskar et al., "CTRL" (2019), section 4.1; the rule for negative logits is the usual correction.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k largest logits of each row.

    Args:
        logits: Unnormalised log-probabilities `(b, v)`.
        k: How many to keep; more than `v` keeps all.

    Returns:
        New logits `(b, v)`, minus infinity elsewhere.

    Source:
        Fan et al., "Hierarchical neural story generation" (2018), section 5.4.
    """
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p (the nucleus).

    Args:
        logits: Unnormalised log-probabilities `(b, v)`.
        p: The sum to reach, in (0, 1].

    Returns:
        New logits `(b, v)`, minus infinity outside the nucleus; the most likely token always stays.

    Source:
        Holtzman et al., "The curious case of neural text degeneration" (2020), section 3.1.
    """
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens ahead of this one
    return logits.scatter(-1, indices, ordered.masked_fill(before >= p, -torch.inf))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times that of the row's most likely token.

    In logits: `x >= max(x) + log(p)`, so no softmax is needed.

    Args:
        logits: Unnormalised log-probabilities `(b, v)`.
        p: Fraction of the largest probability, in (0, 1].

    Returns:
        New logits `(b, v)`, minus infinity elsewhere.

    Source:
        Nguyen et al., "Turning up the heat: min-p sampling" (2024), section 3.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + np.log(p), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    The token is the first whose cumulative probability exceeds `uniform`; one of probability zero is never
    drawn, since it does not raise the sum.

    Args:
        logits: Unnormalised log-probabilities `(b, v)`.
        uniform: Numbers in [0, 1) `(b,)`, float64.

    Returns:
        Token numbers `(b,)`, int64.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the threshold to the total, which no entry exceeds.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def generator(seed: int) -> np.random.Generator:
    """The counter-based generator of one row."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64))  # Philox keys have 64 bits


def _row_seeds(first: int | None, seeds: Sequence[int] | None, rows: int) -> list[int]:
    if seeds is None:
        first = np.random.SeedSequence().entropy if first is None else first
        return [first + row for row in range(rows)]
    if len(seeds) != rows or min(seeds) < 0:
        raise ValueError(f"seeds is {list(seeds)}, expected {rows} numbers >= 0, one for each row")
    return list(seeds)


class Sampler:
    """Chooses one token per row, again and again, remembering what each row has seen.

    Args:
        sampling: The settings.
        prompt: The tokens before the first choice `(b, l)`; they count for the repetition penalty and give
            the batch size and the device.
        vocab_size: Tokens from this number on are never chosen; `None` allows all that the model scores.
        seeds: The seed of each row, instead of those that follow from `sampling.seed`.

    Raises:
        ValueError: Another number of seeds than of rows, or a negative one.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Tensor,
        vocab_size: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self._prompt = prompt
        self._seen: Tensor | None = None  # (b, v), made when the vocabulary is known
        self._generators = [generator(seed) for seed in _row_seeds(sampling.seed, seeds, len(prompt))]

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the next token of each row.

        Args:
            logits: Unnormalised log-probabilities at the last position `(b, v)`.

        Returns:
            Token numbers `(b,)`, int64.

        Raises:
            ValueError: A logit is not a number, which means that the model's weights or state are broken.
        """
        settings = self.sampling
        logits = logits[:, : self.vocab_size].float()
        if logits.isnan().any():
            raise ValueError("the model's logits are not numbers (NaN): its weights or its state are broken")
        if settings.repetition_penalty != 1:
            logits = penalise_repetition(logits, self._seen_mask(logits), settings.repetition_penalty)
        token = (
            logits.argmax(-1)
            if settings.temperature == 0
            else draw(self.filter(logits), self._uniform(logits))
        )
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return token

    def filter(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k, top-p and min-p, in this order, to `(b, v)` logits."""
        settings = self.sampling
        # From the largest logit down: a tiny temperature must not overflow to infinity.
        logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
        if settings.top_k:
            logits = keep_top_k(logits, settings.top_k)
        if settings.top_p < 1:
            logits = keep_top_p(logits, settings.top_p)
        if settings.min_p > 0:
            logits = keep_min_p(logits, settings.min_p)
        return logits

    def _uniform(self, logits: Tensor) -> Tensor:
        numbers = [generator.random() for generator in self._generators]
        return torch.tensor(numbers, dtype=torch.float64, device=logits.device)

    def _seen_mask(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, self._prompt, True)
        return self._seen
