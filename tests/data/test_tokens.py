"""Token shards: there and back, packed windows, and damage of every kind found."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mambakit.data import Bytes, DataError, TokensConfig, TokenShards, write_shards
from mambakit.data.samples import IGNORED
from mambakit.data.tokens import PackedWindows

DOCUMENTS = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=30), min_size=1, max_size=12)


def write(folder, documents, **settings):
    write_shards(documents, folder, **{"vocab_size": 300, "tokens_per_shard": 40, **settings})
    return TokenShards(folder)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Ten documents of lengths 3, 6, ..., 30 in several shards."""
    folder = tmp_path_factory.mktemp("example") / "shards"
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 256, 3 * n).tolist() for n in range(1, 11)]
    return write(folder, documents, vocab_size=256, tokenizer=Bytes()), documents


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(documents=DOCUMENTS, per_shard=st.integers(1, 60), data=st.data())
def test_what_was_written_is_read(tmp_path_factory, documents, per_shard, data):
    shards = write(tmp_path_factory.mktemp("any") / "shards", documents, tokens_per_shard=per_shard)
    flat = [token for document in documents for token in document]
    numbers = [number for number, document in enumerate(documents) for _ in document]
    assert [document.tolist() for document in shards.documents()] == documents
    assert (shards.n_tokens, shards.n_documents) == (len(flat), len(documents))
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    tokens, within = shards.read(start, count)
    assert tokens.tolist() == flat[start : start + count]
    assert within.tolist() == [n - numbers[start] for n in numbers[start : start + count]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(documents=DOCUMENTS.filter(lambda d: sum(map(len, d)) > 1), length=st.integers(1, 50))
def test_packed_windows_ask_for_every_token_but_the_first_of_each_document(
    tmp_path_factory, documents, length
):
    shards = write(tmp_path_factory.mktemp("packed") / "shards", documents)
    windows = PackedWindows(shards, length, partial=True)
    batch = windows.batch(range(len(windows)))
    tokens, labels = batch["tokens"].flatten(), batch["labels"].flatten()
    asked = labels != IGNORED
    assert labels[asked].tolist() == [token for document in documents for token in document[1:]]
    assert tokens[asked].tolist() == [token for document in documents for token in document[:-1]]
    # The numbers count documents from the window's first token; filler belongs to none of them.
    numbers = [number for number, document in enumerate(documents) for _ in document][:-1]
    for row, seq_idx in enumerate(batch["seq_idx"].tolist()):
        inside = numbers[row * length : (row + 1) * length]
        assert seq_idx[: len(inside)] == [number - inside[0] for number in inside]
        assert not set(seq_idx[: len(inside)]) & set(seq_idx[len(inside) :])


def test_windows_cross_shards_and_documents(example):
    shards, documents = example
    flat = [token for document in documents for token in document]
    sample = PackedWindows(shards, 20, partial=False)[1]
    assert sample["tokens"].tolist() == flat[20:40]
    # Documents end after 3, 9, 18, 30, 45 tokens.
    assert sample["seq_idx"].tolist() == [0] * 10 + [1] * 10
    assert [t for t in range(20) if sample["labels"][t] == IGNORED] == [9]
    assert len(PackedWindows(shards, 20, partial=False)) == 164 // 20
    assert len(PackedWindows(shards, 20, partial=True)) == 164 // 20 + 1


def test_shards_respect_their_size_and_their_documents(example):
    shards, _ = example
    index = json.loads((shards.folder / "index.json").read_text())
    assert [shard["tokens"] for shard in index["shards"]] == [30, 33, 21, 24, 27, 30]
    assert index["dtype"] == "uint16"
    assert isinstance(shards.tokenizer, Bytes)


def test_a_shard_is_filled_to_its_last_token(tmp_path):
    shards = write(tmp_path / "shards", [[1] * 20, [2] * 20, [3] * 50, [4] * 40, [5]], tokens_per_shard=40)
    index = json.loads((shards.folder / "index.json").read_text())
    assert [shard["tokens"] for shard in index["shards"]] == [40, 50, 40, 1]


def test_large_vocabularies_are_kept_in_32_bits(tmp_path):
    shards = write(tmp_path / "shards", [[0, 65_536, 2**31]], vocab_size=2**31 + 1)
    assert shards.read(0, 3)[0].tolist() == [0, 65_536, 2**31]


def test_workers_map_the_files_again(example):
    data = PackedWindows(example[0], 16, partial=True)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    for name, tensor in pickle.loads(pickled).batch([0, 3]).items():
        assert torch.equal(tensor, data.batch([0, 3])[name])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no documents"),
        ([[1], []], "document 1 is"),
        ([[1.5]], "document 0 is float64"),
        ([[1, 300]], r"document 0 has token id 300, expected \[0, 300\)"),
        ([[2], [-1]], "document 1 has token id -1"),
    ],
)
def test_nothing_is_left_of_a_write_that_fails(tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "shards", documents)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def documents():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "shards", documents())
    assert list(tmp_path.iterdir()) == []


def test_shards_are_never_overwritten(tmp_path):
    write(tmp_path / "shards", [[1, 2]])
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "shards", [[3, 4]])
    assert TokenShards(tmp_path / "shards").read(0, 2)[0].tolist() == [1, 2]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_flipped_byte_is_found(tmp_path):
    folder = write(tmp_path / "shards", [[1, 2, 3], list(range(45))], tokenizer=Bytes()).folder
    assert files(folder) == [
        "index.json",
        *(f"tokens-0000{n}.{kind}" for n in (0, 1) for kind in ("bin", "offsets")),
    ]
    for name in files(folder):
        path = folder / name
        content = path.read_bytes()
        # White space in the index says nothing; every other byte does.
        places = [at for at, byte in enumerate(content) if name != "index.json" or not chr(byte).isspace()]
        for at in places:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(DataError) as error:
                TokenShards(folder)
            assert "\n" not in str(error.value)
        path.write_bytes(content)
    assert TokenShards(folder).n_tokens == 48


@pytest.mark.parametrize("verify", [True, False])
def test_every_cut_is_found_even_without_hashing(tmp_path, verify):
    folder = write(tmp_path / "shards", [[1, 2, 3], list(range(45))]).folder
    for name in files(folder):
        path = folder / name
        content = path.read_bytes()
        for kept in range(len(content)):
            path.write_bytes(content[:kept])
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                TokenShards(folder, verify=verify)
        path.write_bytes(content + b"x")
        with pytest.raises(DataError):
            TokenShards(folder, verify=verify)
        path.unlink()
        with pytest.raises(DataError, match=r"is missing|does not exist"):
            TokenShards(folder, verify=verify)
        path.write_bytes(content)


def test_an_id_outside_the_vocabulary_is_found_when_read_unverified(tmp_path):
    folder = write(tmp_path / "shards", [[1, 2, 3]]).folder
    (folder / "tokens-00000.bin").write_bytes(np.array([1, 300, 3], dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"token 1 has id 300, expected \[0, 300\)"):
        TokenShards(folder, verify=False).read(0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"magic": "other"}, "not an index"), ({"version": 2}, "version 2, this mambakit reads 1")],
)
def test_another_format_is_told_apart_from_damage(tmp_path, change, message):
    folder = write(tmp_path / "shards", [[1, 2, 3]]).folder
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(DataError, match=message):
        TokenShards(folder)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0), (160, 6), (165, 1)])
def test_reading_outside_is_refused(example, start, count):
    with pytest.raises(ValueError, match="there are 165"):
        example[0].read(start, count)


def test_the_config_trains_in_epochs_and_validates_on_all(tmp_path):
    documents = [np.arange(n, n + 50) % 200 for n in range(20)]
    write_shards(documents[:16], tmp_path / "train", vocab_size=200, tokenizer=Bytes())
    write_shards(documents[16:], tmp_path / "validation", vocab_size=200)
    config = TokensConfig(path=str(tmp_path), length=32)
    assert config.vocab_size == 200
    assert isinstance(config.tokenizer, Bytes)
    per_epoch = 799 // 32
    rows = config.train(1).batch(range(2 * per_epoch))["tokens"].tolist()
    first, second = (sorted(map(tuple, half)) for half in (rows[:per_epoch], rows[per_epoch:]))
    assert first == second
    assert rows[:per_epoch] != rows[per_epoch:]
    validation = config.validation()
    labels = validation.batch(range(len(validation)))["labels"]
    assert (labels != IGNORED).sum() == 4 * 49


def test_config_errors_name_the_trouble(tmp_path):
    write_shards([[1, 2]], tmp_path / "data" / "train", vocab_size=20)
    write_shards([[1, 2]], tmp_path / "data" / "validation", vocab_size=21)
    with pytest.raises(DataError, match="vocab_size is 20 for train, 21 for validation"):
        _ = TokensConfig(path=str(tmp_path / "data")).vocab_size
    with pytest.raises(DataError, match="does not exist"):
        TokensConfig(path=str(tmp_path / "date")).train(0)
    with pytest.raises(ValueError, match="length is 2, expected less than the 2 tokens"):
        PackedWindows(TokenShards(tmp_path / "data" / "train"), 2, partial=False)
    with pytest.raises(ValueError, match="length is 0"):
        TokensConfig(path=str(tmp_path), length=0)
