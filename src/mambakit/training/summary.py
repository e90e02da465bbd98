"""`summary.json`: everything a reader needs to judge a run, or to repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

import mambakit
from mambakit import files


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {
        "mambakit": mambakit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The device, and the processor that feeds it."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def commit() -> str | None:
    """Commit of this package's source, marked `-dirty` if it was changed; None for an installed package."""
    here = Path(__file__).parent
    # A copy inside somebody else's repository, as in a virtual environment there, is not tracked by it.
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
    return f"{head}-dirty" if head and changed else head


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary in one step."""
    files.replace_text(path, json.dumps(summary, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
