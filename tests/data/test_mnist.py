"""MNIST: the IDX format, its damage, and both tasks; on the official files where MAMBAKIT_DATA has them."""

from __future__ import annotations

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mambakit.data import DataError, FashionMnistConfig, MnistConfig, batches, read_idx
from mambakit.data.fetch import sha256

PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
official = pytest.mark.skipif(
    not (Path(os.environ.get("MAMBAKIT_DATA", "/nowhere")) / "mnist").is_dir(),
    reason="MAMBAKIT_DATA names no folder with mnist/",
)


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes, written by hand."""
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 + 12 made-up images, the second half of the files not packed."""
    generator = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, n in zip(PARTS, (40, 40, 12, 12), strict=True):
        shape, top = ((n, 28, 28), 256) if "images" in part else ((n,), 10)
        content = idx(generator.integers(0, top, shape))
        if part.startswith("train"):
            (tmp_path / "mnist" / f"{part}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / "mnist" / part).write_bytes(content)
    (tmp_path / "fashion-mnist").symlink_to(tmp_path / "mnist")
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path))
    return tmp_path / "mnist"


def test_idx_there_and_back(tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    assert (read_idx(tmp_path / "a") == array).all()
    assert (read_idx(tmp_path / "a.gz") == array).all()


def test_every_cut_and_every_wrong_header_byte_is_found(tmp_path):
    content = idx(np.zeros((2, 3), dtype=np.uint8))
    path = tmp_path / "a"
    for kept in range(len(content)):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError):
            read_idx(path)
    path.write_bytes(content + b"x")
    with pytest.raises(DataError, match=r"7 values, its header says \(2, 3\)"):
        read_idx(path)
    for at in range(12):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
        with pytest.raises(DataError):
            read_idx(path)


def test_damaged_gzip_is_found(tmp_path):
    packed = gzip.compress(idx(np.arange(200).reshape(2, 100)))
    for at in (0, len(packed) // 2, len(packed) - 5):
        (tmp_path / "a.gz").write_bytes(packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :])
        with pytest.raises(DataError, match="cannot be read"):
            read_idx(tmp_path / "a.gz")
    (tmp_path / "a.gz").write_bytes(packed[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize("config_class", [MnistConfig, FashionMnistConfig])
def test_classification_is_the_standardised_pixels_in_order(folder, config_class):
    config = config_class(held_out=10)
    images = read_idx(folder / f"{PARTS[0]}.gz").reshape(40, 784)
    labels = read_idx(folder / f"{PARTS[1]}.gz")
    batch = config.validation().batch(range(10))
    assert (config.n_classes, config.in_features, config.vocab_size) == (10, 1, None)
    assert batch["inputs"].shape == (10, 784, 1)
    mean, deviation = config.statistics
    expected = (torch.tensor(images[30:] / 255.0) - mean) / deviation
    assert torch.allclose(batch["inputs"][..., 0].double(), expected, atol=1e-6)
    assert batch["label"].tolist() == labels[30:].tolist()
    assert config.validation()[3]["label"].shape == ()


def test_pixels_are_predicted_from_the_pixels_before(folder):
    config = MnistConfig(mode="pixels", held_out=0)
    images = read_idx(folder / PARTS[2]).reshape(12, 784)
    batch = config.evaluations()["test"].batch(range(12))
    assert (config.vocab_size, config.n_classes, config.in_features) == (256, None, None)
    assert (batch["labels"].numpy() == images).all()
    assert (batch["tokens"][:, 0] == 0).all()
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_the_splits_are_disjoint_and_complete(folder):
    config = MnistConfig(mode="pixels", held_out=10)

    def rows(data, n):
        return {tuple(row) for row in data.batch(range(n))["labels"].tolist()}

    train, again = rows(config.train(0), 30), rows(config.train(1), 30)
    validation = rows(config.validation(), 10)
    test = rows(config.evaluations()["test"], 12)
    assert train == again
    assert (len(train), len(validation), len(test)) == (30, 10, 12)
    assert not (train & validation or train & test or validation & test)
    everything = read_idx(folder / f"{PARTS[0]}.gz").reshape(40, 784)
    assert train | validation == set(map(tuple, everything.tolist()))


def test_without_held_out_images_the_test_images_validate(folder):
    config = MnistConfig(held_out=0)
    assert len(config.validation()) == 12
    assert sorted(config.train(0).batch(range(40))["label"].tolist()) == sorted(
        read_idx(folder / f"{PARTS[1]}.gz").tolist()
    )


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        (2, idx(np.zeros((12, 28, 27))), r"shape \(12, 28, 27\)"),
        (2, idx(np.zeros((0, 28, 28))), r"shape \(0, 28, 28\)"),
        (3, idx(np.zeros(11)), "expected one label for 12 images"),
        (3, idx(np.full(12, 10)), "a label 10"),
        (3, idx(np.zeros(12))[:-1], "11 values"),
    ],
)
def test_files_that_do_not_belong_together_are_named(folder, part, content, message):
    (folder / PARTS[part]).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        MnistConfig(held_out=10).train(0)
    assert PARTS[part] in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mode": "pixel"}, "did you mean 'pixels'"), ({"held_out": -1}, "held_out is -1")],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        MnistConfig(**settings)


def test_holding_out_everything_is_refused(folder):
    with pytest.raises(DataError, match="held_out is 5000, there are 40"):
        MnistConfig().train(0)


@official
@pytest.mark.parametrize("config_class", [MnistConfig, FashionMnistConfig])
def test_the_official_files_are_the_published_ones(config_class):
    folder = Path(os.environ["MAMBAKIT_DATA"]) / config_class.folder
    assert [sha256(folder / f"{part}.gz") for part in PARTS] == list(config_class.digests)


@official
@pytest.mark.parametrize("config_class", [MnistConfig, FashionMnistConfig])
def test_statistics_and_baselines_are_those_of_the_official_files(config_class):
    config = config_class(held_out=0)
    images, labels, test_images, test_labels = config._arrays
    assert (len(images), len(test_images)) == (60_000, 10_000)
    assert np.bincount(test_labels).sum() == 10_000
    histogram = np.bincount(images.ravel(), minlength=256) / images.size
    mean = (histogram * np.arange(256) / 255).sum()
    deviation = math.sqrt((histogram * (np.arange(256) / 255 - mean) ** 2).sum())
    assert config.statistics == (round(mean, 4), round(deviation, 4))
    means = np.stack([images[labels == c].mean(axis=0) for c in range(10)])
    nearest = ((means**2).sum(axis=1) - 2 * test_images.astype(float) @ means.T).argmin(axis=1)
    assert config.baseline.value == round(float((nearest == test_labels).mean()), 4)
    nats = 0.0
    for position in range(784):
        counts = np.bincount(images[:, position], minlength=256) + 0.1
        nats -= np.log(counts[test_images[:, position]] / counts.sum()).mean() / 784
    assert config_class(mode="pixels").baseline.value == pytest.approx(nats, abs=5e-4)


@official
def test_a_full_pass_over_the_official_training_images_counts_each_once():
    config = MnistConfig()
    counts = torch.zeros(10, dtype=torch.int64)
    for batch in batches(config.train(0), 5_000, count=11):
        counts += batch["label"].bincount(minlength=10)
    for batch in batches(config.validation(), 5_000):
        counts += batch["label"].bincount(minlength=10)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
