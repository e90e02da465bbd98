"""Mamba-3: the layer against its published formula, its states and initial values, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mambakit.layers.mamba3 import Mamba3, Mamba3Config, heavy_tail
from mambakit.layers.mixer import Context

SMALL = {"d_state": 8, "headdim": 4}
VARIANTS = {
    "siso": Mamba3Config(**SMALL),
    "siso-all-rotate": Mamba3Config(**SMALL, rope_fraction=1.0, ngroups=2),
    "siso-norm-heavy-tail": Mamba3Config(**SMALL, is_outproj_norm=True, a_activation="heavy_tail"),
    "siso-halves": Mamba3Config(**SMALL, rope_layout="half", A_floor=0.5),
    "mimo": Mamba3Config(**SMALL, mimo_rank=3),
    "mimo-norm": Mamba3Config(**SMALL, mimo_rank=2, ngroups=4, is_outproj_norm=True),
    "mimo-all-rotate": Mamba3Config(**SMALL, mimo_rank=2, rope_fraction=1.0),
    "mimo-rank-one": Mamba3Config(**SMALL, mimo_rank=1, rope_layout="interleaved"),
}
ODD = Mamba3Config(d_state=7, headdim=4, rope_layout="half")


@pytest.fixture(params=VARIANTS)
def layer(request):
    """A layer of 16 channels, 8 heads, with every parameter away from its initial value."""
    torch.manual_seed(0)
    made = Mamba3(16, VARIANTS[request.param], dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def rms(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def published(layer, u):
    """The formula of the published implementation, one sequence, token and head at a time."""
    config, w = layer.config, {k: v.detach() for k, v in layer.named_parameters()}
    n, p, g, r, s, heads = config.d_state, config.headdim, config.ngroups, config.rank, config.angles, 8
    mimo = config.mimo_rank is not None
    halves = config.rope_layout == "half" or (mimo and config.rope_layout == "auto")
    rows = torch.split(u @ w["in_proj.weight"].T, [32, 32, n * g * r, n * g * r, heads, heads, heads, s], -1)
    out = []
    h, theta = torch.zeros(heads, p, n, dtype=u.dtype), torch.zeros(heads, s, dtype=u.dtype)
    last = torch.zeros(heads, p, n, dtype=u.dtype)
    for z, x, B, C, dd_dt, dd_A, trap, angles in zip(*rows, strict=True):
        token = torch.zeros(heads, p, dtype=u.dtype)
        for i in range(heads):
            dt = math.log1p(math.exp(dd_dt[i] + w["dt_bias"][i]))
            a = dd_A[i].item()
            rate = (
                math.log1p(math.exp(a))
                if config.a_activation == "softplus"
                else 1 + a
                if a >= 0
                else 1 / (1 - a)
            )
            decay, share = math.exp(-max(rate, config.A_floor) * dt), 1 / (1 + math.exp(-trap[i]))
            theta[i] += math.pi * torch.tanh(angles) * dt

            def turned(vectors, name, i=i):
                v = rms(vectors.view(r, g, n)[:, i // (heads // g)]) * w[f"{name}_norm.weight"]
                v = v + w[f"{name}_bias"][i]
                y = v.clone()
                for pair in range(s):
                    one, two = (pair, pair + n // 2) if halves else (2 * pair, 2 * pair + 1)
                    cos, sin = math.cos(theta[i, pair]), math.sin(theta[i, pair])
                    y[:, one] = v[:, one] * cos - v[:, two] * sin
                    y[:, two] = v[:, one] * sin + v[:, two] * cos
                return y

            key, query = turned(B, "B"), turned(C, "C")
            x_i, z_i = x.view(heads, p)[i], z.view(heads, p)[i]
            x_r = x_i * w["mimo_x"][i] if mimo else x_i[None]
            z_r = z_i * w["mimo_z"][i] if mimo else z_i[None]
            now = sum(torch.outer(x_r[k], key[k]) for k in range(r))
            h[i] = decay * h[i] + (1 - share) * dt * decay * last[i] + share * dt * now
            last[i] = now
            for k in range(r):
                y = h[i] @ query[k] + w["D"][i] * x_r[k]
                if config.is_outproj_norm:
                    y = rms(y) * w["norm.weight"].view(heads, p)[i]
                y = y * z_r[k] / (1 + torch.exp(-z_r[k]))
                token[i] += y * w["mimo_o"][i, k] if mimo else y
        out.append(token.flatten() @ w["out_proj.weight"].T)
    return torch.stack(out)


def test_the_layer_is_the_published_formula(layer):
    u = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        found = layer(u)
    expected = torch.stack([published(layer, row) for row in u])
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_token_by_token_is_the_whole(layer):
    u = torch.randn(2, 70, 16, dtype=torch.float64)
    state = layer.init_state(2)
    with torch.no_grad():
        pieces = [layer(u[:, :60], state)] + [layer(u[:, t : t + 1], state) for t in range(60, 70)]
        torch.testing.assert_close(torch.cat(pieces, 1), layer(u), rtol=1e-11, atol=1e-11)


def test_documents_do_not_meet(layer):
    u, document = torch.randn(1, 30, 16, dtype=torch.float64), torch.tensor([[0] * 13 + [1] * 17])
    with torch.no_grad():
        packed = layer(u, None, Context(seq_idx=document))
        torch.testing.assert_close(packed[:, 13:], layer(u[:, 13:]), rtol=1e-11, atol=1e-11)
        u[:, :13] += 1
        assert torch.equal(layer(u, None, Context(seq_idx=document))[:, 13:], packed[:, 13:])


def test_initial_values():
    torch.manual_seed(0)
    layer = Mamba3(512, Mamba3Config(mimo_rank=4))
    dt = F.softplus(layer.dt_bias)
    assert layer.in_proj.out_features == 2 * 1024 + 2 * 4 * 128 + 3 * 16 + 32
    assert dt.min() >= 0.001 * 0.999
    assert dt.max() <= 0.1 * 1.001
    for name, value in {
        "B_bias": 1,
        "C_bias": 1,
        "D": 1,
        "mimo_x": 0.25,
        "mimo_z": 1,
        "mimo_o": 0.25,
    }.items():
        assert (getattr(layer, name) == value).all(), name
    assert layer.mimo_x.shape == (16, 4, 64)


@pytest.mark.parametrize("config", [Mamba3Config(), Mamba3Config(mimo_rank=2, is_outproj_norm=True)])
def test_reset_reaches_every_parameter_and_the_recurrence_is_float32(config):
    layer = Mamba3(64, config, dtype=torch.bfloat16)
    names = {"dt_bias", "B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o"}
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16), name
    assert {tensor.dtype for _, tensor in layer.init_state(2).tensors()} == {torch.float32}
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_heavy_tail_is_smooth_and_positive():
    x = torch.tensor([-1e30, -4.0, -1.0, 0.0, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    y = heavy_tail(x)
    torch.testing.assert_close(y.detach()[1:], torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope[1:], torch.tensor([0.04, 0.25, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert y[0] > 0 and slope.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba3Config(d_state=0), "d_state=0"),
        (lambda: Mamba3Config(d_state=3), "d_state=3 has no pair"),
        (lambda: Mamba3Config(rope_fraction=0.3), "rope_fraction=0.3"),
        (lambda: Mamba3Config(rope_layout="halves"), "unknown rope_layout 'halves'; did you mean 'half'"),
        (lambda: Mamba3Config(a_activation="heavytail"), "did you mean 'heavy_tail'"),
        (lambda: Mamba3Config(mimo_rank=0), "mimo_rank=0"),
        (lambda: Mamba3Config(A_floor=0.0), r"A_floor=0\.0"),
        (lambda: Mamba3Config(dt_min=0.2), "dt_min=0.2"),
        (lambda: Mamba3(100), "inner channels"),
        (lambda: Mamba3(64, Mamba3Config(ngroups=3)), "ngroups=3"),
        (
            lambda: Mamba3(6, Mamba3Config(d_state=7, rope_layout="half", headdim=4))(torch.randn(1, 2, 6)),
            "halves",
        ),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
