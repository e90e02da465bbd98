"""Finding data files: the folder named by MAMBAKIT_DATA, then ~/.cache/mambakit, then the network.

Files already on this machine are the user's own and are used as they are; their readers check them. What
comes over the network has to have the known SHA-256, whoever sends it, before it gets its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from mambakit.data.config import DataError

ENVIRONMENT = "MAMBAKIT_DATA"
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A published file that never changes.

    Attributes:
        folder: Name of the folder it is kept in, for example `"mnist"`.
        name: File name.
        sha256: Hexadecimal digest of its content.
        mirrors: Addresses of folders that hold it, tried in order; each ends in `/`.
    """

    folder: str
    name: str
    sha256: str
    mirrors: tuple[str, ...]


def cache_folder() -> Path:
    """Where downloads are kept: `~/.cache/mambakit`."""
    return Path.home() / ".cache" / "mambakit"


def locate(file: RemoteFile) -> Path:
    """Find a file, downloading it where nobody has it yet.

    A name ending in `.gz` is also found unpacked, without that ending.

    Args:
        file: What is wanted.

    Returns:
        Path of the file on this machine.

    Raises:
        DataError: MAMBAKIT_DATA names no folder, or no mirror could be reached, or each sent something else.
    """
    folders = [cache_folder()]
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_dir():
            raise DataError(f"{ENVIRONMENT} is {named!r}, which is not a folder")
        folders.insert(0, Path(named))
    for folder in folders:
        for name in (file.name, file.name.removesuffix(".gz")):
            path = folder / file.folder / name
            if path.is_file():
                return path
    return _download(file, cache_folder() / file.folder)


def find(path: str, origin: str | None = None) -> Path:
    """Find a file of the user: at its path, else in the folder named by MAMBAKIT_DATA, else in the cache.

    Args:
        path: Absolute, or relative to the working folder or to one of these folders.
        origin: Where the file can be had, for the message when it is missing.

    Returns:
        Path of a file that exists.

    Raises:
        DataError: It is nowhere.
    """
    given = Path(path).expanduser()
    named = os.environ.get(ENVIRONMENT)
    folders = [Path(), *([Path(named)] if named else []), cache_folder()]
    for folder in folders:
        if (folder / given).is_file():
            return folder / given
    nearest = next(
        (folder / given for folder in reversed(folders) if (folder / given).parent.is_dir()), given
    )
    where = f"; put it into the folder that {ENVIRONMENT} names" if not given.is_absolute() else ""
    raise DataError(f"{missing(nearest)}{where}{f'. Where from: {origin}' if origin else ''}")


def missing(path: Path) -> DataError:
    """Say that a file or folder does not exist, with the nearest name beside it."""
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
    return DataError(f"{str(path)!r} does not exist{hint}")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, blocks: Iterable[bytes]) -> str:
    """Write a new file through to the disk and return its hexadecimal SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for block in blocks:
            digest.update(block)
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _download(file: RemoteFile, folder: Path) -> Path:
    """Try each mirror; a file appears under its name only when it is whole and right."""
    failures = []
    for mirror in file.mirrors:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=folder) as temporary:
                part = Path(temporary) / file.name
                with urllib.request.urlopen(mirror + file.name, timeout=30) as answer:
                    found = write_durably(part, iter(lambda: answer.read(_BLOCK), b""))
                if found == file.sha256:
                    return part.replace(folder / file.name)
            failures.append(f"{mirror} sent SHA-256 {found[:12]}..., expected {file.sha256[:12]}...")
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {getattr(error, 'reason', None) or error}")
    raise DataError(
        f"cannot get {file.name} ({'; '.join(failures)}). Without a network, put the official file into a "
        f"folder {file.folder}/ and set {ENVIRONMENT} to the folder around it"
    )
