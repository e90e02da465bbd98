"""Checkpoint folders: a `config.json` and tensors, in one safetensors file or many, or in PyTorch's old form.

Tensors are read one at a time, when asked for. From safetensors they are views of the mapped file, so that a
model larger than half of the memory can be loaded; `pytorch_model.bin` is read with `weights_only=True`,
which makes tensors and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambakit import files
from mambakit.config import ConfigError, unknown

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MEGATRON = ("mp_rank_00/model_optim_rng.pt", "release/mp_rank_00/model_optim_rng.pt")
"""Where Megatron-LM keeps the weights of a model that was not split."""
UNNAMED = {"model_type": "mamba2_hybrid"}
"""What is said of such a model, whose folder has no `config.json`: the published ones are of this kind."""
MODEL, EXTRA = "model", "_extra_state"
"""The key under which some files of PyTorch's old form hold the tensors, and what they hold beside them."""
SHARD_BYTES = 5_000_000_000
_DAMAGE = (
    *(SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(EOFError, AssertionError, zipfile.BadZipFile),
)
"""What a damaged file raises, according to where the damage is."""
_MOST_JSON = 256 << 20  # bytes; the index of the largest published model has a few


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used, said in one line that names the file and the tensor."""


class _Mapped:
    """A safetensors file, mapped."""

    def __init__(self, handle: Any) -> None:
        self._handle, self.names = handle, frozenset(handle.keys())

    def read(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())


class _Unpickled:
    """A file of PyTorch's old form, whose tensors are made on opening (mapped, where it is a zip archive)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.names = tensors, frozenset(tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder by name, read when asked for.

    Args:
        folder: The folder.
        where: Name -> file in it.
        files: File -> what is open there; see `open_tensors`.
    """

    def __init__(
        self, folder: Path, where: Mapping[str, str], files: Mapping[str, _Mapped | _Unpickled]
    ) -> None:
        self._folder, self._where, self._files = folder, where, files

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._where)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; reads nothing."""
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: No such tensor, or its file is damaged.
        """
        if name not in self._where:
            raise CheckpointError(f"{self._folder}: {unknown('tensor', name, self._where)}")
        try:
            return self._files[self._where[name]].read(name)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self._folder / self._where[name]}: {name}: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._files[self._where[name]].shape(name)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """Open the tensors of a checkpoint folder.

    Args:
        folder: With `model.safetensors`, or its index and shards, or `pytorch_model.bin`, or its index.

    Yields:
        The tensors by name.

    Raises:
        CheckpointError: No such file, or one that is missing, truncated, or no such file at all.
    """
    single, index = _choose(folder)
    with contextlib.ExitStack() as stack:
        if index is None:
            opened = {single: _open(stack, folder / single)}
            where = dict.fromkeys(sorted(opened[single].names), single)
        else:
            where = _read_index(folder / index)
            opened = {file: _open(stack, folder / file) for file in sorted(set(where.values()))}
            for name, file in where.items():
                if name not in opened[file].names:
                    raise CheckpointError(f"{folder / index}: {name} is said to be in {file}, but is not")
        yield Tensors(folder, where, opened)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `config.json`.

    Infinity may be written bare, as Python does, or as `{"__float__": "Infinity"}`. A checkpoint of
    Megatron-LM may have no such file, and is taken for the published hybrid then.

    Raises:
        CheckpointError: A file that is missing or holds no JSON object.
    """
    if not (folder / CONFIG).is_file() and is_megatron(folder):
        return dict(UNNAMED)
    config = _read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / CONFIG} holds a {type(config).__name__}, expected an object with settings"
        )
    return config


def is_megatron(folder: Path) -> bool:
    """Whether a folder holds weights as Megatron-LM writes them."""
    return any((folder / name).is_file() for name in MEGATRON)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    pickled: bool = False,
    wrapped: bool = False,
) -> None:
    """Write a checkpoint folder in safetensors, in one file or in shards with an index.

    Files are written beside their place and renamed; `config.json` comes last, so that a folder that has one
    is whole. Only one shard is held in memory beside the model.

    Args:
        folder: Made if needed; must not hold a checkpoint.
        config: What `config.json` is to say.
        tensors: Names and tensors; each is asked for once.
        shard_bytes: No file becomes larger, unless one tensor is.
        pickled: Write one `pytorch_model.bin` instead, for readers that know nothing else.
        wrapped: Write the tensors under the key `model` there.

    Raises:
        CheckpointError: The folder already holds a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).exists() or _present(folder):
        raise CheckpointError(f"{folder} already holds a checkpoint, expected a new folder")
    if pickled:
        everything = {name: tensor.detach().contiguous() for name, tensor in tensors}
        content = {MODEL: everything} if wrapped else everything
        files.replace(folder / OLD_SINGLE, lambda temporary: torch.save(content, temporary))
    else:
        _write_safetensors(folder, tensors, shard_bytes)
    files.replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    where, parts, total = {}, [], 0
    for number, shard in enumerate(_shards(tensors, shard_bytes)):
        parts.append(folder / f"part-{number}.safetensors")
        _write_shard(parts[-1], shard)
        where |= dict.fromkeys(shard, number)
        total += sum(t.nbytes for t in shard.values())
    names = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    )
    for part, name in zip(parts, names, strict=True):
        os.replace(part, folder / name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: names[n] for k, n in where.items()}}
        files.replace_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _choose(folder: Path) -> tuple[str | None, str | None]:
    """The single file or the index that a folder has."""
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        if (folder / index).is_file():
            return None, index
        if (folder / single).is_file():
            return single, None
    for single in MEGATRON:
        if (folder / single).is_file():
            return single, None
    raise CheckpointError(
        f"{folder} has no weights, expected one of {SINGLE}, {INDEX}, {OLD_SINGLE}, {OLD_INDEX}"
    )


def _present(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE, INDEX, OLD_SINGLE, OLD_INDEX, *MEGATRON))


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path} has no weight_map, expected tensor names and the files that hold them")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path}: {name} is said to be in {file!r}, expected a file of the same folder"
            )
    return where


def _open(stack: contextlib.ExitStack, path: Path) -> _Mapped | _Unpickled:
    from pickle import UnpicklingError

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        if path.suffix in (".bin", ".pt"):
            return _Unpickled(_load_old(path))
        return _Mapped(stack.enter_context(safe_open(path, framework="pt")))
    except CheckpointError:
        raise
    except (UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong, in a line: of PyTorch's advice on pickles the line that names what it refuses."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    refused = [line.strip() for line in lines if "Unsupported" in line or "not an allowed global" in line]
    return (refused or lines)[0][:300]


def _load_old(path: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # Megatron-LM's options: attributes only
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if isinstance(found, dict) and isinstance(found.get(MODEL), dict):
        found = {k: v for k, v in found[MODEL].items() if not (isinstance(k, str) and k.endswith(EXTRA))}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    return found


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected a small JSON file")
        return json.loads(path.read_bytes(), object_hook=_special_float)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no JSON file ({error})") from None


def _special_float(found: dict[str, Any]) -> Any:
    text = found.get("__float__")
    if len(found) == 1 and isinstance(text, str):
        values = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
        return values.get(text, found)
    return found


def _shards(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor.detach().contiguous()
    yield shard


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    files.replace(path, lambda temporary: save_file(shard, str(temporary), metadata={"format": "pt"}))
