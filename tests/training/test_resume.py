"""A run in pieces is the run in one piece, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mambakit import files
from mambakit.config import ConfigError
from mambakit.training import Interrupted, TrainConfig, load_run, run
from mambakit.training.interrupt import StopRequest
from mambakit.training.trainer import Trainer

Tiny = Callable[..., TrainConfig]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run be asked to stop once `step` steps are done."""
    original = Trainer._optimise

    def optimise(self: Trainer, parts: list) -> None:
        original(self, parts)
        if self.step == step:
            self.stop.requested = "SIGINT"

    monkeypatch.setattr(Trainer, "_optimise", optimise)


@pytest.fixture(scope="module")
def whole_folder(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run, not to be touched."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(TrainConfig.from_dict({**settings, "out": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder: Path, outcome: Callable) -> dict[str, Any]:
    return outcome(whole_folder)


def test_a_run_stopped_anywhere_continues_bit_equal(
    tiny: Tiny,
    whole: dict,
    outcome: Callable,
    same: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    # Before the first step's checkpoint, between log lines, on a checkpoint, on an evaluation, at the end.
    for step in (1, 5, 8, 12, 23, 24):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"after step {step}, .* resume=true"):
                run(tiny(resume=True))
    summary = run(tiny(resume=True))
    same(whole, outcome(tmp_path / "run"))
    assert summary["tokens_seen"] == sum(24 * 8 * [16])
    notes = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "resumed at" in line
    ]
    assert [json.loads(line)["step"] for line in notes] == [1, 5, 8, 12, 23, 24]


def test_same_seed_same_run_other_seed_other_run(
    tiny: Tiny, whole: dict, outcome: Callable, same: Callable, tmp_path: Path
):
    run(tiny())
    same(whole, outcome(tmp_path / "run"))
    run(tiny(seed=1, out=str(tmp_path / "other")))
    other = outcome(tmp_path / "other")
    assert other["record"][0]["loss"] != whole["record"][0]["loss"]


def test_step_k_reads_the_samples_from_k_times_the_batch_size(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = {}
    original = Trainer._optimise

    def record(self: Trainer, parts: list) -> None:
        read[self.step] = torch.cat([part["tokens"] for part in parts])
        original(self, parts)

    monkeypatch.setattr(Trainer, "_optimise", record)
    config = tiny(train={"steps": 3})
    run(config)
    data = config.data.train(config.seed)
    for step in range(3):
        assert torch.equal(read[step], data.batch(range(8 * step, 8 * step + 8))["tokens"])


def test_looking_at_a_run_does_not_change_it(tiny: Tiny, whole: dict, outcome: Callable, tmp_path: Path):
    run(tiny(train={"eval_every": 1, "checkpoint_every": None, "log_every": 1, "eval_batches": 1}))
    seen = outcome(tmp_path / "run")["tensors"]
    assert all(torch.equal(tensor, seen[name]) for name, tensor in whole["tensors"].items())


def test_a_damaged_checkpoint_costs_steps_not_bits(
    tiny: Tiny, whole_folder: Path, whole: dict, outcome: Callable, same: Callable, tmp_path: Path
):
    folder = shutil.copytree(whole_folder, tmp_path / "run")
    newest = folder / "checkpoints" / "step-00000024" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run(tiny(resume=True))
    same(whole, outcome(folder))
    notes = (folder / "metrics.jsonl").read_text()
    assert "refused step-00000024: optimizer.safetensors does not match its digest" in notes
    assert "resumed at step 20" in notes


def test_without_an_intact_checkpoint_resuming_is_an_error(tiny: Tiny, whole_folder: Path, tmp_path: Path):
    folder = shutil.copytree(whole_folder, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"no intact checkpoint .*step-00000024: manifest.json: No such file"
    ):
        run(tiny(resume=True))


def test_resume_starts_fresh_where_there_is_nothing(
    tiny: Tiny, whole: dict, outcome: Callable, same: Callable, tmp_path: Path
):
    folder = tmp_path / "run"
    folder.mkdir()
    # What a process killed before its first checkpoint leaves behind.
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 9.9}\n{"kind": "tra')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000004.tmp-0123").mkdir()
    run(tiny(resume=True))
    same(whole, outcome(folder))
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_settings_that_matter_are_named_when_they_differ(tiny: Tiny, whole_folder: Path, tmp_path: Path):
    out = {"out": str(shutil.copytree(whole_folder, tmp_path / "run")), "resume": True}
    with pytest.raises(
        ConfigError, match=r"step 24 .*optimizer.lr=0.5 \(was 0.01\), seed=3 \(was 0\); restore them"
    ):
        run(tiny(**out, seed=3, optimizer={"lr": 0.5}))
    with pytest.raises(ConfigError, match=r"model.mixers.M.d_state=16 \(was 8\)"):
        run(tiny(**out, model={"mixers": {"M": {"d_state": 16}}}))
    with pytest.raises(ConfigError, match=r"train.steps=30 \(was 24\)"):  # a cosine knows its length
        run(tiny(**out, train={"steps": 30}))
    run(tiny(**out, train={"log_every": 7, "keep": 1, "eval_every": None}))


def test_a_constant_rate_run_can_be_lengthened(tiny: Tiny, outcome: Callable, tmp_path: Path):
    constant = {"schedule": {"name": "constant"}}
    run(tiny(**constant, out=str(tmp_path / "long")))
    run(tiny(**constant, train={"steps": 12}))
    run(tiny(**constant, resume=True))
    long, pieced = outcome(tmp_path / "long")["tensors"], outcome(tmp_path / "run")["tensors"]
    assert all(torch.equal(tensor, pieced[name]) for name, tensor in long.items())
    with pytest.raises(ConfigError, match=r"train.steps=12 \(was 24\)"):
        run(tiny(**constant, train={"steps": 12}, resume=True))


def test_the_best_model_survives_a_resumption(
    tiny: Tiny, outcome: Callable, same: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A rate so high that the last model is not the best one.
    wild = {
        "optimizer": {"lr": 0.3},
        "train": {"select": "best", "ema": None},
        "schedule": {"name": "constant"},
    }
    summary = run(tiny(**wild, out=str(tmp_path / "whole")))
    losses = {
        line["step"]: line["val_loss"]
        for line in outcome(tmp_path / "whole")["record"]
        if line["kind"] == "validation"
    }
    assert summary["model_step"] == min(losses, key=losses.get) != 24
    assert summary["metrics"]["val_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    stop_after(monkeypatch, 13)
    with pytest.raises(Interrupted):
        run(tiny(**wild))
    monkeypatch.undo()
    # A best model of a step that a run without this checkpoint's future once reached: not to be believed.
    model = load_run(tmp_path / "run")[0]
    files.replace_module(tmp_path / "run" / "model.safetensors", model, {"step": "20", "val_loss": "0.0"})
    assert run(tiny(**wild, resume=True))["model_step"] == summary["model_step"]
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "run"))


def test_a_stop_before_the_first_step_is_a_checkpoint_too(
    tiny: Tiny,
    whole: dict,
    outcome: Callable,
    same: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    original = Trainer._loop

    def loop(self: Trainer) -> None:
        self.stop.requested = "SIGTERM"
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loop", loop)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 0"):
            run(tiny())
    run(tiny(resume=True))
    same(whole, outcome(tmp_path / "run"))


def test_outside_the_main_thread_signals_are_left_alone():
    import signal
    import threading

    handlers = []

    def enter() -> None:
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert handlers == [before]
