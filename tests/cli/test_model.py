"""Continuing a text with a published checkpoint, by its folder or its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mambakit
from mambakit.checkpoints import hub

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<end>", "to", "be", "or", "not", "that", "is", "the", "question"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random Mamba with a tokeniser of words."""
    torch.manual_seed(0)
    mixers = {"M": mambakit.Mamba1Config(d_state=4)}
    config = mambakit.LanguageModelConfig(vocab_size=16, d_model=16, pattern="2M", mixers=mixers)
    mambakit.save(mambakit.LanguageModel(config), tmp_path / "tiny")
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="the")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tiny" / "tokenizer.json"))
    return tmp_path / "tiny"


def test_a_checkpoint_writes_what_the_library_writes(cli, checkpoint):
    code, shown, _ = cli("generate", str(checkpoint), "to be", "--max-tokens", "12", "--seed", "4")
    assert code == 0
    sampling = mambakit.Sampling(temperature=0.8, seed=4)
    tokens = torch.tensor([[1, 2]])
    new = mambakit.generate(
        mambakit.load(checkpoint), tokens, max_tokens=12, sampling=sampling, vocab_size=len(WORDS)
    )
    assert shown.split() == ["to", "be", *(WORDS[n] for n in new[0].tolist())]


def test_a_text_ends_where_the_checkpoint_says(cli, checkpoint):
    base = ["generate", str(checkpoint), "to be", "--max-tokens", "40", "--seed", "4"]
    whole = cli(*base)[1].split()
    end = whole[9]
    settings = {"eos_token_id": [WORDS.index(end)]}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    assert cli(*base)[1].split() == whole[: whole.index(end, 2)]


def test_a_name_of_the_hub_is_downloaded(cli, checkpoint, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda name, revision: {"a/tiny": checkpoint}[name])
    assert cli("generate", "a/tiny", "to be", "--max-tokens", "3")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "bfloat17"], "did you mean 'bfloat16'"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_wrong_words_are_one_line(cli, checkpoint, words, said):
    code, _, error = cli("generate", str(checkpoint), "to be", *words)
    assert code == 2 and said in " ".join(error.split())


def test_a_checkpoint_without_a_tokeniser(cli, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    code, _, error = cli("generate", str(checkpoint), "to be")
    assert code == 2 and "has no tokenizer.json" in " ".join(error.split())


def test_other_types_of_weights(cli, checkpoint):
    assert cli("generate", str(checkpoint), "to be", "--max-tokens", "3", "--dtype", "bfloat16")[0] == 0


def test_a_checkpoint_is_exported(cli, checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf")
    (checkpoint / "tokenizer.json").unlink()  # words are none of llama.cpp's
    target = tmp_path / "tiny.gguf"
    code, shown, said = cli("export", str(checkpoint), str(target), "--to", "gguf", "--dtype", "f16")
    assert code == 0 and shown.startswith(str(target)) and "token numbers only" in said
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weight = mambakit.load(checkpoint).embedding.weight.detach()
    assert torch.equal(torch.tensor(tensors["token_embd.weight"].data), weight.half())
    for words, reason in (
        (("--to", "gguf"), "exists, expected a new file"),
        (("--to", "onnx", "--dtype", "f16"), "ONNX graphs are written in float32"),
        (("--to", "onxx"), "onnx"),
    ):
        code, _, said = cli("export", str(checkpoint), str(target), *words)
        assert code == 2 and reason in said
