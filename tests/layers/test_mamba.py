"""Mamba-1, Mamba-2 and the signed variant: initial values as published, and sizes that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mambakit.layers.mamba1 import Mamba1, Mamba1Config
from mambakit.layers.mamba2 import Mamba2, Mamba2Config
from mambakit.layers.signed_mamba1 import SignedMamba1, SignedMamba1Config


def test_mamba1_initial_values():
    torch.manual_seed(0)
    mixer = Mamba1(512)
    dt = F.softplus(mixer.ssm.dt_bias)
    assert 0.001 * 0.999 <= dt.min() < 0.002
    assert 0.05 < dt.max() <= 0.1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.15)
    assert torch.allclose(mixer.ssm.A_log.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    assert torch.equal(mixer.ssm.D, torch.ones(1024))
    assert mixer.ssm.dt_proj.in_features == 32
    assert mixer.ssm.dt_proj.weight.abs().max() <= 32**-0.5


def test_mamba2_initial_values():
    torch.manual_seed(0)
    mixer = Mamba2(1024)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert A.shape == (32,)
    assert A.min() >= 1
    assert A.max() <= 16
    assert dt.min() >= 0.001 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert mixer.in_proj.out_features == 2 * 2048 + 2 * 128 + 32


@pytest.mark.parametrize("mixer", [Mamba1, Mamba2, SignedMamba1])
def test_scalars_stay_float32_in_a_bfloat16_layer(mixer):
    layer = mixer(64, dtype=torch.bfloat16)
    scalars = {n: p for n, p in layer.named_parameters() if n.rpartition(".")[2] in ("A_log", "D", "dt_bias")}
    assert len(scalars) == 3
    assert all(p.dtype == torch.float32 for p in scalars.values())
    assert layer.init_state(2)["ssm"].dtype == torch.float32
    assert layer(torch.randn(2, 5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("mixer", [Mamba1, Mamba2, SignedMamba1])
def test_reset_parameters_reaches_every_parameter(mixer):
    layer = mixer(64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_signed_transition_reaches_below_zero():
    """With a large step the state flips its sign instead of fading."""
    torch.manual_seed(0)
    layer = SignedMamba1(4, SignedMamba1Config(d_state=1, expand=1)).double()
    with torch.no_grad():
        layer.ssm.dt_bias.fill_(50.0)
        x = torch.zeros(1, 2, 4, dtype=torch.float64)
        state = layer.init_state(1)
        state["ssm"].fill_(1.0)
        layer.ssm(x, None, state["ssm"])
    assert torch.allclose(state["ssm"], torch.ones_like(state["ssm"]))  # two flips
    with torch.no_grad():
        layer.ssm(x[:, :1], None, state["ssm"])
    assert torch.allclose(state["ssm"], -torch.ones_like(state["ssm"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba1Config(d_state=0), "d_state=0"),
        (lambda: Mamba1Config(dt_min=0.2), "dt_min=0.2"),
        (lambda: Mamba2(100), "inner channels"),
        (lambda: Mamba2(64, Mamba2Config(ngroups=3)), "ngroups=3"),
        (lambda: Mamba2Config(A_init_range=(0.0, 1.0)), "A_init_range"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
