"""Checkpoint folders: reading, writing, and what is said of a damaged one."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from mambakit.checkpoints import CheckpointError, locate, open_tensors, read_config, write_checkpoint
from mambakit.checkpoints import files as checkpoint_files

CONFIG = {"model_type": "imagined", "limit": [0.0, math.inf]}


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {f"t{n}": torch.randn(3 + n, 5, dtype=torch.bfloat16) for n in range(7)}


def same(folder, tensors):
    with open_tensors(folder) as found:
        assert set(found) == set(tensors)
        return all(
            found.shape(name) == tuple(t.shape)
            and found[name].dtype == t.dtype
            and torch.equal(found[name], t)
            for name, t in tensors.items()
        )


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_was_written_is_read(tmp_path, tensors, shard_bytes):
    write_checkpoint(tmp_path / "new", CONFIG, tensors.items(), shard_bytes=shard_bytes)
    assert same(tmp_path / "new", tensors)
    assert read_config(tmp_path / "new") == CONFIG
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    shards = {1: 7, 100: 6, 10**9: 0}[shard_bytes]
    assert len([name for name in written if "-of-" in name]) == shards
    assert ("model.safetensors.index.json" in written) == bool(shards)
    assert not [name for name in written if "part" in name or "tmp" in name]


def test_pytorchs_old_files_are_read(tmp_path, tensors):
    write_checkpoint(tmp_path / "new", CONFIG, tensors.items(), pickled=True)
    assert same(tmp_path / "new", tensors)
    torch.save(tensors, tmp_path / "new" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(tmp_path / "new", tensors)


def test_a_checkpoint_is_not_written_over(tmp_path, tensors):
    write_checkpoint(tmp_path, CONFIG, tensors.items())
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        write_checkpoint(tmp_path, CONFIG, {}.items())
    assert same(tmp_path, tensors)


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path, tensors):
    def broken():
        yield from list(tensors.items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, CONFIG, broken(), shard_bytes=1)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        locate(tmp_path)


def test_both_ways_of_writing_infinity_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"a": Infinity, "b": {"__float__": "-Infinity"}, "c": {"d": 1}}')
    assert read_config(tmp_path) == {"a": math.inf, "b": -math.inf, "c": {"d": 1}}


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "model.safetensors").unlink(), "has no weights"),
        (lambda at: (at / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
        (lambda at: cut(at / "model.safetensors"), "model.safetensors cannot be read"),
        (lambda at: (at / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)), "cannot be read"),
        (lambda at: index(at, {"t": "gone.safetensors"}), "gone.safetensors is missing"),
        (lambda at: index(at, {"t": "../model.safetensors"}), "expected a file of the same folder"),
        (lambda at: index(at, {"t": 3}), "expected a file of the same folder"),
        (
            lambda at: index(at, {"other": "model.safetensors"}),
            r"other is said to be in model\.safetensors, but is not",
        ),
        (lambda at: index(at, {}), "has no weight_map"),
        (lambda at: (at / "model.safetensors.index.json").write_text("[" * 100_000), "is no JSON file"),
        (lambda at: old(at, {"t": Evil()}), "pytorch_model.bin cannot be read: .* GLOBAL exec"),
        (lambda at: old(at, [1, 2]), "holds a list, expected tensors by name"),
        (lambda at: old(at, {"t": "text"}), "t is a str, expected a tensor"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, damage, message):
    write_checkpoint(tmp_path, CONFIG, [("t", torch.zeros(300))])
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught, open_tensors(tmp_path) as tensors:
        tensors["t"]
    assert "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def old(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "\xff", "[" * 100_000])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_an_unknown_tensor_and_its_nearest(tmp_path):
    save_file({"backbone.norm": torch.zeros(3)}, tmp_path / "model.safetensors")
    with (
        open_tensors(tmp_path) as tensors,
        pytest.raises(CheckpointError, match=r"did you mean 'backbone\.norm'"),
    ):
        tensors["backbone.norn"]


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is no folder, expected one, or the name of a repository"):
        locate(tmp_path / "nothing")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("a/b", revision="main") == tmp_path
    assert [(name, revision) for name, revision, _ in asked] == 2 * [("a/b", "main")]
    assert not any(
        "bin" in pattern for pattern in asked[0][2]
    )  # only asked for where safetensors are missing
    assert set(checkpoint_files.OLD_INDEX.split()) <= set(asked[1][2]) or "pytorch_model*.bin" in asked[1][2]

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        CheckpointError, match=r"'a/b' is no folder here and cannot be downloaded \(no network\)"
    ):
        locate("a/b")
