"""Which parameter is decayed, at which rate, and that the state survives a round trip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig
from mambakit.training import optim
from mambakit.training.optim import OptimizerConfig


def model() -> LanguageModel:
    mixers = {"S": Mamba1Config(d_state=4), "M": Mamba2Config(d_state=8, headdim=8)}
    return LanguageModel(LanguageModelConfig(vocab_size=11, d_model=16, pattern="SM-", mixers=mixers))


def test_every_parameter_is_in_exactly_one_group_and_the_right_one():
    lm, config = model(), OptimizerConfig(lr=0.1, ssm_lr=0.01, weight_decay=0.3)
    groups = {group.name: group for group in optim.groups(lm, config)}
    sorted_in = [name for group in groups.values() for name in group.parameters]
    assert sorted(sorted_in) == sorted(name for name, _ in lm.named_parameters())
    kind = {name: group.name for group in groups.values() for name in group.parameters}
    dynamics = {
        name: p for name, p in lm.named_parameters() if name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
    }
    assert {kind[name] for name in dynamics} == {"ssm"}
    # Mamba-1's A_log is a matrix, and still not to be decayed.
    assert [p.ndim for name, p in dynamics.items() if name.endswith("A_log")] == [2, 1]
    for block in (0, 1):
        assert kind[f"backbone.blocks.{block}.mixer.in_proj.weight"] == "decay"
        assert kind[f"backbone.blocks.{block}.norm.weight"] == "no decay"
    assert kind["embedding.weight"] == "decay"
    assert {name: (g.lr, g.weight_decay) for name, g in groups.items()} == {
        "decay": (0.1, 0.3),
        "no decay": (0.1, 0.0),
        "ssm": (0.01, 0.0),
    }
    assert sum(group.row["elements"] for group in groups.values()) == sum(p.numel() for p in lm.parameters())


def test_without_its_own_rate_the_ssm_group_learns_at_lr():
    assert {group.lr for group in optim.groups(model(), OptimizerConfig(lr=0.5))} == {0.5}


def test_a_listed_name_that_does_not_exist_is_an_error():
    class Wrong(nn.Linear):
        ssm_parameters = frozenset({"weigth"})

    with pytest.raises(
        ValueError, match=r"Wrong.ssm_parameters: unknown parameter 'weigth'; did you mean 'weight'"
    ):
        optim.groups(nn.Sequential(Wrong(2, 2)), OptimizerConfig())


def test_a_listed_parameter_that_is_switched_off_is_passed_over():
    class NoBias(nn.Linear):
        ssm_parameters = frozenset({"bias"})

    groups = optim.groups(NoBias(2, 2, bias=False), OptimizerConfig())
    assert [group.name for group in groups] == ["decay"]


def test_frozen_parameters_are_left_out():
    lm = model()
    lm.embedding.requires_grad_(False)
    assert all("embedding.weight" not in group.parameters for group in optim.groups(lm, OptimizerConfig()))


def test_decay_reaches_the_decay_group_only():
    lm = model()
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    optimizer = optim.build(optim.groups(lm, config), config)
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
    optim.set_rates(optimizer, 0.5)
    optimizer.step()
    for group in optim.groups(lm, config):
        for name, parameter in group.parameters.items():
            shrunk = 1 - 0.05 * 0.5 if group.name == "decay" else 1.0
            torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


def test_state_round_trip_continues_to_the_last_bit():
    config = OptimizerConfig(lr=0.1)
    one, two = model(), model()
    two.load_state_dict(one.state_dict())
    tokens = torch.arange(11).view(1, 11)

    def step(lm: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        lm(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = optim.build(optim.groups(one, config), config)
    step(one, first)
    second = optim.build(optim.groups(two, config), config)
    two.load_state_dict(one.state_dict())
    optim.unpack(second, {name: value.clone() for name, value in optim.pack(first).items()})
    for lm, optimizer in ((one, first), (two, second)):
        step(lm, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"has lm_head\.weight, unknown to the model"):
        optim.unpack(second, {"lm_head.weight/exp_avg": torch.zeros(11, 16)})  # tied: known as the embedding


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": float("nan")}, {"ssm_lr": -1}, {"betas": (0.9, 1.0)}, {"eps": 0}]
)
def test_meaningless_settings_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
