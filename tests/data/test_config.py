"""What holds for every data source: found by its type, plain data there and back, pure, light to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mambakit.config import ConfigError, to_dict
from mambakit.data import DataConfig, ShakespeareConfig, Stream, write_shards
from mambakit.data.samples import IGNORED

TYPES = (
    "documents",
    "fashion-mnist",
    "induction-heads",
    "labelled-text",
    "mnist",
    "modular-arithmetic",
    "mqar",
    "parity",
    "selective-copying",
    "shakespeare",
    "text",
    "tokens",
)
REQUIRED = {
    "documents": {"files": ["a.txt"]},
    "labelled-text": {"train_file": "a", "validation_file": "b", "classes": ["x", "y"]},
    "text": {"path": "x"},
    "tokens": {"path": "x"},
}
GENERATED = {
    "shakespeare": {"length": 50},
    "selective-copying": {"length": 40, "n_data": 5, "evaluation_lengths": [20]},
    "induction-heads": {"length": 30, "evaluation_lengths": [64]},
    "mqar": {"evaluation_settings": [[32, 8]]},
    "parity": {"max_lengths": [40, 80]},
    "modular-arithmetic": {"brackets": True},
}


@pytest.fixture(params=[*GENERATED, "documents", "text", "tokens"])
def plain(request, tmp_path) -> dict:
    """Plain data of a config whose data are at hand."""
    if request.param == "text":
        (tmp_path / "a.txt").write_text(" ".join(map(str, range(500))))
        return {"type": "text", "path": str(tmp_path / "a.txt"), "length": 10}
    if request.param == "documents":
        (tmp_path / "a.txt").write_text(" ".join(map(str, range(500))))
        return {"type": "documents", "files": [str(tmp_path / "a.txt")], "vocabulary": "bytes", "length": 10}
    if request.param == "tokens":
        write_shards([range(400), range(9)], tmp_path / "train", vocab_size=400)
        write_shards([range(300, 0, -1), range(9)], tmp_path / "validation", vocab_size=400)
        return {"type": "tokens", "path": str(tmp_path), "length": 10}
    return {"type": request.param, **GENERATED[request.param]}


def test_the_family_is_complete():
    assert sorted(DataConfig.members) == sorted(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_found_and_survives_plain_data(name):
    required = REQUIRED.get(name, {})
    config = DataConfig.from_dict({"type": name, **required})
    assert type(config) is DataConfig.members[name]
    assert DataConfig.from_dict(to_dict(config)) == config


def test_plain_data_there_and_back(plain):
    config = DataConfig.from_dict(plain)
    assert DataConfig.from_dict(to_dict(config)) == config
    assert plain.items() <= to_dict(config).items()


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'selective-copying'"):
        DataConfig.from_dict({"type": "selective-coping"})
    with pytest.raises(ConfigError, match="did you mean 'n_data'"):
        DataConfig.from_dict({"type": "selective-copying", "n_date": 3})


def test_samples_are_pure_well_formed_and_equal_item_by_item(plain):
    config = DataConfig.from_dict(plain)
    datasets = {
        "train": config.train(11),
        "validation": config.validation(),
        **config.evaluations(),
    }
    again = DataConfig.from_dict(plain)
    fresh = {"train": again.train(11), "validation": again.validation(), **again.evaluations()}
    for name, data in datasets.items():
        size = 6 if name == "train" else min(len(data), 6)
        batch = data.batch(range(size))
        for index in reversed(range(size)):
            item = fresh[name][index]
            assert item.keys() == batch.keys()
            assert all(torch.equal(item[key], batch[key][index]) for key in item)
        tokens, labels = batch["tokens"], batch["labels"]
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.shape == labels.shape
        assert 0 <= tokens.min() <= tokens.max() < config.vocab_size
        asked = labels[labels != IGNORED]
        assert asked.numel() > 0
        assert 0 <= asked.min() <= asked.max() < config.vocab_size


def test_training_seeds_differ_and_never_make_the_validation_data(plain):
    config = DataConfig.from_dict(plain)
    held_out = config.validation()
    held_out = {tuple(row) for row in held_out.batch(range(min(len(held_out), 40)))["tokens"].tolist()}
    first, second = (
        [tuple(row) for row in config.train(seed).batch(range(40))["tokens"].tolist()] for seed in (0, 1)
    )
    assert first != second
    if (
        plain["type"] != "modular-arithmetic"
    ):  # whose shortest expressions are few, so that chance repeats some
        assert not held_out & {*first, *second}


def test_streams_of_splits_are_keyed_apart():
    keys = {
        tuple(Stream(seed, split).key)
        for seed in (0, 1, 2)
        for split in ("train", "validation", "evaluation")
    }
    assert len(keys) == 9


def test_configs_are_frozen_and_hashable():
    config = ShakespeareConfig(length=8)
    assert hash(config) == hash(ShakespeareConfig(length=8))
    assert config.vocab_size == 65  # reading caches the text beside the fields, and changes none of them
    assert config == ShakespeareConfig(length=8)
    with pytest.raises(AttributeError):
        config.length = 9


def test_importing_data_needs_torch_and_numpy_only():
    code = (
        "import sys\n"
        "blocked = {'tokenizers', 'pydantic', 'yaml', 'rich', 'typer', 'transformers', 'matplotlib'}\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"  # None makes an import fail
        "from mambakit.data import ShakespeareConfig, ParityConfig\n"
        "assert ShakespeareConfig(length=8).train(0)[0]['tokens'].shape == (8,)\n"
        "assert ParityConfig().train(0)[0]['tokens'].shape == (40,)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
