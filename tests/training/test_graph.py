"""A recorded step computes what an ordinary one computes. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from mambakit.config import ConfigError
from mambakit.data.loader import batches
from mambakit.training.config import TrainConfig
from mambakit.training.interrupt import StopRequest
from mambakit.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def trainer(tmp_path, cuda_graph: bool, optimizer: str) -> Trainer:
    """A small run on the GPU, with accumulation and an average."""
    return Trainer(
        TrainConfig.from_dict(
            {
                "task": {"type": "language-modeling"},
                "data": {"type": "shakespeare", "length": 64},
                "model": {
                    "d_model": 32,
                    "pattern": "M-S",
                    "mixers": {
                        "M": {"type": "mamba2", "d_state": 8, "headdim": 8},
                        "S": {"type": "s4", "d_state": 8},
                    },
                },
                "optimizer": {"name": optimizer},
                "schedule": {"warmup": 4},
                "train": {
                    "steps": 12,
                    "batch_size": 8,
                    "accumulate": 2,
                    "ema": 0.9,
                    "cuda_graph": cuda_graph,
                },
                "out": str(tmp_path / str(cuda_graph)),
                "device": "cuda",
            }
        ),
        StopRequest(),
    )


def train(run: Trainer, steps: int) -> dict[str, torch.Tensor]:
    parts = batches(run.training_data, 4, count=2 * steps)
    run.model.train()
    for _ in range(steps):
        run._optimise([next(parts), next(parts)])
    torch.cuda.synchronize()
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recorded_steps_train_the_same_model(tmp_path, optimizer):
    ordinary, recorded = (trainer(tmp_path, graph, optimizer) for graph in (False, True))
    expected, found = train(ordinary, 12), train(recorded, 12)
    assert recorded.graph is not None
    assert ordinary.graph is None
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4, msg=name)
    assert recorded.sums.read() == pytest.approx(ordinary.sums.read(), rel=1e-3)
    assert float(recorded.norm) == pytest.approx(float(ordinary.norm), rel=1e-2)


def test_a_step_that_is_not_finite_is_named_and_changes_nothing(tmp_path):
    run = trainer(tmp_path, True, "adamw")
    before = train(run, 6)
    with torch.no_grad():
        run.model.backbone.norm_f.weight[0] = torch.nan
    train(run, 2)
    assert run.guard.first() == 7
    for name, p in run.model.named_parameters():
        if "norm_f" not in name:
            assert torch.equal(p, before[name]), name


def test_a_batch_of_another_shape_is_refused(tmp_path):
    run = trainer(tmp_path, True, "adamw")
    train(run, 5)
    odd = next(batches(run.training_data, 3, count=1))
    with pytest.raises(ConfigError, match="cuda_graph"):
        run._optimise([odd, odd])
