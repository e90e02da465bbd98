"""What mamba_ssm 2.3.2 gets wrong or leaves out, and what is right here. It is not needed for these tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mambakit import Context, ops
from mambakit.layers import AttentionConfig, GatedMLPConfig, Mamba1Config, Mamba2Config, Mamba3Config
from mambakit.models import Backbone, BackboneConfig

MIXERS = {
    "mamba1": Mamba1Config(d_state=5),
    "mamba2": Mamba2Config(d_state=6, headdim=8, ngroups=2),
    "mamba2-limited": Mamba2Config(d_state=6, headdim=8, dt_limit=(0.02, 0.05)),
    "mamba3": Mamba3Config(d_state=8, headdim=8, ngroups=2),
    "attention-conv": AttentionConfig(n_heads=4, n_kv_heads=2, d_conv=4, rope=None),
    "mamba3-mimo": Mamba3Config(d_state=8, headdim=8, ngroups=2, mimo_rank=2),
}


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    made = MIXERS[request.param].build(32, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("with_D", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dt_bias_and_D_may_be_absent(with_bias, with_D):
    """Theirs: `selective_state_update` fails without either, though its defaults are None."""
    torch.manual_seed(0)
    x, dt, A, B, C = draw(1, 1, 4), draw(1, 1, 4), -draw(4, 3).exp(), draw(1, 1, 1, 3), draw(1, 1, 1, 3)
    D, bias, state = draw(4) if with_D else None, draw(4) if with_bias else None, draw(1, 4, 3)
    step = F.softplus(dt[0, 0] + (0 if bias is None else bias))
    h = torch.exp(step[:, None] * A) * state[0] + (step * x[0, 0])[:, None] * B[0, 0]
    expected = h @ C[0, 0, 0] + (0 if D is None else D * x[0, 0])
    y, _ = ops.selective_scan(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, state=state)
    torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[0], h, rtol=0, atol=1e-12)

    x, dt, A, state = draw(1, 1, 2, 4), draw(1, 1, 2), -draw(2).exp(), draw(1, 2, 4, 3)
    D, bias = draw(2) if with_D else None, draw(2) if with_bias else None
    step = F.softplus(dt[0, 0] + (0 if bias is None else bias))
    h = torch.exp(step * A)[:, None, None] * state[0]
    h = h + (step[:, None] * x[0, 0])[..., None] * B[0, 0]
    expected = (h * C[0, 0, 0]).sum(-1) + (0 if D is None else D[:, None] * x[0, 0])
    y, _ = ops.ssd(x, dt, A, B, C, D, bias, dt_softplus=True, state=state)
    torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[0], h, rtol=0, atol=1e-12)


def test_documents_of_a_row_never_meet(mixer):
    """Theirs: Mamba-1 has no such argument, Mamba-2 ignores `cu_seqlens` in training, Mamba-3 `seq_idx`."""
    torch.manual_seed(1)
    x, number = draw(1, 20, 32), torch.tensor([[0] * 7 + [1] * 13])
    found = mixer(x, None, Context(seq_idx=number))
    torch.testing.assert_close(found[:, 7:], mixer(x[:, 7:]), rtol=0, atol=1e-10)
    other = torch.cat([x[:, :7] * 5, x[:, 7:]], dim=1)
    assert torch.equal(mixer(other, None, Context(seq_idx=number))[:, 7:], found[:, 7:])


def test_a_step_is_what_the_whole_does(mixer):
    """Theirs: `Mamba2.step` ignores `dt_limit`, `Mamba3.step` fails between one group and one per head.

    After a prefill their attention keeps what its convolution gave, where it needs what the convolution saw.
    """
    torch.manual_seed(1)
    x, state = draw(2, 12, 32), mixer.init_state(2)
    sizes = [5, *[1] * 7]
    found = torch.cat([mixer(piece, state) for piece in x.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(found, mixer(x), rtol=0, atol=1e-10)


def test_branches_are_scaled_for_all_of_them():
    """Theirs: with an MLP after every mixer there are twice as many branches, and the scale is for half."""
    torch.manual_seed(0)
    layers, width = 8, 64
    config = BackboneConfig(
        d_model=width,
        pattern=f"{layers}(M-)",
        mixers={"M": Mamba2Config(d_state=8, headdim=16), "-": GatedMLPConfig(d_hidden=128)},
    )
    for block in Backbone(config).blocks:
        weight = block.mixer.out_proj.weight  # uniform within 1 / sqrt(fan in) before
        expected = 1 / math.sqrt(3 * weight.shape[1]) / math.sqrt(2 * layers)
        assert weight.std().item() == pytest.approx(expected, rel=0.03)


def test_states_are_float32_in_a_model_of_bf16():
    """Theirs: the states of Mamba-1 and Mamba-2 are kept in the model's type."""
    states = [config.build(32, dtype=torch.bfloat16).init_state(1) for config in MIXERS.values()]
    assert {state["ssm"].dtype for state in states if "ssm" in state} == {torch.float32}
