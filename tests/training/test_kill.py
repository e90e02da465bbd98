"""Processes killed at any instant, and asked to stop: what they leave behind continues bit-equal."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Imports once, then forks a process for each run, so that twenty kills cost seconds and not minutes.
NURSERY = """
import json, os, signal, sys
import torch._dynamo  # which PyTorch's optimisers import
from mambakit import files
from mambakit.training import Interrupted, TrainConfig, interrupt, log, run, trainer

log.RunLog.draw = lambda self: None  # half a second each, and tested elsewhere
trainer.Trainer(TrainConfig.from_dict(json.loads(sys.stdin.readline())), interrupt.StopRequest())  # warms up
print("ready", 0, flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        flush, left = files.flush, order["flushes"]
        def flush_and_die(path):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)
        if left:
            files.flush = flush_and_die
        try:
            run(TrainConfig.from_dict(order["config"]))
        except Interrupted as stopped:
            print(stopped, file=sys.stderr, flush=True)
            os._exit(130)
        os._exit(0)
    print("started", child, flush=True)
    sys.stdin.readline()  # until then nobody collects the child, so its number stays its own
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Runs of training in processes of their own."""

    def __init__(self, errors: Path, example: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.errors = errors.open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        self.process.stdin.write(json.dumps(example) + "\n")
        self.process.stdin.flush()
        self._hear("ready")

    def start(self, config: dict[str, Any], flushes: int = 0) -> int:
        """Start a run and return its process number; with `flushes`, it dies at that flush of a file."""
        self.process.stdin.write(json.dumps({"config": config, "flushes": flushes}) + "\n")
        self.process.stdin.flush()
        return self._hear("started")

    def end(self) -> int:
        """Wait for the run; its exit status, negative for a signal."""
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        return self._hear("ended")

    def run(self, config: dict[str, Any], flushes: int = 0) -> int:
        """Start a run, wait for it, and return its exit status, which is success or the arranged death."""
        began = time.monotonic()
        self.start(config, flushes)
        status = self.end()
        assert status in ((0, -signal.SIGKILL) if flushes else (0,)), self.said()
        self.seconds = time.monotonic() - began
        return status

    def _hear(self, expected: str) -> int:
        """The number after the expected word: never mistake a status for a process to be killed."""
        word, _, number = self.process.stdout.readline().partition(" ")
        assert word == expected, f"expected {expected!r}, heard {word!r}; {self.said()}"
        return int(number)

    def said(self) -> str:
        """What the runs have written to standard error."""
        return Path(self.errors.name).read_text()


@pytest.fixture(scope="module")
def nursery(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery") / "stderr.txt", settings)
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=60)
    made.errors.close()


@pytest.fixture(scope="module")
def whole(
    settings: dict, nursery: Nursery, outcome: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    nursery.run({**settings, "out": str(folder)})
    return outcome(folder)


def wait_for(path: Path, lines: int) -> None:
    """Wait until a run has written so many lines of its record."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.002)


def test_20_kills_at_random_instants(
    plain: Callable, nursery: Nursery, whole: dict, outcome: Callable, same: Callable, tmp_path: Path
):
    dice, folder, config = random.Random(0), tmp_path / "run", plain(resume=True)
    killed = finished = resumed = attempts = 0
    while killed < 20 or resumed < 4 or not finished:
        attempts += 1
        assert attempts < 200, (killed, finished, resumed)
        child = nursery.start(config)
        if killed < 20 or resumed < 4:
            # Longer with every attempt: on a machine that has become busy, some must get past a checkpoint.
            time.sleep(dice.uniform(0.0, 0.6 + attempts / 50) * nursery.seconds)
            os.kill(child, signal.SIGKILL)
        status = nursery.end()
        assert status in (-signal.SIGKILL, 0), nursery.said()
        killed += status != 0
        if status == 0:
            same(whole, outcome(folder))
            resumed += (folder / "metrics.jsonl").read_text().count("resumed at step")
            shutil.rmtree(folder)
            finished += 1


def test_kills_at_every_step_of_a_commit(
    plain: Callable, nursery: Nursery, whole: dict, outcome: Callable, same: Callable, tmp_path: Path
):
    # Each attempt dies one flush later than the one before, so that over the attempts every gap between two
    # operations of a commit is hit: before, between and after its files, around the rename and the pruning.
    config, flushes = plain(resume=True), 0
    while (flushes := flushes + 1) and nursery.run(config, flushes) != 0:
        assert flushes < 60
    assert flushes > 11  # more than the ten flushes of one commit
    same(whole, outcome(tmp_path / "run"))
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if "." in path.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    plain: Callable,
    nursery: Nursery,
    whole: dict,
    outcome: Callable,
    same: Callable,
    tmp_path: Path,
    number: signal.Signals,
):
    folder = tmp_path / "run"
    slow = plain(train={"checkpoint_every": None})
    child = nursery.start(slow)
    wait_for(folder / "metrics.jsonl", 5)  # the parameter table and two lines of training
    os.kill(child, number)
    assert nursery.end() == 130, nursery.said()
    assert f"stopped by {number.name} after step" in nursery.said()
    assert "repeat the command with resume=true" in nursery.said()
    assert len(list((folder / "checkpoints").iterdir())) == 1
    nursery.run({**slow, "resume": True})
    same(whole, outcome(folder))


def test_a_folder_in_use_is_left_alone(plain: Callable, nursery: Nursery, tmp_path: Path):
    from mambakit.config import ConfigError
    from mambakit.training import TrainConfig, run

    config = plain(train={"steps": 5000, "eval_every": None})
    child = nursery.start(config)
    wait_for(tmp_path / "run" / "metrics.jsonl", 4)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="another process is training in"):
            run(TrainConfig.from_dict({**config, "resume": resume}))
    os.kill(child, signal.SIGKILL)
    assert nursery.end() == -signal.SIGKILL
    run(
        TrainConfig.from_dict({**config, "train": {**config["train"], "steps": 2}})
    )  # the lock died with its holder
    assert (tmp_path / "run.1").exists()
