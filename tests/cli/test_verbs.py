"""The verbs, called as a user calls them and read as a user reads them: 80 columns, no terminal."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import mambakit
from mambakit.generation import Sampling, generate, stream_text
from mambakit.ops import native
from mambakit.ops.dispatch import registry
from mambakit.recipes import list_recipes
from mambakit.testing.samples import CASES
from mambakit.training import load_run, load_tokenizer

PROGRAM = [sys.executable, "-m", "mambakit"]

VERBS = ("train", "finetune", "generate", "eval", "evaluate", "recipes", "doctor", "bench")


def narrow(shown: str) -> bool:
    return all(len(line) <= 80 for line in shown.splitlines())


def test_train_ends_with_a_sample_the_scores_and_what_to_do_next(cli, tiny, tmp_path):
    out = tmp_path / "run"
    code, shown, said = cli("train", tiny, f"out={out}")
    assert code == 0, said
    summary = json.loads((out / "summary.json").read_text())
    lines = shown.splitlines()
    assert f"{summary['metrics']['val_loss']:.4f}" in shown
    assert f"mambakit generate {out}" in shown
    assert f"mambakit eval {out}" in shown
    rule = next(i for i, line in enumerate(lines) if line.startswith("held-out text"))
    held_out = tiny.with_name("words.txt").read_text()
    assert lines[rule + 1][:16] in held_out


def test_resume_starts_fresh_where_there_is_nothing_and_goes_on_where_there_is(cli, tiny, tmp_path):
    words = ["train", tiny, f"out={tmp_path / 'run'}", "schedule.name=constant", "resume=true"]
    assert cli(*words, "train.steps=3")[0] == 0
    code, shown, _ = cli(*words)
    assert code == 0
    assert "resumed" in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def test_generate_writes_the_prompt_and_what_the_library_generates(cli, text_run):
    options = ["--temperature", "0.9", "--top-k", "9", "--top-p", "0.95", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.1", "--seed", "4", "--max-tokens", "40"]
    code, shown, said = cli("generate", text_run, "to be", *options)
    assert (code, said) == (0, "")
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=4)
    model, _, _ = load_run(text_run)
    tokenizer = load_tokenizer(text_run)
    tokens = torch.as_tensor(tokenizer.encode("to be"))[None]
    expected = tokenizer.decode(generate(model, tokens, max_tokens=40, sampling=sampling)[0].tolist())
    assert shown == f"to be{expected}\n"


def test_generate_stops_before_any_of_the_stop_strings(cli, text_run):
    base = ["generate", text_run, "to be", "--seed", "3", "--max-tokens", "200"]
    full = cli(*base)[1][len("to be") : -1]
    first, second = full[90:92], full[60:62]
    code, shown, _ = cli(*base, "--stop", first, "--stop", second)
    assert code == 0
    assert shown == f"to be{full[: min(full.index(first), full.index(second))]}\n"


def test_a_run_in_the_folder_runs_may_be_called_by_its_name(cli, text_run, tmp_path, monkeypatch):
    (tmp_path / "runs").symlink_to(text_run.parent)
    monkeypatch.chdir(tmp_path)
    assert cli("generate", "words", "to be", "--max-tokens", "3")[0] == 0


def test_eval_repeats_what_training_measured(cli, parity_run):
    code, shown, said = cli("eval", parity_run)
    assert (code, said) == (0, "")
    assert narrow(shown)
    result = json.loads((parity_run / "eval.json").read_text())
    assert result["metrics"] == json.loads((parity_run / "summary.json").read_text())["metrics"]
    for row in ("validation", "length_8", "length_16"):
        accuracy = result["metrics"]["val_accuracy" if row == "validation" else f"accuracy@{row}"]
        assert re.search(rf"^{row} .*{100 * accuracy:.2f}%", shown, re.MULTILINE)


def test_eval_measures_under_changed_settings(cli, parity_run):
    assert cli("eval", parity_run, "data.evaluation_lengths=[12]")[0] == 0
    result = json.loads((parity_run / "eval.json").read_text())
    assert "accuracy@length_12" in result["metrics"]
    assert "accuracy@length_8" not in result["metrics"]
    assert result["changes"] == {"data": {"evaluation_lengths": [12]}}


@pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))
def test_eval_measures_what_the_decode_engine_says(cli, text_run):
    results = {}
    for engine in (None, "float32", "int4"):
        words = [] if engine is None else ["--engine", engine]
        code, _, said = cli("eval", text_run, *words)
        assert (code, said) == (0, "")
        results[engine] = json.loads((text_run / "eval.json").read_text())
        assert results[engine]["engine"] == engine
    losses = {engine: result["metrics"]["val_loss"] for engine, result in results.items()}
    assert losses["float32"] == pytest.approx(losses[None], rel=1e-5)
    assert 1e-5 < abs(losses["int4"] - losses[None]) < 0.1 * losses[None]


def test_recipes_lists_every_recipe_with_what_it_says_of_itself(cli):
    code, shown, _ = cli("recipes")
    assert code == 0
    assert narrow(shown)
    flat = " ".join(shown.split())
    for recipe in list_recipes():
        assert re.search(rf"^{recipe.name} ", shown, re.MULTILINE)
        for words in (recipe.about.hardware, recipe.about.cost, recipe.about.expected):
            assert words in flat


def test_doctor_shows_every_operator_and_why_a_thing_is_missing(cli, monkeypatch, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").touch()
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path))
    code, shown, _ = cli("doctor")
    assert code == 0
    assert torch.__version__ in shown
    assert re.search(r"^decode engine +(float32, .*int4|none: )", shown, re.MULTILINE)
    tried = {case.op for case in CASES}
    for name in registry:
        row = re.search(rf"^{name} .*(\n +.*)*", shown, re.MULTILINE)  # its line and the indented ones below
        assert row and ("used" if name in tried else "reference") in row[0]
    assert f"mnist{tmp_path / 'mnist'}" in "".join(shown.split())  # a long path is folded
    if torch.version.cuda is None:
        assert "built without CUDA" in shown


def test_version_and_help(cli):
    assert cli("--version")[1] == f"mambakit {mambakit.__version__}\n"
    for words in (
        [],
        ["--help"],
        *([verb, "--help"] for verb in VERBS),
    ):
        code, shown, said = cli(*words)
        assert (code, said) == (0, "")
        assert "Usage: mambakit" in shown
        assert narrow(shown)


def interrupt(words: list[str], until, number: signal.Signals = signal.SIGINT) -> subprocess.CompletedProcess:
    """Start the program, wait for a path to exist, send a signal."""
    program = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not until.exists() and program.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    program.send_signal(number)
    shown, said = program.communicate(timeout=120)
    return subprocess.CompletedProcess(words, program.returncode, shown, said)


def test_a_stopped_training_says_how_to_go_on_and_can_be_used_until_then(cli, tiny, tmp_path):
    out = tmp_path / "a run"
    words = ["train", str(tiny), f"out={out}", "train.steps=100000", "schedule.name=constant", "train.keep=1"]
    stopped = interrupt(words, until=out / "metrics.jsonl")
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    step = int(re.search(r"after step (\d+)", stopped.stderr)[1])

    code, shown, said = cli("generate", out, "to be", "--max-tokens", "5", "--seed", "0")
    assert code == 0
    assert len(shown) == len("to be") + 5 + 1
    assert said == f"warning: {out} is not finished: using its checkpoint of step {step}\n"

    command = re.search(r"^go on with: mambakit (.*)$", stopped.stderr, re.MULTILINE)[1]
    code, shown, said = cli(*shlex.split(command), f"train.steps={step + 2}")
    assert code == 0, said
    assert f"step {step}" in shown


def test_a_terminated_training_saves_too(tiny, tmp_path):
    words = ["train", str(tiny), f"out={tmp_path / 'run'}", "train.steps=100000"]
    stopped = interrupt(words, until=tmp_path / "run" / "metrics.jsonl", number=signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


def test_a_stopped_generation_ends_its_line(text_run):
    program = subprocess.Popen(
        [*PROGRAM, "generate", str(text_run), "to be", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it puts into the background with Ctrl-C ignored, and so these tests, perhaps.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert program.stdout.read(20)
    program.send_signal(signal.SIGINT)
    shown, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert said == b""
    assert shown.endswith(b"\n")


def test_a_reader_that_has_gone_is_no_error(text_run):
    program = subprocess.Popen(
        [*PROGRAM, "generate", str(text_run), "to be", "--max-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout.read(20)
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait(timeout=60) == 1


def test_streaming_shows_text_before_the_last_token(text_run):
    """The library's side of it: pieces come one by one."""
    model, _, _ = load_run(text_run)
    pieces = stream_text(
        model, load_tokenizer(text_run), "to be", max_tokens=10**9, sampling=Sampling(seed=0)
    )
    assert len(next(pieces)) == 1
