"""Norm layers: their formulas, parameter names, types and initial values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mambakit.layers.norm import GatedRMSNorm, LayerNorm, RMSNorm


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_formulas():
    torch.manual_seed(0)
    x, z = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    rms = randomised(RMSNorm(8, eps=1e-3, dtype=torch.float64))
    unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(rms(x), unit * rms.weight)
    layer = randomised(LayerNorm(8, eps=1e-3, dtype=torch.float64))
    twin = nn.LayerNorm(8, eps=1e-3, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), twin(x))
    gated = randomised(GatedRMSNorm(8, eps=1e-3, group_size=4, dtype=torch.float64))
    u = (x * F.silu(z)).unflatten(-1, (2, 4))
    u = u / (u.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(gated(x, z), u.flatten(-2) * gated.weight)
    late = GatedRMSNorm(8, eps=1e-3, norm_before_gate=True, dtype=torch.float64)
    torch.testing.assert_close(late(x, z), unit * F.silu(z))


def test_narrow_activations_meet_wide_parameters():
    x = torch.randn(4, 8).bfloat16()
    for layer in (RMSNorm(8), LayerNorm(8)):
        assert layer(x).dtype == torch.bfloat16
    assert GatedRMSNorm(8)(x, x.float()).dtype == torch.bfloat16
    assert RMSNorm(8, dtype=torch.bfloat16)(x.float()).dtype == torch.float32


def test_names_and_reset():
    assert set(RMSNorm(4).state_dict()) == set(GatedRMSNorm(4).state_dict()) == {"weight"}
    assert set(LayerNorm(4).state_dict()) == {"weight", "bias"}
    assert set(LayerNorm(4, bias=False).state_dict()) == {"weight"}
    for layer in (RMSNorm(4), LayerNorm(4), GatedRMSNorm(4)):
        fresh = {name: value.clone() for name, value in layer.state_dict().items()}
        randomised(layer).reset_parameters()
        assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())
        assert torch.equal(layer.weight, torch.ones(4))


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="group_size=3, expected a divisor of the 8 channels"):
        GatedRMSNorm(8, group_size=3)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_sum_and_its_norm(kind):
    layer = randomised(kind(8, dtype=torch.float64))
    x, stream = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    normed, total = layer.add(x, stream)
    torch.testing.assert_close(total, x + stream, rtol=0, atol=1e-15)
    torch.testing.assert_close(normed, layer(x + stream), rtol=0, atol=1e-12)
