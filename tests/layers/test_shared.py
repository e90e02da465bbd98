"""A block that several depths share, and Mamba-1 in heads."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mambakit.layers import AttentionConfig, GatedMLPConfig, Mamba1Config, Mamba2Config, MultiHeadMamba1Config
from mambakit.layers.mixer import Context
from mambakit.layers.shared import ADAPTED, SharedConfig
from mambakit.models import Backbone, BackboneConfig

INNER = Mamba2Config(d_state=6, headdim=8)
SETTINGS = {
    "attention": AttentionConfig(n_heads=4, n_kv_heads=2, rope=None, scale=0.3),
    "mlp": GatedMLPConfig(d_hidden=24, activation="gelu"),
    "inner": INNER,
    "rank": 3,
}


def backbone(pattern="MAMBA", **settings):
    """A backbone in float64 with every parameter away from its initial value."""
    torch.manual_seed(0)
    made = {**SETTINGS, "adapted": ADAPTED, **settings}
    mixers = {"M": INNER, **{name.upper(): SharedConfig(**{**made, "name": name}) for name in "ab"}}
    found = Backbone(BackboneConfig(d_model=16, pattern=pattern, mixers=mixers), dtype=torch.float64)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def written_down(model, x):
    """The backbone once more: `x + mamba(norm(x + linear(shared([x, first]))))` where a block is shared."""
    first, length = x, x.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril()
    for block in model.blocks:
        if block.norm is not None:
            x = x + block.mixer(rms(x, block.norm.weight))
            continue
        use, shared = block.mixer, model.shared[block.mixer.config.name]

        def project(u, name, weight, use=use):
            adapter = use.adapters[name]
            return u @ weight.T + u @ adapter.down.weight.T @ adapter.up.weight.T

        u = rms(torch.cat([x, first], -1), shared.norm.weight)
        q, k, v = (project(u, f"{n}_proj", getattr(shared.attention, f"{n}_proj").weight) for n in "qkv")
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = (0.3 * q @ k.mT).masked_fill(~past, -math.inf).softmax(-1)
        u = (scores @ v).transpose(1, 2).flatten(-2) @ shared.attention.out_proj.weight.T
        value, gate = project(rms(u, shared.mlp_norm.weight), "in_proj", shared.mlp.in_proj.weight).chunk(
            2, -1
        )
        heard = (value * F.gelu(gate)) @ shared.mlp.out_proj.weight.T @ use.linear.weight.T
        x = x + use.mixer(rms(x + heard, use.norm.weight))
    return rms(x, model.norm_f.weight)


def activations(length=9):
    return torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_backbone_with_shared_blocks_is_its_formula():
    model, x = backbone(), activations()
    torch.testing.assert_close(model(x), written_down(model, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_every_use_has_a_state_of_its_own():
    model, x = backbone(), activations(11)
    state = model.init_state(2)
    found = torch.cat([model(piece, state) for piece in x.split([6, 1, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(found, model(x), rtol=0, atol=1e-12)
    assert not torch.equal(state["1"]["shared"]["k"], state["4"]["shared"]["k"])


def test_shared_weights_exist_once_and_learn_from_all_uses():
    model = backbone("AMA", adapted=())
    names = [name for name, _ in model.named_parameters()]
    assert sum("q_proj" in name for name in names) == 1 and len(names) == len(model.state_dict())
    apart = backbone("AMB", adapted=())
    weights = model.state_dict()
    apart.load_state_dict(weights | {k.replace(".a.", ".b."): v for k, v in weights.items() if ".a." in k})
    for one in (model, apart):
        one(activations()).square().sum().backward()
    first, second = (dict(apart.shared[name].named_parameters()) for name in "ab")
    for name, parameter in model.shared["a"].named_parameters():
        both = first[name].grad + second[name].grad
        torch.testing.assert_close(parameter.grad, both, rtol=0, atol=1e-11)


@torch.no_grad()
def test_copies_share_among_themselves():
    model, x = backbone("MAMA"), activations()
    other = copy.deepcopy(model)
    other.shared["a"].mlp.out_proj.weight.mul_(2)
    assert other.blocks[1].mixer._shared[0] is other.shared["a"]
    assert not torch.allclose(other(x), model(x))
    torch.testing.assert_close(other(x), written_down(other, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_fresh_adapters_add_nothing():
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, pattern="A", mixers={"A": SharedConfig(**SETTINGS, adapted=ADAPTED)})
    model, x = Backbone(config, dtype=torch.float64), activations()
    expected = model(x)
    for adapter in model.blocks[0].mixer.adapters.values():
        adapter.down.weight.normal_()
    assert torch.equal(model(x), expected)
    model.shared["a"].attention.q_proj.weight.zero_()
    model.reset_parameters()
    assert model.shared["a"].attention.q_proj.weight.abs().max() > 0


def test_recomputed_blocks_have_the_same_gradients():
    model, x = backbone(), activations().requires_grad_()
    parameters = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    model.checkpoint_blocks = True
    for a, b in zip(torch.autograd.grad(model(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs a Backbone"):
        SharedConfig(**SETTINGS).build(16)(torch.randn(1, 2, 16))
    mixers = {"A": SharedConfig(**SETTINGS), "B": SharedConfig(**{**SETTINGS, "norm_eps": 0.1})}
    with pytest.raises(ValueError, match="shared block 'a' has several settings"):
        Backbone(BackboneConfig(d_model=16, pattern="AB", mixers=mixers))
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        SharedConfig(**SETTINGS, adapted=("q_prj",))
    with pytest.raises(ValueError, match="name='a b'"):
        SharedConfig(**SETTINGS, name="a b")
    with pytest.raises(ValueError, match="expected a AttentionConfig"):
        SharedConfig(**{**SETTINGS, "attention": INNER})


def test_settings_from_text():
    config = BackboneConfig(d_model=16, pattern="MA", mixers={"M": INNER, "A": SharedConfig(**SETTINGS)})
    from mambakit.config import to_dict

    assert BackboneConfig.from_dict(to_dict(config)) == config


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_are_narrow_mamba1s_side_by_side(heads):
    torch.manual_seed(0)
    settings = {"d_state": 5, "dt_rank": 3}
    wide = MultiHeadMamba1Config(**settings, n_heads=heads).build(16, dtype=torch.float64)
    for parameter in wide.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, channels = activations(), 32 // heads
    stream, gate = wide.in_proj(x).chunk(2, dim=-1)
    stream, found = wide.conv1d(stream), []
    for n in range(heads):
        part = slice(n * channels, (n + 1) * channels)
        narrow = Mamba1Config(**settings, expand=channels / 16).build(16, dtype=torch.float64).ssm
        narrow.x_proj.weight.copy_(wide.ssm.x_proj.weight[n])
        narrow.dt_proj.weight.copy_(wide.ssm.dt_proj.weight[n])
        for name in ("dt_bias", "A_log", "D"):
            getattr(narrow, name).copy_(getattr(wide.ssm, name)[part])
        found.append(narrow(stream[..., part].contiguous(), gate[..., part].contiguous()))
    expected = nn.functional.linear(torch.cat(found, -1), wide.out_proj.weight)
    torch.testing.assert_close(wide(x), expected, rtol=0, atol=1e-12)
    state = wide.init_state(2)
    pieces = torch.cat([wide(piece, state) for piece in x.split([4, 1, 4], dim=1)], dim=1)
    torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-12)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="n_heads=3, expected a divisor of the 32"):
        MultiHeadMamba1Config(n_heads=3).build(16)
    with pytest.raises(ValueError, match="heads have no inner norms"):
        MultiHeadMamba1Config(inner_norm="plain")
    assert Context().first is None
