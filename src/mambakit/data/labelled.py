"""Texts with a class each, packed end to end: sentiment, topics.

A file has a text, a tab and the number of its class on every line. A batch is one row of tokens, the texts
one after the other, and their lengths; what fills the row up to a multiple of 64 tokens is a last document
without a label. Nothing is computed for padding to the longest, and none of the documents sees another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mambakit.data.config import DataConfig, DataError
from mambakit.data.documents import check_vocabulary, tokenizer_named
from mambakit.data.fetch import find
from mambakit.data.samples import IGNORED, Epochs, Samples
from mambakit.data.tokenizers import Tokenizer

_MULTIPLE = 64
"""Tokens that a row is filled up to, so that kernels see few different lengths."""


def pack(documents: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Put documents end to end.

    Args:
        documents: Token ids of each, at least one.

    Returns:
        `tokens` `(1, t)` int64, filled up with token 0, and `lengths` `(n + 1,)` int64: the documents', and
        that of the filling, at least 1.
    """
    lengths = [len(ids) for ids in documents]
    total = sum(lengths)
    filling = _MULTIPLE - total % _MULTIPLE
    tokens = np.concatenate([*documents, np.zeros(filling, np.int64)]).astype(np.int64)
    return {"tokens": tokens[None], "lengths": np.array([*lengths, filling], dtype=np.int64)}


class PackedTexts(Samples):
    """Labelled texts; a batch of them is packed.

    Args:
        texts: Token ids of each, at least one token.
        labels: Class of each, (n,) int64.
    """

    def __init__(self, texts: Sequence[np.ndarray], labels: np.ndarray) -> None:
        super().__init__(len(texts))
        self._texts, self._labels = texts, labels

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Pack the texts numbered `indices`: `tokens`, `lengths`, and `label` `(b + 1,)`, the last -100."""
        packed = pack([self._texts[index] for index in indices])
        return {**packed, "label": np.append(self._labels[indices], IGNORED).astype(np.int64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTextConfig(DataConfig, tag="labelled-text"):
    """Tables of texts and classes.

    Attributes:
        train_file: Lines of a text, a tab and a class number; a relative path is also looked for in the
            folder that MAMBAKIT_DATA names.
        validation_file: The same, watched during training.
        test_file: The same, looked at once at the end.
        classes: Name of each class, in the order of its number.
        vocabulary: `"subwords"` (learned from the training texts), `"characters"`, `"bytes"`, or the path of
            a `tokenizer.json`; `null` takes that of the model to be fine-tuned.
        vocabulary_size: Tokens of learned subwords.
        lowercase: Learned subwords read capitals as small letters.
        max_length: Tokens after which a text is cut.
        origin: Where the files can be had, for the message when they are missing.
    """

    train_file: str
    validation_file: str
    test_file: str | None = None
    classes: tuple[str, ...]
    vocabulary: str | None = None
    vocabulary_size: int = 8192
    lowercase: bool = False
    max_length: int = 512
    origin: str | None = None

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(f"classes is {self.classes}, expected at least two names")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, expected at least 1")
        check_vocabulary(self.vocabulary)

    @functools.cached_property
    def _cached_tokenizer(self) -> Tokenizer:
        texts = (text for text, _ in self._read(self.train_file))
        return tokenizer_named(self.vocabulary, texts, self.vocabulary_size, self.lowercase)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser that `vocabulary` names."""
        return self._cached_tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token values; known without the files where subwords are to be learned."""
        return self.vocabulary_size if self.vocabulary == "subwords" else self.tokenizer.vocab_size

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess."""
        return 1 / len(self.classes)

    def train(self, seed: int) -> Epochs:
        """All training texts, every epoch in its own order."""
        return Epochs(self._texts(self.train_file), seed)

    def validation(self) -> PackedTexts:
        """The texts watched during training."""
        return self._texts(self.validation_file)

    def evaluations(self) -> dict[str, Samples]:
        """The test file, if there is one."""
        return {} if self.test_file is None else {"test": self._texts(self.test_file)}

    def _read(self, file: str) -> Iterator[tuple[str, int]]:
        path = find(file, self.origin)
        try:
            lines = path.read_bytes().decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {str(path)!r}: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield self._line(line, path, number)

    def _line(self, line: str, path: Path, number: int) -> tuple[str, int]:
        text, tab, label = line.rpartition("\t")
        if not tab or not label.strip().isdigit() or int(label) >= len(self.classes):
            raise DataError(
                f"{path}, line {number}: expected a text, a tab and a class from 0 to "
                f"{len(self.classes) - 1}, got {line[-60:]!r}"
            )
        return text, int(label)

    def _texts(self, file: str) -> PackedTexts:
        rows = [(self.tokenizer.encode(text)[: self.max_length], label) for text, label in self._read(file)]
        empty = [number for number, (ids, _) in enumerate(rows, 1) if not len(ids)]
        if empty or not rows:
            raise DataError(f"{file!r}: {f'text {empty[0]} has no token' if empty else 'there is no text'}")
        return PackedTexts([ids for ids, _ in rows], np.array([label for _, label in rows], dtype=np.int64))
