"""The file that an evaluation leaves: what was measured, on what, with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambakit import files
from mambakit.evaluation.reader import Reader
from mambakit.training.summary import hardware, versions


def write(
    path: Path, task: str, reader: Reader, settings: dict[str, Any], metrics: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write a result beside its place and rename it, so that a reader never sees half of one.

    Args:
        path: The JSON file; its folder is made if needed.
        task: What was measured.
        reader: The model.
        settings: How.
        metrics: What came out.
        seconds: How long it took.

    Returns:
        The file's content.
    """
    result = {
        "task": task,
        "model": reader.name,
        "parameters": sum(p.numel() for p in reader.model.parameters()),
        "dtype": str(reader.model.embedding.weight.dtype).removeprefix("torch."),
        "settings": settings,
        "metrics": metrics,
        "seconds": seconds,
        "hardware": hardware(reader.device),
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, json.dumps(result, indent=2) + "\n")
    return result
