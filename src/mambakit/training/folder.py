"""The folder that a run lives in.

config.json         the whole configuration, sizes of the model included
metrics.jsonl       a line per measurement          (log.py)
curves.png          the same as a picture           (curves.py)
tensorboard/        and as TensorBoard events
checkpoints/        to resume from                  (checkpoint.py)
model.safetensors   the model to use
tokenizer.json      for text: how it becomes tokens
adapter/            of a LoRA run: the adapters alone  (finetuning.py)
summary.json        what came out                   (summary.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn

from mambakit import files
from mambakit.config import ConfigError, unknown
from mambakit.data.config import DataConfig
from mambakit.data.tokenizers import Tokenizer, tokenizer_from
from mambakit.layers import lora
from mambakit.training import checkpoint
from mambakit.training.config import TrainConfig

CONFIG = "config.json"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
TOKENIZER = "tokenizer.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[str | None]:
    """Take a run folder for one run.

    A folder that already holds a run is moved aside, never overwritten, unless it is to be resumed.

    Args:
        folder: The run folder; made if needed.
        resume: Keep what is there.

    Yields:
        A line about a run that was moved aside, or None.

    Raises:
        ConfigError: The path is a file, cannot be written, or another process is training there.
    """
    note = None
    try:
        if not resume and (folder / CONFIG).exists():
            with _locked(folder):  # so that a run that is alive is not moved from under its process
                aside = _free_name(folder)
            folder.rename(aside)
            note = f"an earlier run was in {folder}; it is now in {aside}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot use {folder} as a run folder ({error.strerror})") from None
    with _locked(folder):
        yield note


def write_config(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
    """Write what `load_run` needs beside the weights.

    Args:
        folder: The run folder.
        config: The run as plain data, with all sizes of its model.
        tokenizer: The data's tokenizer, if it is text.
    """
    files.replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        files.replace_text(folder / TOKENIZER, json.dumps(tokenizer.describe()) + "\n")


def load_run(path: str | os.PathLike[str]) -> tuple[nn.Module, TrainConfig, DataConfig]:
    """Load what a run has learned.

    Args:
        path: A run folder. If the run is not finished, its newest intact checkpoint is used, and a warning
            says so.

    Returns:
        The model on the CPU in evaluation mode, the run's configuration, and its data source (nothing of the
        data is read).

    Raises:
        ConfigError: No run there, or nothing learned yet, or a file in it is damaged.
    """
    folder = _existing(path)
    config = _with_own_vocabulary(_read_config(folder), folder)
    model = config.task.build_model(config.model)
    try:
        if (folder / MODEL).exists():
            load_model(model, folder / MODEL)
        else:
            _load_newest(folder, model, config)
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{folder}: the weights cannot be loaded ({str(error).splitlines()[0]})") from None
    return model.eval(), config, config.data


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Load a run's tokenizer, or None if its data is not text.

    Raises:
        ConfigError: No run there, or the file is damaged.
    """
    file = _existing(path) / TOKENIZER
    return tokenizer_from(_read_json(file)) if file.exists() else None


def model_note(folder: Path) -> dict[str, str]:
    """The header of a run's `model.safetensors`: the step, and its validation loss if chosen by it."""
    if not (folder / MODEL).exists():
        return {}
    try:
        with safe_open(folder / MODEL, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _with_own_vocabulary(config: TrainConfig, folder: Path) -> TrainConfig:
    """Let data whose vocabulary was learned use what was learned."""
    if getattr(config.data, "vocabulary", None) != "subwords" or not (folder / TOKENIZER).is_file():
        return config
    data = dataclasses.replace(config.data, vocabulary=str(folder / TOKENIZER))
    return dataclasses.replace(config, data=data)


def _load_newest(folder: Path, model: nn.Module, config: TrainConfig) -> None:
    found, refused = checkpoint.newest(folder / CHECKPOINTS)
    if found is None:
        raise ConfigError(f"{folder} holds no model yet{': ' if refused else ''}{'; '.join(refused)}")
    warnings.warn(f"{folder} is not finished: using its checkpoint of step {found.step}", stacklevel=3)
    if config.finetune is not None and config.finetune.mode == "lora":
        lora.add_adapters(model, config.finetune.lora)
    found.load_into("ema" if config.train.ema is not None else "model", model)
    lora.fold(model)


def _existing(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        parent = folder.parent
        runs = [str(file.parent) for file in parent.glob(f"*/{CONFIG}")] if parent.is_dir() else []
        raise ConfigError(unknown("run", str(folder), runs))
    return folder


def _read_config(folder: Path) -> TrainConfig:
    return TrainConfig.from_dict(_read_json(folder / CONFIG), where=str(folder / CONFIG))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from None


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out: another process is training in {folder}; choose another out=") from None
        yield
