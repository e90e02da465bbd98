"""Writing files that are either wholly there or not there at all, also after a power cut.

The order is always the same: write under another name, flush the file, rename, flush the folder that holds
the name.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_model
from torch import nn


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, down to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for folders; renaming is durable there
    handle = os.open(
        path, os.O_RDONLY if path.is_dir() else os.O_RDWR
    )  # Windows flushes only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name, then put it in the place of `path` in one step."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step."""
    replace(path, lambda temporary: temporary.write_bytes(text.encode()))


def replace_module(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Replace a safetensors file with a module's parameters and buffers in one step; tied ones go in once."""
    replace(path, lambda temporary: save_model(module, str(temporary), metadata={"format": "pt", **metadata}))


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
