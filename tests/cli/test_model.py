"""Continuing a text with a published checkpoint, by its folder or its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mambakit
from mambakit.checkpoints import hub
from mambakit.ops import native

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


def test_a_saved_conversation_goes_on_and_forks(cli, checkpoint, tmp_path):
    base = ["generate", str(checkpoint)]
    greedy = ["--temperature", "0", "--repetition-penalty", "1.5"]
    state, later = tmp_path / "talk.safetensors", tmp_path / "later.safetensors"
    first = cli(*base, "to be", "--max-tokens", "6", "--save-state", state, *greedy)[1].split()
    assert first[:2] == ["to", "be"] and len(first) == 8
    before = state.read_bytes()
    go = [*base, "question", "--from-state", state, "--max-tokens", "5", "--save-state", later, *greedy]
    second = cli(*go)[1].split()
    assert cli(*go)[1].split() == second and state.read_bytes() == before
    talk = mambakit.Conversation(mambakit.load(checkpoint))
    talk.read([WORDS.index(word) for word in [*first, "question"]])
    sampling = mambakit.Sampling(temperature=0, repetition_penalty=1.5)
    wanted = list(talk.write(max_tokens=5, sampling=sampling, vocab_size=len(WORDS)))
    assert second == ["question", *(WORDS[n] for n in wanted)]
    forks = {cli(*base, "--from-state", state, "--max-tokens", "9", "--seed", str(n))[1] for n in range(3)}
    assert len(forks) == 3
    assert cli(*base, "--from-state", later, "--max-tokens", "1", *greedy)[0] == 0


def test_states_that_do_not_fit_are_one_line(cli, checkpoint, tmp_path):
    state = tmp_path / "talk.safetensors"
    assert cli("generate", checkpoint, "to be", "--max-tokens", "3", "--save-state", state)[0] == 0
    for words, said in (
        (["--from-state", tmp_path / "nothing"], "cannot read a conversation from"),
        (["--from-state", state, "--dtype", "bfloat16"], "belongs to another model than this: its tensors"),
        ([], "PROMPT is missing"),
    ):
        code, _, error = cli("generate", checkpoint, *words)
        assert code == 2 and said in " ".join(error.split())
    state.write_bytes(state.read_bytes()[:-9])
    code, _, error = cli("generate", checkpoint, "to", "--from-state", state)
    assert code == 2 and "cannot read a conversation from" in " ".join(error.split())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounded_weights(cli, checkpoint, form):
    base = ["generate", str(checkpoint), "to be", "--max-tokens", "12", "--temperature", "0"]
    model = mambakit.load(checkpoint, quantize=form)
    greedy = {"sampling": mambakit.Sampling(temperature=0), "max_tokens": 12, "vocab_size": len(WORDS)}
    for words, engine in (([], form), (["--engine", "off"], "off")):
        if native.load().library is None and engine != "off":
            continue
        code, shown, _ = cli(*base, "--quantize", form, *words)
        new = mambakit.generate(model, [[1, 2]], engine=engine, **greedy)
        assert (code, shown.split()) == (0, ["to", "be", *(WORDS[n] for n in new[0].tolist())])


def test_an_unknown_form_of_weights(cli, checkpoint, text_run):
    for model in (checkpoint, text_run):
        code, _, error = cli("generate", model, "to be", "--quantize", "int9")
        assert code == 2 and "unknown form 'int9'; did you mean 'int" in " ".join(error.split())
    assert cli("generate", text_run, "to be", "--quantize", "int8", "--max-tokens", "3")[0] == 0


def test_a_draft_changes_no_greedy_text(cli, text_run, checkpoint, tmp_path):
    base = ["generate", text_run, "to be", "--max-tokens", "30", "--temperature", "0", "--stop", "zzz"]
    plain = cli(*base)[1]
    assert cli(*base, "--draft", text_run)[1] == plain
    code, _, error = cli(*base, "--draft", checkpoint)
    assert code == 2 and "its tokeniser is another one" in " ".join(error.split())
    code, _, error = cli(*base, "--draft", text_run, "--save-state", tmp_path / "x")
    assert code == 2 and "cannot be combined" in error


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
