"""Finding a checkpoint: a folder as it is, or a repository of the Hugging Face hub, downloaded once."""

from __future__ import annotations

import os
from pathlib import Path

from mambakit.checkpoints.files import CONFIG, CheckpointError, is_megatron

WANTED = (
    CONFIG,
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "*.model",
    "generation_config.json",
)
LEGACY = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*mp_rank_00/model_optim_rng.pt")
"""Older repositories have these instead."""


def locate(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Turn a folder or the name of a repository into a folder on this machine.

    Args:
        name: A folder, or `organisation/model`.
        revision: Branch, tag or commit of the repository.

    Returns:
        The folder.

    Raises:
        CheckpointError: Neither a folder with a `config.json` nor a repository that can be had.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file() and not is_megatron(folder):
            raise CheckpointError(f"{folder} has no {CONFIG}, expected the folder of a checkpoint")
        return folder
    text = os.fspath(name)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{text!r} is no folder, expected one, or the name of a repository such as 'a/b'"
        )
    return _download(text, revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

    try:
        folder = fetch(WANTED)
        if not any(folder.glob("*.safetensors")):
            folder = fetch((*WANTED, *LEGACY))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name!r} is no folder here and cannot be downloaded ({reason})") from None
    if not (folder / CONFIG).is_file() and not is_megatron(folder):
        raise CheckpointError(f"the repository {name!r} has no {CONFIG}")
    return folder
