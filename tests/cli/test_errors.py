"""What the command line says when it cannot: one line, the nearest valid name, the right exit code."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import typer

from mambakit.cli import app, main
from mambakit.ops import native
from mambakit.training import NonFiniteError


def complaint(result: tuple[int, str, str]) -> str:
    """The one line on standard error of a command that was refused."""
    code, shown, said = result
    assert code == 2, said
    assert shown == ""
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train"], ["RECIPE"]),
        (["train", "shakespear"], ["unknown recipe 'shakespear'", "'shakespeare'"]),
        (["train", "nothing-like-it"], ["unknown recipe", "parity", "s4-mnist"]),
        (["train", "shakespeare", "train.stepz=3"], ["train.stepz", "'steps'"]),
        (["train", "shakespeare", "trian.steps=3"], ["'trian'", "'train'"]),
        (["train", "shakespeare", "train.steps=many"], ["train.steps", "'many'"]),
        (["train", "shakespeare", "train.steps=0"], ["steps is 0", "at least 1"]),
        (["train", "shakespeare", "train.precision=bf17"], ["train.precision", "bf16", "'bf17'"]),
        (["train", "shakespeare", "optimizer.lr=-1"], ["lr is -1"]),
        (["train", "shakespeare", "task.type=language-modelling"], ["'language-modeling'"]),
        (["train", "shakespeare", "data.type=shakespare"], ["'shakespeare'"]),
        (["train", "shakespeare", "data.vocabulary=byte"], ["'bytes'"]),
        (["train", "shakespeare", "model.d_modle=8"], ["model.d_modle", "'d_model'"]),
        (["train", "shakespeare", "model.pattern=8Q"], ["'Q'"]),
        (["train", "shakespeare", "model.mixers.M.type=mamba22"], ["'mamba2'"]),
        (["train", "shakespeare", "model.mixers.M.d_sttae=8"], ["'d_state'"]),
        (["train", "shakespeare", "model.d_model=50"], ["headdim"]),
        (["train", "shakespeare", "device=tpu"], ["'tpu'", "cpu"]),
        (["train", "shakespeare", "steps"], ["'steps'", "key=value"]),
        (["train", "shakespeare", "a=1", "a.b=2"], ["contradicts"]),
        (["train", "shakespeare", "data=[1, 2"], ["cannot be read"]),
        (["train", "shakespeare", "--backend", "chunkd"], ["'chunked'"]),
        (["train", "shakespeare", "--backnd", "chunked"], ["--backend"]),
        (["generate", "runs"], ["PROMPT"]),
        (["eval"], ["RUN"]),
        (["bench", "--seconds", "0"], ["--seconds is 0", "positive"]),
        (["bench", "--seconds", "long"], ["--seconds", "number"]),
        (["bench", "--device", "gpu"], ["'gpu'", "cpu"]),
        (["bench", "--json", "absent/found.json"], ["absent/found.json", "no folder"]),
        (["bench", "--jsn", "x"], ["--json"]),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(cli, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    line = complaint(cli(*words))
    assert all(part in line for part in expected), line
    assert not list(tmp_path.iterdir()), "a command that was refused leaves nothing behind"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {d_model: 1", "line 1"),
        ("model:\n\t- x\n", "line 2"),
        ("", "expected a mapping"),
        ("- a\n- b\n", "expected a mapping"),
        ("about: {summary: x}\n", "about"),
        ("base: nothing-like-it\n", "unknown recipe"),
        ("base: [1]\n", "base"),
        ("base: itself.yaml\n", "based on itself"),
        ("base: absent.yaml\n", "absent.yaml"),
        ("task: {type: language-modeling}\n", "data"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a: \x00", "YAML"),
    ],
)
def test_a_broken_recipe_file_is_named_with_the_place(cli, tmp_path, content, expected):
    path = tmp_path / "itself.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = complaint(cli("train", path))
    assert expected in line
    if expected not in ("data", "unknown recipe"):
        assert "itself.yaml" in line or "absent.yaml" in line


def test_every_prefix_of_a_recipe_is_refused_or_read(cli, tiny, tmp_path):
    """A file cut anywhere gives a run's config or one line, never a traceback. Nothing is trained."""
    content, path = tiny.read_bytes(), tmp_path / "cut.yaml"
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        complaint(cli("train", path, "train.steps=0"))


def test_an_absent_recipe_file_is_named_with_its_neighbour(cli, tiny):
    line = complaint(cli("train", tiny.with_name("tini.yaml")))
    assert "tini.yaml" in line
    assert "tiny.yaml" in line


def test_an_absent_run_is_named_with_its_neighbour(cli, text_run):
    for verb in (["generate", text_run.with_name("wrods"), "to"], ["eval", text_run.with_name("wrods")]):
        assert "words" in complaint(cli(*verb)).partition("did you mean")[2]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_run_is_refused_with_the_file(cli, text_run, tmp_path, file, damage):
    copy = tmp_path / "copy"
    shutil.copytree(text_run, copy)
    (copy / file).write_bytes(damage((copy / file).read_bytes()))
    assert str(copy) in complaint(cli("generate", copy, "to be"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--min-p", "1.5"], "min_p is 1.5"),
        (["--top-k", "few"], "--top-k"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--stop", ""], "stop string is empty"),
        (["--temprature", "1"], "--temperature"),
        (["--device", "gpu"], "'gpu'"),
        (["--backend", "fast"], "unknown backend 'fast'"),
    ],
)
def test_sampling_settings_out_of_range_are_named(cli, text_run, words, expected):
    assert expected in complaint(cli("generate", text_run, "to be", *words))


def test_a_character_the_model_does_not_know_is_named(cli, text_run):
    assert "'Z'" in complaint(cli("generate", text_run, "to be Z"))
    assert "no tokens" in complaint(cli("generate", text_run, ""))


def test_data_that_is_not_text_cannot_be_written(cli, parity_run):
    assert "parity" in complaint(cli("generate", parity_run, "to be"))


def test_an_evaluation_cannot_change_the_model(cli, text_run):
    assert "model" in complaint(cli("eval", text_run, "model.d_model=8"))
    assert "vocab_size" in complaint(cli("eval", text_run, "data={type: shakespeare}"))


def test_an_engine_that_does_not_exist_or_cannot_take_the_model_is_named(cli, text_run, monkeypatch):
    assert "did you mean 'int8'" in complaint(cli("eval", text_run, "--engine", "int9"))
    monkeypatch.setattr(native, "load", lambda: native.Native(reason="not built; do this"))
    assert "not built; do this" in complaint(cli("eval", text_run, "--engine", "int8"))


def test_debug_adds_the_traceback_and_keeps_the_exit_code(cli):
    code, _, said = cli("--debug", "train", "shakespear")
    assert code == 2
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: unknown recipe")


def raising(error: Exception):
    def verb() -> None:
        raise error

    return verb


def with_verb(monkeypatch, verb) -> None:
    replaced = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    replaced.command("broken")(verb)
    replaced.callback()(lambda: None)
    monkeypatch.setattr(app, "app", replaced)


@pytest.mark.parametrize(
    "verb",
    [
        raising(RuntimeError("a bug")),
        raising(KeyError("a bug")),
        raising(ValueError("raised outside mambakit")),
        lambda: np.zeros(3).reshape(2, 2),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, verb):
    with_verb(monkeypatch, verb)
    with pytest.raises((RuntimeError, KeyError, ValueError)):
        main(["broken"])


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "train.accumulate=2"),
        (NonFiniteError(7, "gradient of backbone.norm_f.weight (1 of 8 values)", "Lower lr."), 1, "step 7"),
        (PermissionError(13, "Permission denied", "/elsewhere/run"), 2, "/elsewhere/run: Permission denied"),
        (OSError(28, "No space left on device", "x"), 2, "No space left"),
    ],
)
def test_what_the_user_can_mend_is_one_line(cli, monkeypatch, error, code, expected):
    with_verb(monkeypatch, raising(error))
    found, shown, said = cli("broken")
    assert found == code
    assert shown == ""
    assert expected in said
    assert said.count("\n") == 1
