"""The guard names the step and the tensor, at once on a CPU and in hindsight on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mambakit.layers.norm import RMSNorm
from mambakit.training import NonFiniteError, TrainConfig, run
from mambakit.training.guard import Guard, diagnose
from mambakit.training.trainer import Trainer

Tiny = Callable[..., TrainConfig]


def test_the_first_bad_step_is_remembered():
    guard = Guard(torch.device("cpu"))
    one = torch.tensor(1.0)
    guard.watch(1, one, one)
    assert (guard.first(), float(guard.tripped)) == (None, 0.0)
    guard.watch(2, one, torch.tensor(float("inf")))
    guard.watch(3, torch.tensor(float("nan")), one)
    guard.watch(4, one, one)
    assert (guard.first(), float(guard.tripped)) == (2, 1.0)


def test_once_tripped_the_fused_optimizer_stands_still():
    # The way a GPU run works: the flag is read long after the bad step, and the weights are those before it.
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    guard = Guard(torch.device("cpu"))
    optimizer.found_inf = guard.tripped
    states = []
    for step, value in enumerate([1.0, float("nan"), 1.0], 1):
        parameter.grad = torch.full((3,), value)
        guard.watch(step, torch.tensor(0.0), parameter.grad.norm())
        optimizer.step()
        states.append(parameter.detach().clone())
    assert not torch.equal(states[0], torch.ones(3))
    assert torch.equal(states[1], states[0])
    assert torch.equal(states[2], states[0])
    assert guard.first() == 2


class Log(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


class ZeroRootGradient(nn.Module):
    """Finite forward, infinite gradient at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 0).sqrt()


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def mean(model: nn.Module) -> Callable[[dict], torch.Tensor]:
    return lambda batch: model(batch["x"]).mean()


def test_diagnosis_names_the_first_of_each_kind():
    good = [{"x": torch.ones(2, 4)}]
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.constant_(first.weight, -1.0)
    model = chain(first, Log(), last)
    assert diagnose(model, good, mean(model)) == "activation of 1 (8 of 8 values)"

    model = chain(nn.Linear(4, 4), ZeroRootGradient(), nn.Linear(4, 4))
    assert diagnose(model, good, mean(model)) == "gradient of 0.weight (16 of 16 values)" or diagnose(
        model, good, mean(model)
    ).startswith("gradient of 0.bias")

    model = chain(nn.Linear(4, 4))
    bad = [good[0], {"x": torch.tensor([[1.0, float("inf"), 0.0, float("nan")]])}]
    assert diagnose(model, bad, mean(model)) == "x of the batch (2 of 4 values)"
    assert diagnose(model, good, lambda batch: model(batch["x"]).mean() / 0) == "loss (1 of 1 values)"
    assert diagnose(model, good, mean(model)).startswith("none on a second run")

    with torch.no_grad():
        model[0].bias[1] = float("nan")
    assert diagnose(model, good, mean(model)) == "parameter 0.bias (1 of 4 values)"
    assert not model[0]._forward_hooks


def explode(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the final norm of the backbone return a NaN from its `at`-th training pass on."""
    calls = 0
    original = RMSNorm.forward

    def forward(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        y = original(self, x)
        if self is target[0] and self.training:
            calls += 1
            if calls >= at:
                y = y.index_fill(2, torch.tensor([0]), float("nan"))
        return y

    from mambakit.models import Backbone

    target = [None]
    built = Backbone.__init__

    def init(self: Backbone, *args: object, **kwargs: object) -> None:
        built(self, *args, **kwargs)
        target[0] = self.norm_f

    monkeypatch.setattr(RMSNorm, "forward", forward)
    monkeypatch.setattr(Backbone, "__init__", init)


@pytest.mark.parametrize("late", [False, True])
def test_a_run_stops_at_the_step_and_saves_nothing_of_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
):
    explode(monkeypatch, at=2 * 6 + 1)  # the first part of step 7
    # Late, as on a GPU: nobody looks before the next line of the log or checkpoint.
    monkeypatch.setattr(Trainer, "hindsight", late)
    with pytest.raises(
        NonFiniteError, match=r"step 7 .*activation of backbone.norm_f .*last checkpoint is of step 4"
    ):
        run(tiny())
    folder = tmp_path / "run"
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == "step-00000004"
    assert not (folder / "summary.json").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6
