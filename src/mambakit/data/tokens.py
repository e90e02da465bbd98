"""Token shards: more tokens than memory holds, kept on disk and mapped into memory.

A folder of shards is

    index.json              magic, version, dtype, vocabulary size, tokeniser, the list of shards, own hash
    tokens-00000.bin        token ids, little endian uint16 (uint32 above 65,536 token values), nothing else
    tokens-00000.offsets    where each document starts, and the end: little endian uint64

and `write_shards` makes it whole or not at all: everything is written into a temporary folder, flushed to the
disk, and renamed. Documents are never split over shards, and every file's SHA-256 is in the index.

As samples, the documents are packed end to end and cut into windows of l tokens: no padding, and each token
is read once per epoch. `seq_idx` counts the documents within a window, and nothing is asked at a document's
last token, because what follows belongs to another.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.data.config import DataConfig, DataError
from mambakit.data.fetch import missing, sha256, write_durably
from mambakit.data.samples import IGNORED, Epochs, Samples
from mambakit.data.tokenizers import Tokenizer, tokenizer_from

MAGIC = "mambakit token shards"
VERSION = 1
_INDEX = "index.json"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def write_shards(
    documents: Iterable[Sequence[int] | np.ndarray],
    folder: str | Path,
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    tokens_per_shard: int = 1 << 27,
) -> None:
    """Write documents as token shards.

    Args:
        documents: Token ids of each document, at least one token each; read once, one at a time. End each
            with an end-of-text token if a model shall learn where to stop.
        folder: Where to put the shards; must not exist yet.
        vocab_size: Every id is in [0, vocab_size).
        tokenizer: What made the ids; kept in the index so that readers can decode.
        tokens_per_shard: A shard is closed before the document that would take it past this many tokens.

    Raises:
        ValueError: The folder exists, a document is empty, an id is out of range, or there is no document.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{str(folder)!r} exists already; shards are never changed, choose another folder")
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size is {vocab_size}, expected between 1 and {1 << 32}")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        checked = _checked(documents, vocab_size, _DTYPES[dtype])
        shards = [
            _write_shard(temporary, f"tokens-{number:05d}", group)
            for number, group in enumerate(_grouped(checked, tokens_per_shard))
        ]
        if not shards:
            raise ValueError("there are no documents to write")
        index = {
            "magic": MAGIC,
            "version": VERSION,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer.describe() if tokenizer is not None else None,
            "shards": shards,
        }
        index["sha256"] = _digest(index)
        write_durably(temporary / _INDEX, [json.dumps(index, indent=1).encode()])
        _flush_folder(temporary)
        temporary.rename(folder)
        _flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class TokenShards:
    """All shards of a folder, read as one long sequence of tokens.

    Args:
        folder: A folder written by `write_shards`.
        verify: Hash every file. Sizes are checked either way.

    Attributes:
        vocab_size: Every id is in [0, vocab_size).
        tokenizer: What made the ids, or None.
        n_tokens: Tokens in all shards.
        n_documents: Documents in all shards.

    Raises:
        DataError: A file is missing, cut short, changed, or of another format.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer = tokenizer_from(index["tokenizer"]) if index["tokenizer"] else None
        self._tokens: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        for shard in index["shards"]:
            tokens, offsets = _map_shard(self.folder, shard, _DTYPES[index["dtype"]], verify)
            self._tokens.append(tokens)
            self._offsets.append(offsets)
        self._ends = np.cumsum([len(tokens) for tokens in self._tokens])
        self.n_tokens = int(self._ends[-1])
        self.n_documents = sum(len(offsets) - 1 for offsets in self._offsets)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Read consecutive tokens, over the borders of shards where need be.

        Args:
            start: Position of the first token in the whole sequence.
            count: Number of tokens, at least 1.

        Returns:
            Token ids (count,) int64, and for each the number of its document within this piece, counted
            from 0, (count,) int64.

        Raises:
            ValueError: The piece does not lie inside the sequence.
            DataError: An id is not in the vocabulary, so the file is damaged.
        """
        stop = start + count
        if not 0 <= start < stop <= self.n_tokens:
            raise ValueError(f"tokens {start} to {stop} asked for, there are {self.n_tokens}")
        tokens = np.empty(count, dtype=np.int64)
        begins = np.zeros(count, dtype=np.int64)
        position = start
        while position < stop:
            shard = int(np.searchsorted(self._ends, position, side="right"))
            base = int(self._ends[shard]) - len(self._tokens[shard])
            upto = min(stop, int(self._ends[shard]))
            tokens[position - start : upto - start] = self._tokens[shard][position - base : upto - base]
            offsets = self._offsets[shard]
            # In the offsets' own type, or numpy would convert all of them first.
            borders = np.array([position - base, upto - base], dtype=offsets.dtype)
            first, last = np.searchsorted(offsets, borders)
            begins[offsets[first:last].astype(np.int64) + base - start] = 1
            position = upto
        if tokens.max() >= self.vocab_size:
            at = start + int(tokens.argmax())
            raise DataError(
                f"{str(self.folder)!r}: token {at} has id {tokens.max()}, expected [0, {self.vocab_size})"
            )
        begins[0] = 0
        return tokens, np.cumsum(begins)

    def documents(self) -> Iterator[np.ndarray]:
        """Go through the documents one by one: token ids, (n,) int64 each."""
        for tokens, offsets in zip(self._tokens, self._offsets, strict=True):
            for begin, end in itertools.pairwise(offsets):
                yield tokens[begin:end].astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes map the files again instead of receiving their content."""
        return TokenShards, (self.folder, False)


class PackedWindows(Samples):
    """Windows of l tokens side by side over all shards, with the borders of documents.

    Args:
        shards: Where the tokens are.
        length: Tokens per window, l.
        partial: Also give the last window where it is not full; it is filled up with token 0 and label -100.

    Raises:
        ValueError: There are too few tokens for one window.
    """

    def __init__(self, shards: TokenShards, length: int, partial: bool) -> None:
        self._shards = shards
        self._length = length
        # The last token of all can only be a label.
        full, rest = divmod(shards.n_tokens - 1, length)
        size = full + (partial and rest > 0)
        if size == 0:
            raise ValueError(f"length is {length}, expected less than the {shards.n_tokens} tokens there are")
        super().__init__(size)

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the windows numbered `indices`: tokens, labels and seq_idx, (b, l)."""
        shape = (len(indices), self._length)
        tokens = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        seq_idx = np.zeros(shape, dtype=np.int32)
        for row, index in enumerate(indices):
            start = int(index) * self._length
            ids, document = self._shards.read(start, min(self._length + 1, self._shards.n_tokens - start))
            count = len(ids) - 1
            tokens[row, :count] = ids[:-1]
            labels[row, :count] = np.where(document[1:] == document[:-1], ids[1:], IGNORED)
            seq_idx[row, :count] = document[:-1]
            seq_idx[row, count:] = document[-1] + 1
        return {"tokens": tokens, "labels": labels, "seq_idx": seq_idx}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig(DataConfig, tag="tokens"):
    """Token shards on disk, in the folders `train` and `validation` below `path`.

    Attributes:
        path: The folder around both.
        length: Tokens per sample, l.
        verify: Hash all files before training; about a second per gigabyte.
    """

    path: str
    length: int = 1024
    verify: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}, expected at least 1")

    @functools.cached_property
    def _shards(self) -> tuple[TokenShards, TokenShards]:
        """The shards to train and to validate on."""
        train, validation = (
            TokenShards(Path(self.path, name).expanduser(), self.verify) for name in ("train", "validation")
        )
        if train.vocab_size != validation.vocab_size:
            raise DataError(
                f"{self.path!r}: vocab_size is {train.vocab_size} for train, "
                f"{validation.vocab_size} for validation"
            )
        return train, validation

    @property
    def vocab_size(self) -> int:
        """Number of token values, from the index."""
        return self._shards[0].vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokeniser, where the writer of the shards left one."""
        return self._shards[0].tokenizer

    def train(self, seed: int) -> Epochs:
        """Packed windows, every epoch in its own order."""
        return Epochs(PackedWindows(self._shards[0], self.length, partial=False), seed)

    def validation(self) -> PackedWindows:
        """Packed windows over all held-out tokens."""
        return PackedWindows(self._shards[1], self.length, partial=True)


def _checked(
    documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The documents in the dtype they are stored in, refusing what would not survive it."""
    for number, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"document {number} is {ids.dtype} {ids.shape}, expected a vector of integers")
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"document {number} has token id {wrong}, expected [0, {vocab_size})")
        yield ids.astype(dtype)


def _grouped(documents: Iterable[np.ndarray], limit: int) -> Iterator[Iterator[np.ndarray]]:
    """Cut a stream of documents into streams of at most `limit` tokens (or one longer document) each.

    Each inner stream has to be used up before the next one is asked for.
    """
    documents = iter(documents)
    waiting = next(documents, None)

    def group() -> Iterator[np.ndarray]:
        nonlocal waiting
        total = 0
        while waiting is not None and (total == 0 or total + len(waiting) <= limit):
            total += len(waiting)
            current, waiting = waiting, next(documents, None)
            yield current

    while waiting is not None:
        yield group()


def _write_shard(folder: Path, name: str, documents: Iterator[np.ndarray]) -> dict[str, Any]:
    """Write one shard's two files and return its entry in the index."""
    offsets = [0]

    def blocks() -> Iterator[bytes]:
        for document in documents:
            offsets.append(offsets[-1] + len(document))
            yield document.tobytes()

    bin_sha256 = write_durably(folder / f"{name}.bin", blocks())
    offsets_sha256 = write_durably(folder / f"{name}.offsets", [np.array(offsets, dtype="<u8").tobytes()])
    return {
        "name": name,
        "tokens": offsets[-1],
        "documents": len(offsets) - 1,
        "bin_sha256": bin_sha256,
        "offsets_sha256": offsets_sha256,
    }


def _map_shard(
    folder: Path, shard: Mapping[str, Any], dtype: np.dtype, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Map one shard's tokens and document offsets, after checking that they are what the index says."""
    arrays = []
    for kind, item, count in (
        ("bin", dtype, shard["tokens"]),
        ("offsets", np.dtype("<u8"), shard["documents"] + 1),
    ):
        path = folder / f"{shard['name']}.{kind}"
        if not path.is_file():
            raise DataError(f"{str(path)!r} is missing, the index names it")
        size, expected = path.stat().st_size, count * item.itemsize
        if size != expected:
            raise DataError(f"{str(path)!r} has {size} bytes, the index says {expected}")
        if verify and sha256(path) != shard[f"{kind}_sha256"]:
            raise DataError(f"{str(path)!r} is damaged: its content does not match the hash in the index")
        # A plain view of the map: np.memmap's own slicing is several times slower.
        arrays.append(np.memmap(path, dtype=item, mode="r").view(np.ndarray))
    return arrays[0], arrays[1]


def _read_index(folder: Path) -> dict[str, Any]:
    """Read index.json and refuse anything but an intact index of this version."""
    path = folder / _INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise missing(path if folder.is_dir() else folder) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(index, dict) or index.get("magic") != MAGIC:
        raise DataError(f"{str(path)!r} is not an index of mambakit token shards")
    if index.get("version") != VERSION:
        raise DataError(f"{str(path)!r} has version {index.get('version')!r}, this mambakit reads {VERSION}")
    if index.pop("sha256", None) != _digest(index):
        raise DataError(f"{str(path)!r} is damaged: its content does not match its own hash")
    return index


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut (POSIX; other systems cannot open folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
