"""Log-likelihoods of continuations: the one measurement under LAMBADA, multiple choice and the harness.

    log p(continuation | context) = sum_t log p(token_t | context, tokens before t)

Sequences are sorted by length and batched so that little is padded; padding stands on the right, where a
causal model does not see it before it has said everything that counts. Only the positions that are asked pass
through the head, so the scores of a batch are as many as its answers and not as its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from mambakit.data.tokenizers import Tokenizer
from mambakit.models import LanguageModel
from mambakit.ops import cross_entropy

TOKENS = 16384
"""Tokens read at once, padding included."""
_HEAD_ROWS = 4096
"""Positions scored at once."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation to be judged.

    Attributes:
        context: Token ids that are read, at least one.
        continuation: Token ids that are judged, at least one.
    """

    context: Sequence[int]
    continuation: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse an empty side."""
        if not len(self.context) or not len(self.continuation):
            raise ValueError(
                f"{len(self.context)} tokens of context and {len(self.continuation)} to judge, "
                "expected at least one of each"
            )


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model says of a continuation.

    Attributes:
        log_likelihood: Natural logarithm of its probability.
        is_greedy: Whether every token of it is the likeliest one.
        tokens: How many tokens it has.
    """

    log_likelihood: float
    is_greedy: bool
    tokens: int


def score(model: LanguageModel, requests: Sequence[Request], *, tokens: int = TOKENS) -> list[Score]:
    """Judge continuations.

    Args:
        model: A language model, in evaluation mode.
        requests: What is to be judged.
        tokens: Most tokens to read at once.

    Returns:
        A score for each request, in their order.
    """
    lengths = [len(one.context) + len(one.continuation) - 1 for one in requests]  # the last is not read
    found: list[Score | None] = [None] * len(requests)
    with torch.no_grad():
        for batch in batches_by_length(lengths, tokens):
            for index, result in zip(batch, _score_batch(model, [requests[i] for i in batch]), strict=True):
                found[index] = result
    return [one for one in found if one is not None]


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Sort sequences into batches of like length, the longest first, so that memory fails early if at all.

    Args:
        lengths: Tokens of each.
        tokens: Most tokens in a batch, padding included; a longer sequence is a batch of its own.

    Yields:
        Numbers of the sequences of a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, end: int | None = None
) -> tuple[list[int], list[int]]:
    """Make tokens of a context and its continuation, cut where the continuation begins.

    Spaces at the end of the context belong to the continuation, and both are encoded together, because most
    tokenisers write a space into the token behind it (as the lm-evaluation-harness does it).

    Args:
        tokenizer: What makes tokens of text.
        context: The text that is read; may be empty.
        continuation: The text that is judged.
        end: The token to stand for an empty context.

    Returns:
        Token ids of both.

    Raises:
        ValueError: An empty context and no `end`.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if not context:
        if end is None:
            raise ValueError(f"nothing stands before {continuation!r}, and the model has no token for that")
        return [end], list(map(int, tokenizer.encode(continuation)))
    both, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return list(map(int, before)), list(map(int, both[len(before) :]))


def _score_batch(model: LanguageModel, requests: Sequence[Request]) -> Iterator[Score]:
    device = next(model.parameters()).device
    rows = [[*one.context, *one.continuation] for one in requests]
    read = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
    for row, ids in enumerate(rows):
        read[row, : len(ids) - 1] = torch.tensor(ids[:-1])
    features = model.features(read.to(device))  # (b, l, d)
    counts = [len(one.continuation) for one in requests]
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    column = torch.cat(
        [torch.arange(len(ids) - 1 - n, len(ids) - 1) for ids, n in zip(rows, counts, strict=True)]
    )
    asked = torch.cat([torch.tensor(one.continuation) for one in requests]).to(device)
    nats, best = _head(model, features[row.to(device), column.to(device)], asked)
    missed = (best != asked).cpu()
    for part, wrong in zip(nats.cpu().split(counts), missed.split(counts), strict=True):
        yield Score(-float(part.sum(dtype=torch.float64)), not bool(wrong.any()), len(part))


def _head(
    model: LanguageModel, features: torch.Tensor, asked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of every asked token, and the likeliest token in its place, some rows at a time."""
    parts = [
        cross_entropy(model.lm_head(some), ids)
        for some, ids in zip(features.split(_HEAD_ROWS), asked.split(_HEAD_ROWS), strict=True)
    ]
    return torch.cat([nats for nats, _ in parts]), torch.cat([best for _, best in parts])
