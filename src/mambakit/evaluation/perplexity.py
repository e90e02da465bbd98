"""Perplexity of a text: `exp` of the mean surprise of its tokens.

    exact     the text is read once from its beginning, the state carried from piece to piece: every token is
              judged by everything before it. Only a recurrent model can do that at any length, in constant
              memory.
    strided   windows of `length` tokens, each `stride` further on than the one before, and only the tokens
              that no window has judged yet count: each has at least `length - stride` tokens before it, and
              what lies further back is forgotten. That is how models with a bounded context are measured.

The two differ wherever the model uses more than a window, or is hurt by more than it was trained on; say
which one you report. The first token of a text is judged only where an end token can stand before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mambakit.models import LanguageModel
from mambakit.ops import cross_entropy

CHUNK = 4096
"""Tokens read at once where the state is carried."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The surprise of a text.

    Attributes:
        nats: Sum over the judged tokens.
        tokens: How many were judged.
        bytes: UTF-8 bytes of the text, where known.
    """

    nats: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def metrics(self) -> dict[str, float]:
        """Loss, perplexity per token, and where the bytes are known bits per byte and their perplexity."""
        found = {"loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0)), "tokens": self.tokens}
        if self.bytes:
            bits = self.nats / math.log(2) / self.bytes
            found |= {"bits_per_byte": bits, "byte_perplexity": 2.0**bits, "bytes": self.bytes}
        return found


def exact_perplexity(
    model: LanguageModel, ids: Tensor, *, chunk: int = CHUNK, size: int | None = None
) -> Perplexity:
    """Judge every token by everything before it, carrying the state.

    Args:
        model: A language model, in evaluation mode.
        ids: Token ids of the text `(n,)`, n >= 2; the first is read and not judged.
        chunk: Tokens read at once.
        size: UTF-8 bytes of the judged text.

    Raises:
        ValueError: Fewer than two tokens, or an empty chunk.
    """
    nats = sum(float(part.sum(dtype=torch.float64)) for part in token_nats(model, ids[None], chunk))
    return Perplexity(nats, len(ids) - 1, size)


def token_nats(model: LanguageModel, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Surprise of every token but the first, piece by piece, each judged by everything before it.

    Args:
        model: A language model, in evaluation mode.
        ids: Token ids `(b, n)`, n >= 2.
        chunk: Tokens read at once.

    Yields:
        Nats `(b, at most chunk)`, on the model's device.

    Raises:
        ValueError: Fewer than two tokens, or an empty chunk.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"{ids.shape[1]} tokens, expected at least 2: one to read and one to judge")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    device = next(model.parameters()).device
    with torch.no_grad():
        state = model.init_state(len(ids), max_length=ids.shape[1])
        for start in range(0, ids.shape[1] - 1, chunk):
            piece = ids[:, start : start + chunk + 1].to(device)
            features = model.features(piece[:, :-1], state)
            yield _nats(model, features, piece[:, 1:])


def strided_perplexity(
    model: LanguageModel,
    ids: Tensor,
    *,
    length: int,
    stride: int,
    batch: int = 8,
    size: int | None = None,
) -> Perplexity:
    """Judge tokens in sliding windows.

    Window k covers tokens `k stride ... k stride + length`; it judges those that window k - 1 did not.

    Args:
        model: A language model, in evaluation mode.
        ids: Token ids of the text `(n,)`, n >= 2; the first is read and not judged.
        length: Tokens read in a window.
        stride: Tokens from one window to the next, at most `length`.
        batch: Windows read at once.
        size: UTF-8 bytes of the judged text.

    Raises:
        ValueError: Fewer than two tokens, or a stride that is not in [1, length].
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}, expected 1 to length={length}")
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens, expected at least 2: one to read and one to judge")
    device = next(model.parameters()).device
    targets = len(ids) - 1
    # Each window as (first token read, first judged, end of the judged); a last one may be shorter.
    windows = [(0, 0, min(length, targets))]
    while windows[-1][2] < targets:
        done = windows[-1][2]
        end = min(done + stride, targets)
        windows.append((windows[-1][0] + stride, done, end))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            some = windows[start : start + batch]
            longest = max(end - first for first, _, end in some)
            read = torch.zeros(len(some), longest, dtype=torch.int64)
            for row, (first, _, end) in enumerate(some):
                read[row, : end - first] = ids[first:end]
            features = model.features(read.to(device))
            for row, (first, done, end) in enumerate(some):
                judged = ids[done + 1 : end + 1].to(device)
                found = _nats(model, features[row : row + 1, done - first : end - first], judged[None])
                nats += float(found.sum(dtype=torch.float64))
    return Perplexity(nats, targets, size)


def _nats(model: LanguageModel, features: Tensor, ids: Tensor) -> Tensor:
    """Surprise `(b, l)` of tokens `(b, l)` under features `(b, l, d)`, some rows of the head at a time."""
    rows, asked = features.flatten(0, 1), ids.flatten()
    parts = [
        cross_entropy(model.lm_head(some), labels)[0]
        for some, labels in zip(rows.split(1024), asked.split(1024), strict=True)
    ]
    return torch.cat(parts).view(ids.shape)
