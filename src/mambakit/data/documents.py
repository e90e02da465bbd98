"""Documents for language modelling: novels, lines of a table, conversations, packed without a leak.

Files are read by their ending:

    .txt     the whole file is one document
    .tsv     every line is one, up to its first tab
    .jsonl   every line is an object with "text", or with "messages": a conversation, of which only what the
             assistant says is asked (chat.py)

All documents of a split stand end to end, each closed by an end token where the vocabulary has one. Windows
of l tokens are cut out of that stream; `seq_idx` tells the model where another document begins, so no token
sees one of another document, and no token is asked whose context is another document.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.config import ConfigError, unknown
from mambakit.data.chat import ChatTemplate
from mambakit.data.config import DataConfig, DataError
from mambakit.data.fetch import find
from mambakit.data.samples import IGNORED, Samples
from mambakit.data.text import Passes
from mambakit.data.tokenizers import END_OF_TEXT, Bytes, Characters, Subwords, Tokenizer, tokenizer_file

_ENDINGS = (".txt", ".tsv", ".jsonl")
_NAMED = ("characters", "bytes", "subwords")


@dataclasses.dataclass(frozen=True)
class PackedStream:
    """Documents end to end.

    Attributes:
        ids: Token ids, (n,).
        documents: Number of the document of each, rising, (n,) int32.
        asked: Whether a model shall learn to say it, (n,) bool.
    """

    ids: np.ndarray
    documents: np.ndarray
    asked: np.ndarray

    @classmethod
    def of(cls, encoded: Iterator[tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> PackedStream:
        """Join documents, each token ids and what is asked of them.

        Raises:
            DataError: There is nothing to learn.
        """
        parts = [(ids.astype(dtype), asked) for ids, asked in encoded if len(ids)]
        if not any(asked[1:].any() for _, asked in parts):
            raise DataError("the documents hold no token to predict")
        lengths = [len(ids) for ids, _ in parts]
        return cls(
            np.concatenate([ids for ids, _ in parts]),
            np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
            np.concatenate([asked for _, asked in parts]),
        )

    def windows(self, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Cut windows out of the stream; what lies behind its end is a document of its own, without labels.

        Args:
            starts: First token of each, (b,) int64.
            length: Tokens of each, l.

        Returns:
            Tokens, labels and seq_idx, (b, l).
        """
        places = starts[:, None] + np.arange(length)
        last = len(self.ids) - 1
        here, after = np.minimum(places, last), np.minimum(places + 1, last)
        known = (places < last) & (self.documents[here] == self.documents[after]) & self.asked[after]
        documents = self.documents[here] - self.documents[starts][:, None]
        return {
            "tokens": np.where(places <= last, self.ids[here].astype(np.int64), 0),
            "labels": np.where(known, self.ids[after].astype(np.int64), IGNORED),
            "seq_idx": np.where(places <= last, documents, documents + 1).astype(np.int32),
        }


class PackedPasses(Passes):
    """Endless training windows over packed documents, every pass cut at another offset.

    Args:
        stream: The documents.
        length: Tokens per window, l.
        seed: Integer in [0, 2**64).
    """

    def __init__(self, stream: PackedStream, length: int, seed: int) -> None:
        super().__init__(stream.ids, length, seed)
        self._stream_of_documents = stream

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the windows numbered `indices`: tokens, labels and seq_idx, (b, l)."""
        return self._stream_of_documents.windows(self.places(indices), self._length)


class PackedSplit(Samples):
    """Windows side by side over packed documents, in order, to the end.

    Args:
        stream: The documents.
        length: Tokens per window, l.
    """

    def __init__(self, stream: PackedStream, length: int) -> None:
        super().__init__(max(1, -(-(len(stream.ids) - 1) // length)))
        self._stream, self._length = stream, length

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the windows numbered `indices`: tokens, labels and seq_idx, (b, l)."""
        return self._stream.windows(indices * self._length, self._length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsConfig(DataConfig, tag="documents"):
    """Text files, tables and conversations, packed.

    Attributes:
        files: The training files, `.txt`, `.tsv` or `.jsonl`; a relative path is also looked for in the
            folder that MAMBAKIT_DATA names.
        validation_files: Files to validate on; none holds out the end of every training file.
        validation_fraction: Share of every file to hold out: of its documents, or of its characters where it
            is one document.
        length: Tokens per window, l.
        vocabulary: `"subwords"` (learned from all files), `"characters"`, `"bytes"`, or the path of a
            `tokenizer.json`; `null` takes that of the model to be fine-tuned.
        vocabulary_size: Tokens of learned subwords.
        lowercase: Learned subwords read capitals as small letters.
        end: Special token that closes every document, where the tokeniser has it.
        chat_template: Path of a Jinja file; `null` takes the model's, or a plain one.
        origin: Where the files can be had, for the message when they are missing.
    """

    files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    length: int = 256
    vocabulary: str | None = "subwords"
    vocabulary_size: int = 8192
    lowercase: bool = False
    end: str = END_OF_TEXT
    chat_template: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        for file in (*self.files, *self.validation_files):
            if Path(file).suffix not in _ENDINGS:
                raise ValueError(f"{file!r} ends in {Path(file).suffix!r}, expected {', '.join(_ENDINGS)}")
        if not self.files:
            raise ValueError("files is empty, expected at least one")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if self.length < 1:
            raise ValueError(f"length is {self.length}, expected at least 1")
        check_vocabulary(self.vocabulary)

    @functools.cached_property
    def _documents(self) -> tuple[list[Any], list[Any]]:
        """Training and held-out documents: strings, or lists of messages."""
        train: list[Any] = []
        held_out: list[Any] = []
        for file in self.files:
            documents = read_documents(find(file, self.origin))
            kept, rest = (documents, []) if self.validation_files else self._split(documents)
            train += kept
            held_out += rest
        for file in self.validation_files:
            held_out += read_documents(find(file, self.origin))
        return train, held_out

    def _split(self, documents: list[Any]) -> tuple[list[Any], list[Any]]:
        if len(documents) == 1 and isinstance(documents[0], str):
            [text] = documents
            border = len(text) - max(1, round(len(text) * self.validation_fraction))
            return [text[:border]], [text[border:]]
        border = len(documents) - max(1, round(len(documents) * self.validation_fraction))
        return documents[:border], documents[border:]

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is not None:
            return ChatTemplate(find(self.chat_template).read_text(encoding="utf-8"))
        own = self.vocabulary is not None and self.vocabulary.endswith(".json")
        found = ChatTemplate.from_folder(Path(self.vocabulary).expanduser().parent) if own else None
        return found or ChatTemplate()

    def _text(self, document: Any) -> str:
        return document if isinstance(document, str) else self._template.render(document)

    @functools.cached_property
    def _cached_tokenizer(self) -> Tokenizer:
        texts = (self._text(document) for split in self._documents for document in split)
        return tokenizer_named(self.vocabulary, texts, self.vocabulary_size, self.lowercase)

    def _stream(self, documents: list[Any]) -> PackedStream:
        tokenizer = self.tokenizer
        end = tokenizer.token(self.end) if isinstance(tokenizer, Subwords) else None
        closing = np.array([] if end is None else [end], dtype=np.int64)

        def encoded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for document in documents:
                if isinstance(document, str):
                    ids = np.concatenate([tokenizer.encode(document), closing])
                    yield ids, np.ones(len(ids), dtype=bool)
                else:
                    ids, asked = self._template.encode(document, tokenizer)
                    yield np.concatenate([ids, closing]), np.concatenate([asked, np.ones(len(closing), bool)])

        return PackedStream.of(encoded(), np.min_scalar_type(self.vocab_size - 1))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser that `vocabulary` names."""
        return self._cached_tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token values; known without the files where subwords are to be learned."""
        return self.vocabulary_size if self.vocabulary == "subwords" else self.tokenizer.vocab_size

    def train(self, seed: int) -> PackedPasses:
        """Shuffled passes over the packed training documents."""
        return PackedPasses(self._stream(self._documents[0]), self.length, seed)

    def validation(self) -> PackedSplit:
        """The held-out documents, side by side."""
        return PackedSplit(self._stream(self._documents[1]), self.length)


def read_documents(path: Path) -> list[Any]:
    """Read the documents of a file: strings, or lists of messages.

    Raises:
        DataError: The file cannot be read, or a line is not what its ending promises.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: byte {error.start}") from None
    if path.suffix == ".txt":
        return [text]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".tsv":
        return [line.partition("\t")[0] for _, line in lines]
    return [_document(line, f"{path}, line {number}") for number, line in lines]


def check_vocabulary(name: str | None) -> None:
    """Refuse a vocabulary that is neither known by name nor a file.

    Raises:
        ValueError: Says which are.
    """
    if name is not None and name not in _NAMED and not name.endswith(".json"):
        raise ValueError(f"{unknown('vocabulary', name, _NAMED)}, or the path of a tokenizer.json")


def tokenizer_named(name: str | None, texts: Iterator[str], size: int, lowercase: bool) -> Tokenizer:
    """Make the tokeniser that a `vocabulary` setting names.

    Args:
        name: `subwords`, `characters`, `bytes`, or the path of a `tokenizer.json`.
        texts: What to learn from; read only where something is learned.
        size: Tokens of learned subwords.
        lowercase: Whether these read capitals as small letters.

    Raises:
        ConfigError: No name, or a file that is no tokeniser.
    """
    if name is None:
        raise ConfigError(
            "data.vocabulary: null means that of a model to be fine-tuned, and none is; "
            f"give {', '.join(_NAMED)} or the path of a tokenizer.json"
        )
    if name == "bytes":
        return Bytes()
    if name == "characters":
        return Characters("".join(texts))
    if name == "subwords":
        return Subwords.trained(texts, size, lowercase=lowercase)
    return tokenizer_file(name)


def _document(line: str, where: str) -> Any:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    content = found.get("text", found.get("messages")) if isinstance(found, dict) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in content
    ):
        return content
    raise DataError(f'{where}: expected an object with "text", or with "messages" of "role" and "content"')
