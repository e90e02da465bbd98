"""The model that a word on the command line names: a run of one's own, or a published checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mambakit.checkpoints import CheckpointError, locate
from mambakit.checkpoints.files import read_config
from mambakit.config import ConfigError, unknown
from mambakit.data.tokenizers import Subwords, Tokenizer
from mambakit.layers.quantised import ROUNDED_FORMS, quantise
from mambakit.load import load
from mambakit.models.language import LanguageModel
from mambakit.training import load_run, load_tokenizer
from mambakit.training.finetuning import is_run

_TOKENIZER, _GENERATION = "tokenizer.json", "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Writer:
    """What it takes to continue a text.

    Attributes:
        model: The model, on the CPU.
        tokenizer: Its tokeniser; `None` only where it was not needed.
        stop_tokens: Tokens that end a text.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    stop_tokens: Sequence[int] = ()


def writer(
    word: str, dtype: str | None = None, quantize: str | None = None, *, needs_tokenizer: bool = True
) -> Writer:
    """Load the model that a word names.

    Args:
        word: A run folder, a checkpoint folder, or a repository such as `state-spaces/mamba-130m-hf`.
        dtype: Type of a checkpoint's weights; as stored by default.
        quantize: Form in which the linear layers' weights are kept, `int8` or `int4`.
        needs_tokenizer: Whether to refuse a checkpoint without a tokeniser.

    Returns:
        The model and its tokeniser.

    Raises:
        ConfigError: Nothing of this name, or something that does not write text.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    if quantize not in (None, *ROUNDED_FORMS):
        raise ConfigError(unknown("form", quantize, ROUNDED_FORMS))
    if is_run(word):
        return _of_run(word, quantize)
    folder = locate(word)
    published = read_config(folder)
    tokenizer = None
    if (folder / _TOKENIZER).is_file():
        tokenizer = Subwords.from_file(folder / _TOKENIZER)
    elif needs_tokenizer:
        raise CheckpointError(f"{folder} has no {_TOKENIZER}, which turns text into tokens")
    model = load(folder, dtype=None if dtype is None else DTYPES[dtype], quantize=quantize)
    return Writer(model, tokenizer, _ends(folder, published))


def _of_run(word: str, quantize: str | None) -> Writer:
    model, config, _ = load_run(word)
    tokenizer = load_tokenizer(word)
    if tokenizer is None:
        raise ConfigError(
            f"{word} was trained on {config.data.tag} data, which is not text: nothing to generate"
        )
    return Writer(model if quantize is None else quantise(model, quantize), tokenizer)


def _ends(folder: Path, published: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: what is said of generation goes before what is said of the network."""
    settings = published
    if (folder / _GENERATION).is_file():
        try:
            settings = {**published, **json.loads((folder / _GENERATION).read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / _GENERATION} is no JSON object ({error})") from None
    found = settings.get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return tuple(token for token in found if isinstance(token, int))
