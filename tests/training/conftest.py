"""A training run that takes about a second and has everything in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mambakit.config import merge
from mambakit.training import TrainConfig

TINY = {
    "recipe": "tiny",
    "task": {"type": "language-modeling"},
    "data": {"type": "parity", "max_lengths": [16], "evaluation_lengths": [16, 32], "evaluation_samples": 24},
    "model": {
        "d_model": 16,
        "pattern": "M-",
        "dropout": 0.1,
        "mixers": {"M": {"type": "mamba2", "d_state": 8, "headdim": 8}},
    },
    "optimizer": {"lr": 0.01, "ssm_lr": 0.002},
    "schedule": {"warmup": 4},
    "train": {
        "steps": 24,
        "batch_size": 8,
        "accumulate": 2,
        "ema": 0.9,
        "eval_every": 6,
        "eval_batch_size": 8,
        "checkpoint_every": 4,
        "log_every": 3,
        "tensorboard": False,
    },
    "device": "cpu",
}


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """The tiny run as plain data."""
    return TINY


@pytest.fixture
def plain(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`plain(key=..., nested={...})`: the tiny run as plain data, in its own folder."""

    def make(**changes: Any) -> dict[str, Any]:
        return merge({**TINY, "out": str(tmp_path / "run")}, changes)

    return make


@pytest.fixture
def tiny(plain: Callable[..., dict[str, Any]]) -> Callable[..., TrainConfig]:
    """The same as a config."""

    def make(**changes: Any) -> TrainConfig:
        return TrainConfig.from_dict(plain(**changes))

    return make


@pytest.fixture(scope="session")
def outcome() -> Callable[[str | Path], dict[str, Any]]:
    """Everything a run decided: its record without clock times, its model, and its last checkpoint."""

    def read(folder: str | Path) -> dict[str, Any]:
        folder = Path(folder)
        clocks = {"seconds", "tokens_per_second"}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        record = [
            {key: value for key, value in line.items() if key not in clocks}
            for line in lines
            if line["kind"] != "note"
        ]
        last = max((folder / "checkpoints").iterdir())
        tensors = {
            f"{file.stem}.{name}": tensor
            for file in [folder / "model.safetensors", *last.glob("*.safetensors")]
            for name, tensor in load_file(file).items()
        }
        return {"record": record, "tensors": tensors}

    return read


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Assert that two outcomes agree to the last bit."""

    def check(one: dict[str, Any], other: dict[str, Any]) -> None:
        assert one["record"] == other["record"]
        tensors: dict[str, Tensor] = one["tensors"]
        assert tensors.keys() == other["tensors"].keys()
        assert [name for name, t in tensors.items() if not torch.equal(t, other["tensors"][name])] == []

    return check
