"""Commits are whole or absent, and no damage goes unnoticed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from mambakit import files
from mambakit.training import checkpoint
from mambakit.training.checkpoint import DamagedCheckpoint


class Tied(nn.Module):
    """Two names for one matrix, a buffer, and a view that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.randn(4, 6).t())


def commit(folder: Path, step: int, keep: int = 3) -> checkpoint.Checkpoint:
    torch.manual_seed(step)
    parts = {"model": Tied(), "rng": {"cpu": torch.get_rng_state()[:40]}}
    return checkpoint.write(folder, step, parts, {"step": step, "config": {"lr": 0.1}}, keep)


def test_what_is_written_comes_back(tmp_path: Path):
    written = commit(tmp_path, 7)
    found, refused = checkpoint.newest(tmp_path)
    assert (found.step, found.state, refused) == (7, {"step": 7, "config": {"lr": 0.1}}, [])
    torch.manual_seed(7)
    original, loaded = Tied(), Tied()
    found.load_into("model", loaded)
    assert torch.equal(loaded.embedding.weight, original.embedding.weight)
    assert torch.equal(loaded.table, original.table)
    assert loaded.head.weight is loaded.embedding.weight
    assert written.path.name == "step-00000007"
    assert sorted(path.name for path in written.path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "rng.safetensors",
        "state.json",
    ]


def test_200_flipped_bytes_are_all_noticed_and_the_older_checkpoint_is_taken(tmp_path: Path):
    commit(tmp_path, 1)
    content = sorted(commit(tmp_path, 2).path.iterdir())
    dice = random.Random(0)
    # Every file, the manifest among them, and its first and last byte.
    targets = [(file, place) for file in content for place in (0, file.stat().st_size - 1)]
    while len(targets) < 200:
        file = dice.choice(content)
        targets.append((file, dice.randrange(file.stat().st_size)))
    for file, place in targets:
        good = file.read_bytes()
        flipped = good[place] ^ (1 << dice.randrange(8))
        file.write_bytes(good[:place] + bytes([flipped]) + good[place + 1 :])
        found, refused = checkpoint.newest(tmp_path)
        assert found is not None and found.step == 1, (file.name, place)
        assert len(refused) == 1 and refused[0].startswith("step-00000002: "), refused
        file.write_bytes(good)
    assert checkpoint.newest(tmp_path)[0].step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_missing_short_and_long_files_are_named(tmp_path: Path, name: str):
    commit(tmp_path, 1)
    file = commit(tmp_path, 2).path / name
    good = file.read_bytes()
    for damaged in (None, good[:-1], b"", good + b"\n"):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        found, refused = checkpoint.newest(tmp_path)
        assert found.step == 1
        assert name in refused[0]
        file.write_bytes(good)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = commit(tmp_path, 1).path
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpoint, match="format 2, this version reads 1"):
        checkpoint.verify(path)


def test_without_checkpoints_there_is_nothing(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000003.tmp-abc").mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])


def test_the_newest_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4):
        commit(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_of_the_future_neither_blocks_nor_outlives_a_resumed_run(tmp_path: Path):
    for step in (1, 2, 3):
        commit(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    assert checkpoint.newest(tmp_path)[0].step == 1
    commit(tmp_path, 2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002"]
    assert checkpoint.newest(tmp_path)[0].step == 2


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path):
    commit(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-0123abcd").mkdir()
    (tmp_path / "step-00000001.old-0123abcd").mkdir()
    (tmp_path / "step-00000001-copy").mkdir()
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000001-copy"]


def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit(tmp_path, 1)
    for failing in range(1, 6):  # three files, the manifest, the folder
        outcomes = [None] * (failing - 1) + [OSError(28, "No space left on device")]
        monkeypatch.setattr(files, "flush", Mock(side_effect=outcomes))
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_everything_is_flushed_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order = []

    def record(path: Path) -> None:
        order.append((path.name, sorted(p.name for p in tmp_path.glob("step-????????"))))

    monkeypatch.setattr(files, "flush", record)
    commit(tmp_path, 1)
    before = [name for name, committed in order if not committed]
    assert before[:4] == ["model.safetensors", "rng.safetensors", "state.json", "manifest.json"]
    assert before[4].startswith("step-00000001.tmp-")
    assert order[5:] == [(tmp_path.name, ["step-00000001"])]


def test_a_checkpoint_can_be_copied_elsewhere(tmp_path: Path):
    shutil.copytree(commit(tmp_path / "a", 5).path, tmp_path / "b" / "step-00000005")
    assert checkpoint.newest(tmp_path / "b")[0].step == 5
