"""Text to integers and back: characters, bytes, and any tokeniser of the `tokenizers` library.

All three share one small protocol and can be written into a run folder as plain JSON (`describe`), so that a
trained model finds its own tokeniser again (`tokenizer_from`) without the data it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mambakit.config import ConfigError, unknown

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
END_OF_TEXT = "<|endoftext|>"
"""The special token, number 0, of the tokenisers that are trained here."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Every id is in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, (l,) int64. Raises ValueError where the text cannot be said."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the token ids; a torch or numpy vector will do."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain data from which `tokenizer_from` makes an equal tokeniser."""
        ...


class Characters:
    """One token per character, over a fixed alphabet in the order of the code points.

    Args:
        symbols: The alphabet; repeats and order do not matter.

    Raises:
        ValueError: The alphabet is empty.
    """

    def __init__(self, symbols: str) -> None:
        self.symbols = "".join(sorted(set(symbols)))
        if not self.symbols:
            raise ValueError("a character tokeniser needs at least one symbol, got an empty alphabet")
        self._points = _code_points(self.symbols)

    @property
    def vocab_size(self) -> int:
        """Size of the alphabet."""
        return len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """Look up every character.

        Raises:
            ValueError: A character is not in the alphabet; the message names it and its position.
        """
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        strange = np.flatnonzero(self._points[ids] != points)
        if strange.size:
            at = int(strange[0])
            raise ValueError(
                f"character {text[at]!r} at position {at} is not among the {self.vocab_size} symbols "
                f"this model knows: {self.symbols!r}"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Join the symbols."""
        return "".join(self.symbols[i] for i in _in_range(ids, self.vocab_size))

    def describe(self) -> dict[str, Any]:
        """The alphabet."""
        return {"type": "characters", "symbols": self.symbols}


class Bytes:
    """One token per byte of UTF-8: 256 tokens, every text can be said."""

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Read the bytes as UTF-8; a broken sequence, such as a cut-off last character, becomes U+FFFD."""
        return bytes(_in_range(ids, 256)).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": "bytes"}


class Subwords:
    """A tokeniser of the `tokenizers` library, such as the GPT-NeoX one that the published Mambas use.

    Args:
        definition: The text of a `tokenizer.json`. It is kept as it is, so a run folder is complete.

    Raises:
        ConfigError: The library is not installed, or the text is not such a definition.
    """

    def __init__(self, definition: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ConfigError("subword tokenisers need: pip install tokenizers") from None
        try:
            model = json.loads(definition)["model"]["type"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError("not a tokenizer.json: expected an object with a model and its type") from None
        if model not in _MODELS:
            raise ConfigError(unknown("tokeniser model", model, _MODELS))
        self.definition = definition
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        # Ids may have gaps, so the size of the table is not the number of entries.
        self._vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    @classmethod
    def from_file(cls, path: str | Path) -> Subwords:
        """Read a `tokenizer.json`.

        Raises:
            ConfigError: No such file, or not a tokeniser.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the tokeniser {str(path)!r}: {error}") from None

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int, *, lowercase: bool = False) -> Subwords:
        """Learn byte-pair merges (Sennrich et al., 1508.07909) of words and of runs of punctuation.

        White space only separates words, so `said,` and `said ,` are the same tokens; decoding puts a space
        between any two words.

        Args:
            texts: What to learn from.
            vocab_size: Tokens at most; `END_OF_TEXT` is number 0.
            lowercase: Read capitals as small letters.

        Returns:
            The tokeniser.

        Raises:
            ConfigError: The tokenizers library is not installed.
        """
        try:
            from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        except ImportError:
            raise ConfigError("subword tokenisers need: pip install tokenizers") from None
        unknown_token = "<|unknown|>"
        made = Tokenizer(models.BPE(unk_token=unknown_token, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
        )
        # The mark of a word's beginning is a letter of its own: with marks at the ends of words, which the
        # library offers too, two trainings on the same texts number the tokens differently.
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        special = [END_OF_TEXT, unknown_token]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            show_progress=False,
            min_frequency=2,
        )
        made.train_from_iterator(texts, trainer)
        return cls(made.to_str())

    def token(self, text: str) -> int | None:
        """Number of the token that is written like this, if there is one."""
        return self._tokenizer.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return self._vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Token ids, without any special tokens added at the ends."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens, special ones included."""
        return self._tokenizer.decode(_in_range(ids, self.vocab_size), skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """The whole definition, so that the file it came from may go away."""
        return {"type": "subwords", "definition": json.loads(self.definition)}

    def __getstate__(self) -> dict[str, Any]:
        """Only the definition travels to worker processes."""
        return {"definition": self.definition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the tokeniser again."""
        self.__init__(state["definition"])  # type: ignore[misc]


def tokenizer_file(path: str | Path) -> Tokenizer:
    """Read a tokeniser that a run left behind, or the `tokenizer.json` of a published checkpoint.

    Args:
        path: The file.

    Returns:
        The tokeniser.

    Raises:
        ConfigError: No such file, or neither of the two.
    """
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokeniser {str(path)!r}: {error}") from None
    if isinstance(description, Mapping) and "type" in description:
        return tokenizer_from(description)
    return Subwords.from_file(path)


def tokenizer_from(description: Mapping[str, Any]) -> Tokenizer:
    """Make the tokeniser that `describe` described.

    Args:
        description: Plain data, for example `{"type": "characters", "symbols": "abc"}`.

    Returns:
        An equal tokeniser.

    Raises:
        ConfigError: The type is unknown or a part is missing.
    """
    kind = description.get("type")
    try:
        if kind == "characters":
            return Characters(description["symbols"])
        if kind == "bytes":
            return Bytes()
        if kind == "subwords":
            return Subwords(json.dumps(description["definition"], ensure_ascii=False))
    except KeyError as missing:
        raise ConfigError(f"the description of a {kind} tokeniser lacks {missing}") from None
    raise ConfigError(unknown("tokeniser", kind, ("characters", "bytes", "subwords")))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _in_range(ids: Sequence[int], vocab_size: int) -> list[int]:
    values = np.asarray(ids, dtype=np.int64).reshape(-1)
    strange = values[(values < 0) | (values >= vocab_size)]
    if strange.size:
        raise ValueError(f"token id {strange[0]} is not in [0, {vocab_size})")
    return values.tolist()
