"""Checkpoints that are complete and intact, or not there.

A checkpoint is a folder `step-00001234` of safetensors files, `state.json` and `manifest.json`. It is written
under a temporary name, every file flushed to the disk, sealed with a manifest of sizes and SHA-256 digests,
renamed in one step, and only then are older ones removed. A process killed at any instant leaves either the
new checkpoint or the old ones, never half of one.

Reading verifies before it believes: sizes, digests, and the manifest's own digest. A damaged checkpoint is
refused with its reason and the next older one is taken. Nothing is unpickled.

    step-00001234/
      model.safetensors  optimizer.safetensors  rng.safetensors  [ema.safetensors  best.safetensors]
      state.json         everything that is not a tensor
      manifest.json      {"files": {name: {"bytes", "sha256"}}, "format": 1, "sha256": digest of the rest}
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from mambakit import files

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\.(tmp|old)-[0-9a-f]+")


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose content is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Args:
        path: Its folder.
        step: Optimiser steps done when it was written.
        state: What was passed as `state` to `write`.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors that were written as `name`, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    def load_into(self, name: str, module: nn.Module) -> None:
        """Read the module that was written as `name` into one of the same structure.

        Raises:
            RuntimeError: Parameters are missing, unexpected, or of another shape.
        """
        load_model(module, self.path / f"{name}.safetensors")


def write(
    folder: Path,
    step: int,
    parts: Mapping[str, nn.Module | Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Commit a checkpoint, then remove the ones it makes superfluous.

    Args:
        folder: Where the `step-*` folders live; made if needed.
        step: Optimiser steps done.
        parts: Name -> module or named tensors; each becomes `name.safetensors`.
        state: Plain data for `state.json`.
        keep: How many checkpoints stay, this one included. Those of later steps, left by a run that was
            resumed from before them, go too.

    Returns:
        The committed checkpoint.

    Raises:
        OSError: The disk refused; older checkpoints are untouched and nothing half-written stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        for name, part in parts.items():
            target = temporary / f"{name}.safetensors"
            if isinstance(part, nn.Module):
                save_model(part, str(target))
            else:
                save_file({key: value.contiguous() for key, value in part.items()}, target)
        (temporary / "state.json").write_bytes(_canonical(dict(state)))
        content = sorted(temporary.iterdir())
        for path in content:
            files.flush(path)
        manifest = temporary / "manifest.json"
        manifest.write_bytes(_seal(content))
        files.flush(manifest)
        files.flush(temporary)
        if final.exists():  # damaged, or this step was reached a second time
            final.rename(folder / f"{final.name}.old-{uuid.uuid4().hex}")
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files.flush(folder)
    _prune(folder, step, keep)
    return Checkpoint(final, step, dict(state))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that verifies.

    Args:
        folder: Where the `step-*` folders live; may be missing.

    Returns:
        The checkpoint, or None; and for each newer one that was refused, one line saying why.
    """
    refused = []
    for step, path in sorted(_steps(folder), reverse=True):
        try:
            return Checkpoint(path, step, _verified_state(path)), refused
        except DamagedCheckpoint as reason:
            refused.append(f"{path.name}: {reason}")
    return None, refused


def sweep(folder: Path) -> None:
    """Remove what writers killed in the middle have left behind."""
    for path in folder.glob("step-*"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)


def verify(path: Path) -> None:
    """Check a checkpoint folder byte by byte.

    Raises:
        DamagedCheckpoint: A file is missing, short, long or changed, the manifest among them.
    """
    manifest = _read(path / "manifest.json")
    try:
        sealed = json.loads(manifest)
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in sealed["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpoint("manifest.json is not readable") from None
    # Compared as bytes: a changed space or line end is damage too.
    if manifest != _with_digest({key: value for key, value in sealed.items() if key != "sha256"}):
        raise DamagedCheckpoint("manifest.json does not match its own digest")
    if sealed.get("format") != FORMAT:
        raise DamagedCheckpoint(f"format {sealed.get('format')}, this version reads {FORMAT}")
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{name} has {file.stat().st_size} bytes, expected {size}")
        if files.sha256(file) != digest:
            raise DamagedCheckpoint(f"{name} does not match its digest")


def _verified_state(path: Path) -> dict[str, Any]:
    verify(path)
    return json.loads(_read(path / "state.json"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}: {error.strerror}") from None


def _seal(content: list[Path]) -> bytes:
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in content}
    return _with_digest({"files": listed, "format": FORMAT})


def _with_digest(manifest: dict[str, Any]) -> bytes:
    return _canonical({**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _steps(folder: Path) -> list[tuple[int, Path]]:
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in named if match]


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` up to `step`; a doomed folder loses its name first, so none looks damaged."""
    ordered = sorted(_steps(folder), reverse=True)
    kept = [path for number, path in ordered if number <= step][:keep]
    for _, path in ordered:
        if path not in kept:
            path.rename(folder / f"{path.name}.old-{uuid.uuid4().hex}")
    sweep(folder)
