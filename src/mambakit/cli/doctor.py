"""`mambakit doctor`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

import mambakit
from mambakit import ops
from mambakit.cli.console import count, facts, out
from mambakit.data.fetch import ENVIRONMENT, cache_folder
from mambakit.generation.engine import FORMS, DecodeEngine
from mambakit.ops import native
from mambakit.ops.dispatch import registry
from mambakit.testing.samples import CASES, Draw
from mambakit.training.summary import hardware

# Distribution -> what is missing without it.
_PACKAGES = {
    "tokenizers": "subword tokenisers",
    "huggingface-hub": "fetching published checkpoints",
    "tensorboard": "TensorBoard events (metrics.jsonl is always written)",
    "matplotlib": "curves.png",
    "triton": "GPU kernels in Triton and torch.compile on a GPU",
    "transformers": "nothing of mambakit; some tests compare with it",
}
_DATA = ("mnist", "fashion-mnist")


def doctor() -> None:
    """Show what this machine can run, and why it cannot run the rest."""
    for title, rows in (
        ("machine", _machine()),
        ("packages", {name: _package(name, use) for name, use in _PACKAGES.items()}),
        ("data", _data()),
    ):
        out.rule(title, align="left", style="dim")
        out.print(facts(rows))
    for device in _devices():
        out.rule(f"operators on {device}", align="left", style="dim")
        out.print(facts(_operators(device)))


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _machine() -> dict[str, str]:
    place = hardware(torch.device("cpu"))
    disk = shutil.disk_usage(Path.cwd())
    return {
        "mambakit": mambakit.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "processor": f"{place['cpu']}, {place['cores']} cores for this process",
        "threads": f"{place['threads']} (OMP_NUM_THREADS changes it)",
        "C++ kernels": _native(),
        "decode engine": _engine(),
        "GPU": _gpus(),
        "disk here": f"{count(disk.free, 'B')} free of {count(disk.total, 'B')}",
    }


def _native() -> str:
    """The library in use, who made it and whose threads it runs on, or what is missing."""
    found = native.load()
    if found.library is None:
        return f"none: {found.reason}"
    threads = (
        f"threads of {Path(found.openmp).name}" if found.parallel else f"one thread; OpenMP: {found.openmp}"
    )
    return f"{found.level}, compiled by {found.compiler}\n{threads}"


def _engine() -> str:
    """The forms of weights that the decode engine can keep, and with which instructions."""
    if native.load().library is None:
        return "none: it is one of the C++ kernels"
    speed = "with" if DecodeEngine.has_vnni() else "without"
    return f"{', '.join(FORMS)} weights; integers {speed} VNNI instructions"


def _gpus() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda}, but no device or driver was found"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "\n".join(
        f"{gpu.name}, {count(gpu.total_memory, 'B')}, compute {gpu.major}.{gpu.minor}" for gpu in found
    )


def _package(name: str, use: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; without it: {use}"


def _data() -> dict[str, str]:
    """Where each downloadable data set is, or that it is fetched on first use."""
    named = os.environ.get(ENVIRONMENT)
    folders = [Path(named)] if named else []
    rows = {"shakespeare": "part of the package"}
    for name in _DATA:
        places = [
            str(folder / name) for folder in (*folders, cache_folder()) if any(folder.glob(f"{name}/*ubyte*"))
        ]
        rows[name] = places[0] if places else f"not here; downloaded on first use to {cache_folder() / name}"
    return {ENVIRONMENT: named or "not set (a folder with data files, looked at first)", **rows}


def _operators(device: str) -> dict[str, str]:
    """For every operator, what `ops.explain` says of its first sample inputs."""
    first = {case.op: case for case in reversed(CASES)}
    rows = {}
    for name, op in sorted(registry.items()):
        if name not in first:
            rows[name] = f"{', '.join(op.backends)} (no sample inputs to try)"
            continue
        _, *lines = ops.explain(name, **first[name].build(Draw(torch.float32, device))).splitlines()
        rows[name] = "\n".join(line.strip() for line in lines)
    return rows
