"""A model together with what it takes to read text with it."""

from __future__ import annotations

import dataclasses

import torch

from mambakit.config import ConfigError
from mambakit.data.tokenizers import END_OF_TEXT, Subwords, Tokenizer, tokenizer_file
from mambakit.models import LanguageModel
from mambakit.training import device as devices
from mambakit.training.finetuning import read_source


@dataclasses.dataclass(frozen=True)
class Reader:
    """A language model and its tokeniser.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: What makes tokens of text.
        end: The token that ends a text and stands before the first, where there is one.
        name: Where it came from.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    end: int | None = None
    name: str = ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def read(word: str, *, dtype: torch.dtype | None = None, device: str = "auto") -> Reader:
    """Load the language model that a word names.

    Args:
        word: A run folder, a checkpoint folder, or a repository such as `state-spaces/mamba-130m-hf`.
        dtype: Type of its weights; as stored by default.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.

    Returns:
        The model and its tokeniser.

    Raises:
        ConfigError: Nothing of this name, or a model without a tokeniser.
    """
    place = devices.choose(device)
    source = read_source(word)
    if source.vocabulary is None:
        raise ConfigError(f"{word} has no tokenizer.json, which turns text into tokens")
    tokenizer = tokenizer_file(source.vocabulary)
    model = source.model.to(place, dtype).eval()
    return Reader(model, tokenizer, _end(model, tokenizer), word)


def _end(model: LanguageModel, tokenizer: Tokenizer) -> int | None:
    """The token that ends a text: what the published config says, else the one that we train with."""
    found = (model.published or {}).get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    if isinstance(found, int):
        return found
    return tokenizer.token(END_OF_TEXT) if isinstance(tokenizer, Subwords) else None
