"""Prompts of different lengths in one batch, so that every row is what it would be alone.

Rows are padded on the left, whichever way they came: then all of them end in the same column, and the state
after it is the state of every row. The padding of a row is a document of its own (`Context.seq_idx`), so
nothing flows from it into the text; positions count from the text's first token. Padding repeats that token,
which makes it no news for a repetition penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.layers.mixer import Context

if TYPE_CHECKING:
    from mambakit.layers.mixer import State
    from mambakit.models.language import LanguageModel

_PADDING = -1  # document number of what is no text


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        tokens: Token numbers `(b, l)`, int64, padded on the left.
        padding: How many tokens of each row are padding.
    """

    tokens: Tensor
    padding: tuple[int, ...]

    @property
    def is_ragged(self) -> bool:
        """Whether there is any padding."""
        return any(self.padding)

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Context | None, Tensor | None]]:
        """Cut the batch for reading.

        Args:
            size: Tokens of a piece.

        Yields:
            Tokens `(b, at most size)`; their context, where a row has padding among them; and the rows that
            have had nothing but padding so far, whose state is to be emptied after the piece.
        """
        device, most = self.tokens.device, max(self.padding)
        padding = torch.tensor(self.padding, device=device)
        for first in range(0, self.tokens.shape[1], size):
            piece = self.tokens[:, first : first + size]
            if first >= most:
                yield piece, None, None
                continue
            end = first + piece.shape[1]
            positions = torch.arange(first, end, device=device) - padding[:, None]  # (b, l)
            context = Context(seq_idx=(positions < 0) * _PADDING, positions=positions.clamp(min=0))
            yield piece, context, (padding >= end).nonzero().squeeze(1)


def as_prompts(
    tokens: Tensor | Sequence[Sequence[int] | Tensor],
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Bring prompts into one form.

    Args:
        tokens: Token numbers `(b, l)`, or a list of prompts of any lengths.
        mask: Which tokens `(b, l)` are text and not padding, on either side; booleans or 0 and 1.
        device: Where a list of prompts goes.

    Returns:
        The batch.

    Raises:
        ValueError: No prompt, an empty one, numbers that are no integers, a mask of another shape, or one
            with a gap in the text.
    """
    if not isinstance(tokens, Tensor):
        if mask is not None:
            raise ValueError("a mask was given with a list of prompts, expected a tensor (b, l) with it")
        return _aligned([_row(row, number, device) for number, row in enumerate(tokens)])
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (b, l) with b, l >= 1")
    if tokens.is_floating_point():
        raise ValueError(f"tokens is {tokens.dtype}, expected integers")
    if mask is None:
        return Prompts(tokens, (0,) * len(tokens))
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}: not the same")
    return _aligned([_text(*pair, number) for number, pair in enumerate(zip(tokens, mask != 0, strict=True))])


@torch.no_grad()
def read(model: LanguageModel, prompts: Prompts, state: State, chunk: int) -> Tensor:
    """Read prompts in pieces, each handing its state to the next, in the memory of one piece.

    Args:
        model: A language model.
        prompts: What to read.
        state: Where the sequences stand; overwritten in place with where they stand after the prompts.
        chunk: Tokens of a piece.

    Returns:
        Features of the last position `(b, d)`.
    """
    for piece, context, unbegun in prompts.pieces(chunk):
        features = model.features(piece, state, context)[:, -1]
        if unbegun is not None and len(unbegun):
            state.reset(unbegun)
    return features


def _row(row: Sequence[int] | Tensor, number: int, device: torch.device | str) -> Tensor:
    row = torch.as_tensor(row, device=device)
    if row.ndim != 1 or len(row) == 0 or row.is_floating_point():
        raise ValueError(f"prompt {number} is {tuple(row.shape)} {row.dtype}, expected one or more integers")
    return row.long()


def _text(row: Tensor, mask: Tensor, number: int) -> Tensor:
    """The tokens of a row that are no padding."""
    places = mask.nonzero().squeeze(1)
    if len(places) == 0:
        raise ValueError(f"row {number} of the mask is all padding, expected at least one token")
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places):
        raise ValueError(f"row {number} of the mask has a gap, expected padding at its ends only")
    return row[first : last + 1]


def _aligned(rows: list[Tensor]) -> Prompts:
    if not rows:
        raise ValueError("there is no prompt, expected at least one")
    longest = max(map(len, rows))
    padding = tuple(longest - len(row) for row in rows)
    padded = [torch.cat([row[:1].expand(pad), row]) for row, pad in zip(rows, padding, strict=True)]
    return Prompts(torch.stack(padded), padding)
