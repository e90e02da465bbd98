"""What a run leaves behind, and what it says about a request it cannot meet."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mambakit.config import ConfigError
from mambakit.training import TrainConfig, evaluate, load_run, load_tokenizer, run
from mambakit.training import checkpoint as checkpoints
from mambakit.training.device import choose
from mambakit.training.interrupt import Interrupted
from mambakit.training.trainer import Trainer

Tiny = Callable[..., TrainConfig]
TEXT = "it was the best of times, it was the worst of times; " * 40


def lines(folder: Path, kind: str) -> list[dict]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def test_summary_and_files(tiny: Tiny, tmp_path: Path):
    config = tiny(train={"tensorboard": True})
    summary = run(config)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"val_loss", "val_accuracy", "accuracy@length_16", "accuracy@length_32"} <= summary[
        "metrics"
    ].keys()
    assert (summary["recipe"], summary["steps"], summary["model_step"]) == ("tiny", 24, 24)
    assert (summary["samples_seen"], summary["tokens_seen"]) == (192, 192 * 16)
    assert summary["tokens_per_second"] == pytest.approx(192 * 16 / summary["training_seconds"])
    assert summary["seconds"] > summary["training_seconds"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    assert summary["hardware"]["device"] == "cpu" and summary["hardware"]["cores"] >= 1
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["commit"] is None or len(summary["commit"].removesuffix("-dirty")) == 40
    assert summary["chance"] == 0.5
    assert summary["config"]["optimizer"]["betas"] == [0.9, 0.95]
    assert summary["config"]["model"]["vocab_size"] == 3
    assert sum(group["elements"] for group in summary["parameter_groups"]) == summary["parameters"]

    training, validation, final = (lines(folder, kind) for kind in ("train", "validation", "final"))
    assert [line["step"] for line in training] == list(range(3, 25, 3))
    assert [line["step"] for line in validation] == [6, 12, 18]
    assert [line["step"] for line in final] == [24]
    assert all(
        math.isfinite(value) for line in training for value in line.values() if not isinstance(value, str)
    )
    assert training[0]["lr"] == pytest.approx(0.01 * 3 / 4)  # third of four warmup steps
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]


def test_the_run_is_loaded_and_evaluated_as_it_was(tiny: Tiny, tmp_path: Path):
    summary = run(tiny())
    model, config, data = load_run(tmp_path / "run")
    assert not model.training
    assert data == tiny().data
    assert config.task == tiny().task
    metrics = evaluate(model, config)
    assert metrics == pytest.approx(summary["metrics"], rel=1e-6)
    averaged = load_file(tmp_path / "run" / "checkpoints" / "step-00000024" / "ema.safetensors")
    assert all(
        torch.equal(tensor, averaged[name]) for name, tensor in model.state_dict().items() if name in averaged
    )
    raw = load_file(tmp_path / "run" / "checkpoints" / "step-00000024" / "model.safetensors")
    assert not torch.equal(raw["embedding.weight"], averaged["embedding.weight"])
    assert load_tokenizer(tmp_path / "run") is None


def test_the_average_is_the_recursion_written_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    history = []
    original = Trainer._optimise

    def record(self: Trainer, parts: list) -> None:
        original(self, parts)
        history.append(self.model.embedding.weight.detach().clone())

    monkeypatch.setattr(Trainer, "_optimise", record)
    run(tiny())
    expected = history[0]
    for weight in history[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(load_run(tmp_path / "run")[0].embedding.weight.detach(), expected)


def test_a_text_run_is_complete_without_its_text(tiny: Tiny, tmp_path: Path):
    source = tmp_path / "book.txt"
    source.write_text(TEXT)
    config = tiny(
        data={"type": "text", "path": str(source), "vocabulary": "characters", "length": 16},
        train={"steps": 4, "ema": None, "accumulate": 1},
    )
    assert run(config)["tokens_seen"] == 4 * 8 * 16
    source.unlink()
    model, _, _ = load_run(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.decode(tokenizer.encode("best of times")) == "best of times"
    assert model.lm_head.out_features == tokenizer.vocab_size == len(set(TEXT))


def test_an_unfinished_run_gives_its_newest_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    original = Trainer._optimise

    def optimise(self: Trainer, parts: list) -> None:
        original(self, parts)
        if self.step == 9:
            self.stop.requested = "SIGTERM"

    monkeypatch.setattr(Trainer, "_optimise", optimise)
    with pytest.raises(Interrupted):
        run(tiny())
    with pytest.warns(UserWarning, match="not finished: using its checkpoint of step 9"):
        model = load_run(folder)[0]
    average = checkpoints.newest(folder / "checkpoints")[0].tensors("ema")
    assert torch.equal(model.embedding.weight, average["embedding.weight"])


def test_what_cannot_be_loaded_is_said_in_one_line(tiny: Tiny, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="unknown run"):
        load_run(folder)
    run(tiny(train={"steps": 1, "eval_every": None}))
    with pytest.raises(ConfigError, match=r"unknown run '.*/rum'; did you mean '.*/run'"):
        load_run(tmp_path / "rum")
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(ConfigError, match="weights cannot be loaded"):
        load_run(folder)
    (folder / "model.safetensors").unlink()
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no model yet: step-00000001: state.json has 2 bytes"):
        load_run(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load_run(folder)


def test_an_earlier_run_is_moved_aside_not_overwritten(tiny: Tiny, tmp_path: Path):
    short = {"steps": 2, "eval_every": None}
    for _ in range(3):
        run(tiny(train=short))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((path / "summary.json").exists() for path in tmp_path.iterdir())
    assert "an earlier run was in" in lines(tmp_path / "run", "note")[0]["text"]


def test_a_wrong_setting_costs_the_earlier_run_nothing(tiny: Tiny, tmp_path: Path):
    run(tiny(train={"steps": 1, "eval_every": None}))
    with pytest.raises(ConfigError, match=r"model\..*d_state"):
        run(tiny(model={"mixers": {"M": {"d_stat": 8}}}))
    assert (tmp_path / "run" / "summary.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_in_the_place_of_the_folder(tiny: Tiny, tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="out: cannot use"):
        run(tiny())


def test_parts_are_the_whole_in_float64(tiny: Tiny, tmp_path: Path):
    weights = {}
    torch.set_default_dtype(torch.float64)
    try:
        for accumulate in (1, 2, 8):
            out = tmp_path / str(accumulate)
            train = {"accumulate": accumulate, "steps": 6, "ema": None, "eval_every": None}
            # Labels at every position: the parts have unequal numbers of them.
            run(tiny(out=str(out), model={"dropout": 0.0}, data={"labels": "every"}, train=train))
            weights[accumulate] = load_file(out / "model.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    assert weights[1]["embedding.weight"].dtype == torch.float64
    for accumulate in (2, 8):
        for name, tensor in weights[1].items():
            tolerance = (
                {"rtol": 1e-5, "atol": 1e-6}
                if tensor.dtype == torch.float32
                else {"rtol": 1e-7, "atol": 1e-9}
            )
            torch.testing.assert_close(weights[accumulate][name], tensor, **tolerance)


@pytest.mark.parametrize("option", [{"activation_checkpointing": True}, {"workers": 2}])
def test_options_that_change_the_way_not_the_result(
    tiny: Tiny, tmp_path: Path, outcome: Callable, same: Callable, option: dict
):
    run(tiny(out=str(tmp_path / "plain"), train={"steps": 8}))
    run(tiny(train={"steps": 8, **option}))
    same(outcome(tmp_path / "plain"), outcome(tmp_path / "run"))


def test_bf16_rounds_products_and_keeps_float32_parameters(tiny: Tiny, tmp_path: Path, outcome: Callable):
    run(tiny(out=str(tmp_path / "plain")))
    run(tiny(train={"precision": "bf16"}))
    plain, rounded = (outcome(tmp_path / name) for name in ("plain", "run"))
    parameters = [tensor for key, tensor in rounded["tensors"].items() if key.startswith("model.")]
    assert {tensor.dtype for tensor in parameters} == {torch.float32}
    first, other = plain["record"][0]["loss"], rounded["record"][0]["loss"]
    assert first != other and other == pytest.approx(first, rel=0.02)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tiny: Tiny, tmp_path: Path, outcome: Callable):
    short = {"steps": 4, "ema": None}
    run(tiny(out=str(tmp_path / "plain"), model={"dropout": 0.0}, train=short))
    run(tiny(model={"dropout": 0.0}, train={**short, "compile": True}))
    plain, compiled = (outcome(tmp_path / name)["record"][0]["loss"] for name in ("plain", "run"))
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_without_rich_tensorboard_and_matplotlib_the_record_is_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] in ("rich", "matplotlib") or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    run(tiny(train={"tensorboard": True}))
    notes = [line["text"] for line in lines(tmp_path / "run", "note")]
    assert sum("tensorboard is not installed" in note for note in notes) == 1
    assert sum("matplotlib is not installed" in note for note in notes) == 1
    assert len(lines(tmp_path / "run", "train")) == 8


def test_importing_training_needs_no_rich_tensorboard_or_matplotlib():
    code = (
        "import sys, mambakit.training; "
        "optional = {'rich', 'tensorboard', 'matplotlib', 'pydantic', 'yaml'}; "
        "print(sorted(optional & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_console_hears_the_evaluations_and_a_terminal_sees_a_bar(tiny: Tiny, tmp_path: Path):
    from rich.console import Console

    heard = {}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        run(tiny(out=str(tmp_path / str(terminal))), console=console)
        heard[terminal] = console.file.getvalue()
    assert "step 12: val_loss" in heard[False]
    assert "model of step 24, length_32: loss" in heard[False]
    assert "decay: 6 tensors" in heard[False]
    assert "tokens/s" not in heard[False] and "tokens/s" in heard[True]
    assert "24/24" in heard[True]


def test_process_wide_choices_are_put_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    inside = []
    original = Trainer._loop

    def look(self: Trainer) -> None:
        inside.append((torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()))
        original(self)

    monkeypatch.setattr(Trainer, "_loop", look)
    before = torch.get_float32_matmul_precision()
    run(tiny(train={"steps": 1, "matmul_precision": "medium", "deterministic": True}))
    assert inside == [("medium", True)]
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == (
        before,
        False,
    )


def test_devices_that_are_not_there_are_refused():
    for name, message in (
        ("gpu", "unknown; valid: auto"),
        ("cuda:99", "CUDA devices"),
        ("meta", "cpu and cuda"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accumulate": 3}, "batch_size is 8, expected a multiple of accumulate=3"),
        ({"steps": 0}, "steps is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"precision": "fp16"}, "train.precision: .*'fp16'"),
        ({"select": "best", "eval_every": None}, "set eval_every"),
        ({"stepz": 3}, "train.stepz: unknown key 'stepz'; did you mean 'steps'"),
    ],
)
def test_meaningless_settings_are_refused(tiny: Tiny, wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(train=wrong)


def test_classification_of_images(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import numpy as np

    from mambakit.data import Epochs, MnistConfig, Samples

    class Stripes(Samples):
        """Bright on the left or on the right: two classes that two steps of learning tell apart."""

        def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            label = indices % 2
            inputs = np.zeros((len(indices), 12, 1), np.float32)
            inputs[np.arange(len(indices)), 3 + 6 * label, 0] = 1.0
            return {"inputs": inputs, "label": label}

    monkeypatch.setattr(MnistConfig, "train", lambda self, seed: Epochs(Stripes(64), seed))
    monkeypatch.setattr(MnistConfig, "validation", lambda self: Stripes(32))
    monkeypatch.setattr(MnistConfig, "evaluations", lambda self: {"test": Stripes(16)})
    model = {"d_model": 16, "pattern": "M", "mixers": {"M": {"type": "mamba2", "d_state": 8, "headdim": 8}}}
    plain = {
        "task": {"type": "sequence-classification"},
        "data": {"type": "mnist"},
        "model": {**model, "pooling": "last"},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 60, "batch_size": 16, "eval_every": 20, "tensorboard": False},
        "out": str(tmp_path / "stripes"),
        "device": "cpu",
    }
    summary = run(TrainConfig.from_dict(plain))
    assert summary["metrics"]["val_accuracy"] == summary["metrics"]["accuracy@test"] == 1.0
    assert summary["tokens_seen"] == 60 * 16 * 12
    assert load_run(tmp_path / "stripes")[0].head.out_features == 10
