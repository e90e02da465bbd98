"""The gated MLP: formula, sizes, names and settings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambakit.config import ConfigError, to_dict
from mambakit.layers.mixer import Context, MixerConfig
from mambakit.layers.mlp import GatedMLP, GatedMLPConfig, MLPConfig


@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", lambda g: g * torch.sigmoid(g)), ("gelu", F.gelu), ("relu2", lambda g: g.clamp(min=0) ** 2)],
)
def test_formula(activation, function):
    mlp = GatedMLP(6, GatedMLPConfig(d_hidden=5, activation=activation, bias=True), dtype=torch.float64)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    value = x @ mlp.in_proj.weight[:5].T + mlp.in_proj.bias[:5]
    gate = x @ mlp.in_proj.weight[5:].T + mlp.in_proj.bias[5:]
    expected = (value * function(gate)) @ mlp.out_proj.weight.T + mlp.out_proj.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    ("activation", "function"), [("relu2", lambda x: x.clamp(min=0) ** 2), ("gelu", F.gelu)]
)
def test_formula_without_a_gate(activation, function):
    mlp = MLPConfig(d_hidden=5, activation=activation, bias=True, out_scale=0.5).build(6, dtype=torch.float64)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = function(x @ mlp.in_proj.weight.T + mlp.in_proj.bias)
    torch.testing.assert_close(mlp(x), 0.5 * (hidden @ mlp.out_proj.weight.T + mlp.out_proj.bias))
    with pytest.raises(ValueError, match="gate_scale=2, expected 1"):
        MLPConfig(gate_scale=2)


def test_sizes():
    assert GatedMLPConfig().hidden(768) == 2048
    assert GatedMLPConfig().hidden(96) == 256
    assert GatedMLPConfig(expand=2, multiple_of=1).hidden(33) == 66
    assert GatedMLPConfig(expand=2, multiple_of=64).hidden(33) == 128
    assert GatedMLPConfig(d_hidden=100).hidden(768) == 100


def test_parameters():
    mlp = GatedMLPConfig(d_hidden=4, bias=True).build(3)
    assert isinstance(mlp, GatedMLP)
    shapes = {name: tuple(value.shape) for name, value in mlp.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (8, 3),
        "in_proj.bias": (8,),
        "out_proj.weight": (3, 4),
        "out_proj.bias": (3,),
    }
    assert mlp.in_proj.bias.abs().sum() == mlp.out_proj.bias.abs().sum() == 0
    before = mlp.in_proj.weight.clone()
    torch.nn.init.ones_(mlp.out_proj.bias)
    mlp.reset_parameters()
    assert mlp.out_proj.bias.abs().sum() == 0 and not torch.equal(mlp.in_proj.weight, before)
    # kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
    assert mlp.in_proj.weight.abs().max() <= 3**-0.5 and mlp.out_proj.weight.abs().max() <= 4**-0.5
    assert set(GatedMLP(3).state_dict()) == {"in_proj.weight", "out_proj.weight"}


def test_has_no_state_and_mixes_no_tokens():
    mlp = GatedMLP(4)
    x = torch.randn(2, 5, 4)
    state = mlp.init_state(2)
    assert len(state) == 0 and state.nbytes == 0
    context = Context(seq_idx=torch.zeros(2, 5, dtype=torch.int64))
    torch.testing.assert_close(mlp(x, state, context)[:, 3:], mlp(x[:, 3:]))


def test_settings_from_text():
    assert GatedMLPConfig.from_dict({"d_hidden": 64}) == GatedMLPConfig(d_hidden=64)
    assert to_dict(GatedMLPConfig())["type"] == "mlp"
    assert MixerConfig.members["mlp"] is GatedMLPConfig
    with pytest.raises(ConfigError, match="did you mean 'relu2'"):
        GatedMLPConfig.from_dict({"activation": "relu"})
    with pytest.raises(ConfigError, match="did you mean 'd_hidden'"):
        GatedMLPConfig.from_dict({"d_hiden": 64})
    with pytest.raises(ValueError, match="d_hidden=0"):
        GatedMLPConfig(d_hidden=0)
