"""Text as language-modelling samples: tiny Shakespeare, or any UTF-8 file.

    training     passes over the text, each cut into windows from another offset and shuffled
    validation   windows side by side, so every held-out token is predicted exactly once, and the loss is a
                 number about the text and not about a draw

The held-out part is the end of the file (nanoGPT and char-rnn split the same way: first 90%, last 10%).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from importlib import resources
from pathlib import Path

import numpy as np

from mambakit.config import unknown
from mambakit.data.config import Baseline, DataConfig, DataError
from mambakit.data.fetch import missing
from mambakit.data.samples import IGNORED, Samples, Stream, below
from mambakit.data.tokenizers import Bytes, Characters, Subwords, Tokenizer

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Passes(Samples):
    """Endless training windows: pass after pass over the text, each pass cut at another offset.

    A pass starts at a random character below `l`, lays windows side by side to the end, and visits them in
    random order. So every character is read once per pass (but for less than a window at the ends) and every
    alignment comes up sooner or later; crops at independent places would leave a share of `exp(-k)` of the
    text unread after `k` passes.

    Args:
        ids: Token ids of the whole text, (n,), any integer dtype.
        length: Tokens per window, l < n.
        seed: Integer in [0, 2**64).

    Raises:
        ValueError: The text is shorter than one window and its last label.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int) -> None:
        super().__init__()
        if len(ids) <= length:
            raise ValueError(f"length is {length}, expected less than the {len(ids)} tokens of the text")
        self._ids = ids
        self._length = length
        self._stream = Stream(seed, "order")
        self._starts: dict[int, np.ndarray] = {}

    @property
    def per_pass(self) -> int:
        """Windows in one pass: as many as fit behind any offset."""
        return max(1, (len(self._ids) - self._length) // self._length)

    def starts(self, number: int) -> np.ndarray:
        """First character of every window of pass `number`, in the order of reading, (per_pass,) int64."""
        if number not in self._starts:
            words = self._stream.words(np.array([number]), 1 + self.per_pass)[0]
            offset = below(words[:1], min(self._length, len(self._ids) - self._length))
            # A batch touches at most the end of one pass and the start of the next, unless it is huge.
            self._starts = {k: self._starts[k] for k in (number - 1, number + 1) if k in self._starts}
            self._starts[number] = offset + self._length * np.argsort(words[1:], kind="stable")
        return self._starts[number]

    def places(self, indices: np.ndarray) -> np.ndarray:
        """First token of each of the windows numbered `indices`, (b,) int64."""
        passes, places = np.divmod(indices, self.per_pass)
        starts = np.empty_like(indices)
        for number in np.unique(passes):
            now = passes == number
            starts[now] = self.starts(int(number))[places[now]]
        return starts

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the windows numbered `indices`: tokens and labels, (b, l) int64."""
        starts = self.places(indices)
        windows = np.lib.stride_tricks.sliding_window_view(self._ids, self._length + 1)[starts]
        return {
            "tokens": windows[:, :-1].astype(np.int64),
            "labels": windows[:, 1:].astype(np.int64),
        }


class Windows(Samples):
    """Windows side by side, in which every token from `first` on is a label exactly once.

    The last window is filled up with token 0 and label -100.

    Args:
        ids: Token ids, (n,), any integer dtype.
        length: Tokens per window, l.
        first: Position of the first token to predict, at least 1: what stands before it is read, not asked.

    Raises:
        ValueError: There is nothing to predict.
    """

    def __init__(self, ids: np.ndarray, length: int, first: int = 1) -> None:
        if not 1 <= first < len(ids):
            raise ValueError(f"no token to predict: {len(ids)} tokens, the first to predict at {first}")
        self._ids = ids
        self._length = length
        self._first = first
        super().__init__(-(-(len(ids) - first) // length))

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the windows numbered `indices`: tokens and labels, (b, l) int64."""
        targets = self._first + indices[:, None] * self._length + np.arange(self._length)
        inside = targets < len(self._ids)
        targets = np.where(inside, targets, 1)
        return {
            # Widened first: -100 does not fit the small types that ids are kept in.
            "tokens": np.where(inside, self._ids[targets - 1].astype(np.int64), 0),
            "labels": np.where(inside, self._ids[targets].astype(np.int64), IGNORED),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HeldOutText(DataConfig):
    """What both text sources share: vocabulary, windows and split."""

    length: int = 256
    validation_length: int | None = None
    vocabulary: str = "characters"

    def __post_init__(self) -> None:
        for key in ("length", "validation_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}, expected at least 1")
        if self.vocabulary not in ("characters", "bytes") and not self.vocabulary.endswith(".json"):
            problem = unknown("vocabulary", self.vocabulary, ("characters", "bytes"))
            raise ValueError(f"{problem}, or the path of a tokenizer.json")

    def _texts(self) -> tuple[str, str, bool]:
        """Training text, held-out text, and whether the second goes on where the first ends."""
        raise NotImplementedError

    @functools.cached_property
    def _cached_tokenizer(self) -> Tokenizer:
        if self.vocabulary == "bytes":
            return Bytes()
        if self.vocabulary == "characters":
            return Characters("".join(self._texts()[:2]))
        return Subwords.from_file(self.vocabulary)

    @functools.cached_property
    def _encoded(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Training ids, ids to validate on, and the first position of these to predict."""
        train_text, held_out_text, continued = self._texts()
        smallest = np.min_scalar_type(self.vocab_size - 1)
        train = self.tokenizer.encode(train_text).astype(smallest)
        held_out = self.tokenizer.encode(held_out_text).astype(smallest)
        if continued:
            # The last training token is read, not asked, so that the first held-out one can be predicted.
            return train, np.concatenate([train[-1:], held_out]), 1
        return train, held_out, 1

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser that `vocabulary` names."""
        return self._cached_tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token values."""
        return self.tokenizer.vocab_size

    def train(self, seed: int) -> Passes:
        """Shuffled passes over the training text."""
        return Passes(self._encoded[0], self.length, seed)

    def validation(self) -> Windows:
        """The held-out text, every token of it predicted once."""
        _, ids, first = self._encoded
        return Windows(ids, self.validation_length or self.length, first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShakespeareConfig(_HeldOutText, tag="shakespeare"):
    """Tiny Shakespeare, shipped with the package: 1,115,394 characters over 65 symbols.

    The first 90% train, the last 10% validate, as in char-rnn and nanoGPT. The loss is in nats per character
    (with `vocabulary="bytes"` too: the text is ASCII). nanoGPT, `config/train_shakespeare_char.py`, reaches
    1.4697 with 10.65 M parameters on a GPU and 1.88 with its CPU settings.

    Attributes:
        length: Tokens per training window, l.
        validation_length: Tokens per validation window, as many by default; a model that carries a state
            reads longer ones with fewer cold starts.
        vocabulary: `"characters"`, `"bytes"`, or the path of a `tokenizer.json`.
    """

    @property
    def baseline(self) -> Baseline | None:
        """Interpolated Witten-Bell n-gram of the best order, trained and tested on the same split."""
        if self.vocabulary.endswith(".json"):
            return None
        return Baseline("order-4 n-gram", "loss", 1.669)

    def _texts(self) -> tuple[str, str, bool]:
        text = shakespeare()
        border = len(text) * 9 // 10
        return text[:border], text[border:], True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(_HeldOutText, tag="text"):
    """Any UTF-8 text file.

    Attributes:
        path: The file.
        validation_path: Another file to validate on; None holds out the end of `path`.
        validation_fraction: Share of the characters of `path` to hold out, in (0, 1).
        length: Tokens per training window, l.
        validation_length: Tokens per validation window; as many by default.
        vocabulary: `"bytes"`, `"characters"` (those that occur in the files), or the path of a
            `tokenizer.json`.
    """

    path: str
    validation_path: str | None = None
    validation_fraction: float = 0.1
    vocabulary: str = "bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")

    def _texts(self) -> tuple[str, str, bool]:
        text = _read(self.path)
        if self.validation_path is not None:
            return text, _read(self.validation_path), False
        border = len(text) - max(1, round(len(text) * self.validation_fraction))
        if border < 1:
            raise DataError(f"{self.path!r} holds {len(text)} characters, too few to train and validate on")
        return text[:border], text[border:], True


def shakespeare() -> str:
    """Read tiny Shakespeare, 1,115,394 characters.

    Raises:
        DataError: The installed file is not the published one.
    """
    content = resources.files("mambakit.data").joinpath("files/tinyshakespeare.txt").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise DataError("the tinyshakespeare.txt inside the package is damaged; install mambakit again")
    return content.decode("ascii")


def _read(path: str) -> str:
    """Read a text file as it is, without touching its line ends."""
    file = Path(path).expanduser()
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise missing(file) from None
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
