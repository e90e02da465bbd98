"""The mixture of experts against a loop over tokens, and what keeps the load even."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers import Context, MoEConfig
from mambakit.layers.mlp import ACTIVATIONS
from mambakit.layers.moe import ExpertLinear, balance_loss, sinkhorn

SETTINGS = {
    "plain": {},
    "normalised": {"normalise": True, "weight_scale": 2.5, "top_k": 3},
    "sigmoid": {"score": "sigmoid", "balance": "bias", "normalise": True},
    "top1": {
        "score": "sigmoid",
        "balance": "sinkhorn",
        "top_k": 1,
        "router_bias": True,
        "activation": "gelu",
    },
    "shared": {"d_shared": 12},
    "ungated": {"gated": False, "activation": "relu2"},
}


def moe(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = MoEConfig(**{"n_experts": 5, "top_k": 2, "d_hidden": 7, **settings}).build(
        16, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if layer.config.balance == "bias":
            layer.choice_bias.copy_(0.3 * torch.randn(5))
    return layer.to(dtype).eval()


def one_by_one(layer, x):
    """Every token and every expert by itself."""
    config, act = layer.config, ACTIVATIONS[layer.config.activation]
    out = []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token + (0 if layer.router.bias is None else layer.router.bias)
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        preferred = scores + layer.choice_bias if config.balance == "bias" else scores
        chosen = preferred.argsort(descending=True)[: config.top_k]
        weights = scores[chosen]
        weights = config.weight_scale * (weights / weights.sum() if config.normalise else weights)
        y = torch.zeros_like(token)
        for weight, e in zip(weights, chosen, strict=True):
            hidden = layer.in_proj.weight[e] @ token
            if config.gated:
                value, gate = hidden.chunk(2)
                hidden = value * act(gate)
            else:
                hidden = act(hidden)
            y = y + weight * (layer.out_proj.weight[e] @ hidden)
        out.append(y)
    y = torch.stack(out).view_as(x)
    return y if layer.shared is None else y + layer.shared(x)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_a_loop(name):
    layer = moe(**SETTINGS[name])
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    mark = torch.randn(2, 9, 16, dtype=torch.float64)
    parameters = list(layer.parameters())
    found, expected = layer(x), one_by_one(layer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((y * mark).sum(), [x, *parameters]) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_an_expert_without_tokens_costs_nothing_and_breaks_nothing():
    layer = ExpertLinear(4, 6, 3)
    x, counts = torch.randn(5, 6), torch.tensor([0, 5, 0, 0])
    y = layer(x, counts)
    torch.testing.assert_close(y, x @ layer.weight[1].T)
    y.sum().backward()
    assert layer.weight.grad[[0, 2, 3]].abs().max() == 0 < layer.weight.grad[1].abs().min()


def test_half_precision_and_autocast_are_near():
    x = torch.randn(2, 9, 16)
    exact = moe(torch.float64, d_shared=12)(x.double())
    half = moe(torch.bfloat16, d_shared=12)
    assert (half(x.bfloat16()).double() - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = moe(torch.float32, d_shared=12)(x)
    assert (mixed.double() - exact).norm() < 0.05 * exact.norm()


def test_the_balance_loss_is_least_where_the_load_is_even():
    chosen = torch.arange(12).view(6, 2) % 4
    even = torch.full((6, 4), 0.25, requires_grad=True)
    assert balance_loss(even, chosen).item() == pytest.approx(1.0)
    alone = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert balance_loss(alone, torch.zeros(6, 2, dtype=torch.int64)).item() == pytest.approx(4.0)


def test_losses_are_handed_over_in_training_only():
    layer, context, x = moe(balance_loss=0.5), Context(), torch.randn(2, 9, 16, dtype=torch.float64)
    layer(x, None, context)
    assert context.losses == []
    layer.train()
    layer(x, None, context)
    [loss] = context.losses
    scores = (x.flatten(0, 1) @ layer.router.weight.T).softmax(-1)
    assert loss.item() == pytest.approx(0.5 * balance_loss(scores, layer.route(x.flatten(0, 1))[1]).item())
    loss.backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_sinkhorn_shares_tokens_evenly_where_all_prefer_one_expert():
    torch.manual_seed(0)
    logits = torch.randn(64, 4, dtype=torch.float64)
    logits[:, 0] += 3
    plain = torch.bincount(logits.argmax(1), minlength=4)
    spread = sinkhorn(logits)
    torch.testing.assert_close(spread.sum(0), torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        spread.sum(1), torch.full((64,), 1 / 64, dtype=torch.float64), rtol=1e-2, atol=0
    )
    assert plain.max() > 50 and torch.bincount(spread.argmax(1), minlength=4).max() < 24


def test_sinkhorn_chooses_in_training_only():
    layer = moe(**SETTINGS["top1"])
    with torch.no_grad():
        layer.router.bias[2] += 5
    rows = torch.randn(40, 16, dtype=torch.float64)
    assert torch.bincount(layer.route(rows)[1].flatten(), minlength=5)[2] >= 38
    assert torch.bincount(layer.train().route(rows)[1].flatten(), minlength=5)[2] < 20


def test_the_bias_follows_the_load_in_training_only():
    layer = moe(score="sigmoid", balance="bias", top_k=1, balance_rate=0.05)
    rows = torch.randn(200, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight[3] += 3 * rows.mean(0) / rows.mean(0).norm()
        layer.choice_bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]))
    before = layer.choice_bias.clone()
    assert torch.bincount(layer.route(rows)[1].flatten(), minlength=5)[2] == 200
    assert torch.equal(layer.choice_bias, before)
    layer.train()
    for _ in range(100):
        layer.route(rows)
    assert torch.bincount(layer.eval().route(rows)[1].flatten(), minlength=5).max() < 60


def test_experts_come_from_the_best_groups():
    layer = moe(n_experts=6, n_groups=3, top_groups=1, score="sigmoid")
    rows = torch.randn(50, 16, dtype=torch.float64)
    chosen = layer.route(rows)[1]
    scores = (rows @ layer.router.weight.T).sigmoid()
    best = scores.unflatten(-1, (3, 2)).sum(-1).argmax(-1)
    assert torch.equal(chosen // 2, best[:, None].expand(-1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_groups": 3}, "n_groups=3"),
        ({"top_k": 9}, "top_k=9, expected at most n_experts=8"),
        ({"balance": "sinkhorn"}, "top_k=2, expected 1"),
        ({"activation": "silo"}, "did you mean 'silu'"),
        ({"score": "softmin"}, "did you mean 'softmax'"),
        ({"d_hidden": 0}, "d_hidden"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)
