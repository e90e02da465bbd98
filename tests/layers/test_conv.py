"""The convolution layer: interchangeable with a depthwise `nn.Conv1d`, and its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mambakit.layers.conv import CausalConv1d


@pytest.mark.parametrize("bias", [True, False])
def test_loads_a_conv1d_checkpoint(bias):
    published = nn.Conv1d(6, 6, 4, groups=6, padding=3, bias=bias, dtype=torch.float64)
    layer = CausalConv1d(6, 4, bias=bias, dtype=torch.float64)
    layer.load_state_dict(published.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = F.silu(published(x.transpose(1, 2))[..., :9]).transpose(1, 2)
    torch.testing.assert_close(layer(x), expected)
    layer.activation = None
    torch.testing.assert_close(layer(x), published(x.transpose(1, 2))[..., :9].transpose(1, 2))


def test_initial_values_are_those_of_conv1d():
    torch.manual_seed(0)
    layer, published = CausalConv1d(4000, 4), nn.Conv1d(4000, 4000, 4, groups=4000)
    for ours, theirs in zip(layer.parameters(), published.parameters(), strict=True):
        bound = 1 / math.sqrt(4)
        assert ours.shape == theirs.shape
        assert ours.abs().max() <= bound and ours.abs().max() > 0.99 * bound
        assert abs(ours.std() - theirs.std()) < 0.02 * bound


def test_pieces_are_the_whole_and_documents_are_apart():
    layer = CausalConv1d(3, 4, dtype=torch.float64)
    x = torch.randn(2, 10, 3, dtype=torch.float64)
    whole = layer(x)
    state = torch.zeros(2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        pieces = [layer(piece, state=state) for piece in x.split([1, 4, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, x[:, -3:])
    packed = layer(x, seq_idx=torch.tensor([[0] * 4 + [1] * 6] * 2))
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1))


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="width=0"):
        CausalConv1d(3, 0)
