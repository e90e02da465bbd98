"""Tokenisers: there and back, within range, restored from their description."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambakit.config import ConfigError
from mambakit.data import Bytes, Characters, Subwords, Tokenizer, shakespeare, tokenizer_from

ENCODABLE = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    """A byte-level BPE with 300 tokens, trained here on the start of Shakespeare."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    library.train_from_iterator([shakespeare()[:20_000]], trainer)
    return Subwords(library.to_str())


@given(text=ENCODABLE)
def test_bytes_there_and_back(text):
    ids = Bytes().encode(text)
    assert ids.dtype == np.int64
    assert bytes(ids.tolist()) == text.encode()
    assert Bytes().decode(ids) == text


def test_a_cut_off_last_byte_decodes_to_the_replacement_character():
    assert Bytes().decode(Bytes().encode("né")[:-1]) == "n\ufffd"


@given(alphabet=ENCODABLE.filter(bool), data=st.data())
def test_characters_there_and_back(alphabet, data):
    tokenizer = Characters(alphabet)
    text = data.draw(st.text(alphabet=sorted(set(alphabet))))
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == len(set(alphabet))
    assert [sorted(set(alphabet))[i] for i in ids] == list(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("strange", ["!", "~", "m", "é", "\U0001f600"])
def test_a_strange_character_is_named_with_its_place(strange):
    with pytest.raises(ValueError, match="position 2 is not among the 4 symbols") as error:
        Characters("abyz").encode("ab" + strange + "y")
    assert repr(strange) in str(error.value)


def test_empty_alphabet_is_refused():
    with pytest.raises(ValueError, match="at least one symbol"):
        Characters("")


@given(text=ENCODABLE)
def test_subwords_there_and_back(subwords, text):
    ids = subwords.encode(text)
    assert subwords.decode(ids) == text
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < subwords.vocab_size)


def test_subwords_shorten_text_and_know_their_special_tokens(subwords):
    text = shakespeare()[:1000]
    assert len(subwords.encode(text)) < 900
    assert subwords.decode(subwords.encode("<|end|>")) == "<|end|>"


def test_vocab_size_covers_ids_after_a_gap():
    definition = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 41}, "unk_token": "a"},
    }
    tokenizer = Subwords(json.dumps(definition))
    assert tokenizer.vocab_size == 42
    assert tokenizer.encode("b").tolist() == [41]


def test_every_tokeniser_survives_json_and_pickle(subwords):
    text = "First Citizen: Before we proceed"
    for tokenizer in (Characters(text), Bytes(), subwords):
        assert isinstance(tokenizer, Tokenizer)
        for copy in (
            tokenizer_from(json.loads(json.dumps(tokenizer.describe()))),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert copy.vocab_size == tokenizer.vocab_size
            assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert copy.decode(torch.from_numpy(tokenizer.encode(text))) == text


def test_ids_out_of_range_are_named(subwords):
    for tokenizer in (Characters("abc"), Bytes(), subwords):
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=rf"{wrong} is not in \[0, {tokenizer.vocab_size}\)"):
                tokenizer.decode([0, wrong])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"type": "byte"}, "did you mean 'bytes'"),
        ({}, "unknown tokeniser None"),
        ({"type": "characters"}, "lacks 'symbols'"),
        ({"type": "subwords", "definition": {"model": {"type": "BPF"}}}, "did you mean 'BPE'"),
        ({"type": "subwords", "definition": []}, "not a tokenizer.json"),
    ],
)
def test_a_bad_description_is_explained(description, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer_from(description)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        Subwords.from_file(tmp_path / "nowhere.json")
