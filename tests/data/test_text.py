"""Text sources: the shipped Shakespeare, the split, and windows that cover it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambakit.config import ConfigError
from mambakit.data import Bytes, Characters, DataError, ShakespeareConfig, TextConfig, batches, shakespeare
from mambakit.data.samples import IGNORED
from mambakit.data.text import SHAKESPEARE_SHA256, Passes, Windows


def said(dataset, tokenizer) -> str:
    """Everything that a dataset asks for, in order."""
    labels = torch.cat([batch["labels"].flatten() for batch in batches(dataset, 64)])
    return tokenizer.decode(labels[labels != IGNORED])


def test_shakespeare_is_whole_and_ships_its_source():
    from importlib import resources

    text = shakespeare()
    assert (len(text), len(set(text))) == (1_115_394, 65)
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert hashlib.sha256(text.encode()).hexdigest() == SHAKESPEARE_SHA256
    notes = resources.files("mambakit.data").joinpath("files/SOURCES.md").read_text()
    assert SHAKESPEARE_SHA256 in notes


def test_a_damaged_shakespeare_is_refused(monkeypatch, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tinyshakespeare.txt").write_bytes(
        shakespeare().replace("King", "Ring", 1).encode()
    )
    monkeypatch.setattr("mambakit.data.text.resources.files", lambda package: tmp_path)
    with pytest.raises(DataError, match="damaged"):
        shakespeare()


@pytest.mark.parametrize(("vocabulary", "vocab_size"), [("characters", 65), ("bytes", 256)])
def test_shakespeare_validates_on_its_last_tenth_once(vocabulary, vocab_size):
    config = ShakespeareConfig(length=200, vocabulary=vocabulary)
    assert config.vocab_size == vocab_size
    validation = config.validation()
    assert len(validation) == math.ceil(111_540 / 200)
    assert said(validation, config.tokenizer) == shakespeare()[1_003_854:]
    # The first held-out character is predicted from the last training one.
    assert config.tokenizer.decode(validation[0]["tokens"][:1]) == shakespeare()[1_003_853]


def test_training_never_sees_the_held_out_text():
    config = ShakespeareConfig(length=64)
    train = config.train(0)
    last = 0
    for batch in batches(train, 512, count=3):
        for row in batch["tokens"].tolist():
            place = shakespeare().find(config.tokenizer.decode(row))
            assert 0 <= place <= 1_003_854 - 65
            last = max(last, place)
    assert last > 990_000  # and reaches its end


@given(n=st.integers(2, 60), length=st.integers(1, 20), data=st.data())
def test_windows_ask_for_every_token_exactly_once(n, length, data):
    first = data.draw(st.integers(1, n - 1))
    ids = np.arange(100, 100 + n)
    asked = []
    for sample in (Windows(ids, length, first)[i] for i in range(len(Windows(ids, length, first)))):
        tokens, labels = sample["tokens"], sample["labels"]
        assert tokens.shape == labels.shape == (length,)
        inside = labels != IGNORED
        assert torch.equal(tokens[inside] + 1, labels[inside])  # each label follows its token
        assert not tokens[~inside].any()
        asked += labels[inside].tolist()
    assert asked == list(range(100 + first, 100 + n))


def test_a_pass_reads_the_text_once_in_windows_from_one_offset():
    ids = np.arange(1000, dtype=np.int64)
    data = Passes(ids, 10, seed=0)
    assert data.per_pass == 99
    offsets = set()
    for number in range(200):
        batch = data.batch(range(99 * number, 99 * number + 99))
        assert torch.equal(batch["labels"], batch["tokens"] + 1)
        starts = batch["tokens"][:, 0]
        assert (starts.diff() != 10).any()  # shuffled
        offset = starts.min().item()
        assert 0 <= offset < 10
        assert batch["tokens"].flatten().sort().values.tolist() == list(range(offset, offset + 990))
        offsets.add(offset)
    assert offsets == set(range(10))


def test_batches_over_the_end_of_a_pass_are_the_samples_of_both():
    data = Passes(np.arange(100), 10, seed=3)
    whole = data.batch(range(27))["tokens"]
    assert torch.equal(torch.stack([data[i]["tokens"] for i in range(27)]), whole)
    assert not torch.equal(whole[:9].sort(0).values, whole[9:18])


def test_passes_of_two_seeds_differ_and_of_one_seed_agree():
    make = ShakespeareConfig(length=32).train
    assert torch.equal(make(4).batch([9, 10])["tokens"], make(4).batch([9, 10])["tokens"])
    assert not torch.equal(make(4).batch([9, 10])["tokens"], make(5).batch([9, 10])["tokens"])


@pytest.mark.parametrize("length", [50, 51])
def test_text_shorter_than_a_window_is_refused(length):
    with pytest.raises(ValueError, match=f"length is {length}, expected less than the 50 tokens"):
        Passes(np.arange(50), length, seed=0)
    Passes(np.arange(50), 49, seed=0)[0]


def test_any_utf8_file_byte_by_byte_with_line_ends_kept(tmp_path):
    text = "Zürich\r\nと東京\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    config = TextConfig(path=str(tmp_path / "a.txt"), length=16, validation_fraction=0.25)
    assert isinstance(config.tokenizer, Bytes)
    assert said(config.validation(), config.tokenizer) == text[-len(text) // 4 :]
    characters = TextConfig(path=str(tmp_path / "a.txt"), length=16, vocabulary="characters")
    assert characters.vocab_size == len(set(text))


def test_a_validation_file_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("abcabcabc" * 10)
    (tmp_path / "b.txt").write_text("xyz" * 10)
    config = TextConfig(
        path=str(tmp_path / "a.txt"),
        validation_path=str(tmp_path / "b.txt"),
        length=4,
        vocabulary="characters",
    )
    assert config.tokenizer.symbols == "abcxyz"
    # Nothing stands before the first character, so it is read only.
    assert said(config.validation(), config.tokenizer) == ("xyz" * 10)[1:]
    assert set(config.tokenizer.decode(config.train(0).batch(range(50))["labels"].flatten())) == set("abc")


def test_text_through_a_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "not": 3}, unk_token="to"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be or not " * 30)
    config = TextConfig(path=str(tmp_path / "a.txt"), vocabulary=str(tmp_path / "tokenizer.json"), length=4)
    assert config.vocab_size == 4
    sample = config.train(0)[0]
    assert torch.equal((sample["tokens"] + 1) % 4, sample["labels"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"vocabulary": "byte"}, "did you mean 'bytes'"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(path="unused.txt", **settings)


def test_bad_files_are_explained_in_one_line(tmp_path):
    (tmp_path / "poems.txt").write_bytes(b"abc \xff def")
    (tmp_path / "short.txt").write_text("a")
    for name, message in (
        ("poem.txt", r"does not exist; did you mean '.*poems\.txt'"),
        ("poems.txt", "not UTF-8 text: byte 4 is 0xff"),
        ("short.txt", "1 characters, too few"),
        (".", "cannot read"),
    ):
        with pytest.raises(DataError, match=message) as error:
            TextConfig(path=str(tmp_path / name)).train(0)
        assert isinstance(error.value, ConfigError)
        assert "\n" not in str(error.value)


def test_only_shakespeare_in_characters_knows_a_baseline():
    assert ShakespeareConfig().baseline.value == 1.669
    assert ShakespeareConfig(vocabulary="bpe.json").baseline is None
    assert isinstance(ShakespeareConfig().tokenizer, Characters)


def test_validation_windows_may_be_longer_than_training_windows():
    config = ShakespeareConfig(length=64, validation_length=1024)
    assert config.train(0)[0]["tokens"].shape == (64,)
    assert config.validation()[0]["tokens"].shape == (1024,)
    with pytest.raises(ValueError, match="validation_length is 0"):
        ShakespeareConfig(validation_length=0)
