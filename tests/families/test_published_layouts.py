"""Families that transformers does not have, held to their layers written down once more.

The first half are those layers, from the papers and the published names, token by token and slowly; nothing
of the package is used in them.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

import mambakit
from mambakit.checkpoints import open_tensors
from mambakit.families.mamba_ssm import Mamba1JSON, Mamba2JSON, Mamba3JSON
from mambakit.models import LanguageModel
from mambakit.testing.toys import TOYS


def rms(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def convolved(x, weight, bias):
    """Every channel of `(l, d)` with the taps of `(d, 1, w)` over itself and its past."""
    width, out = weight.shape[-1], []
    for t in range(len(x)):
        past = [
            x[t - width + 1 + k] if t - width + 1 + k >= 0 else torch.zeros_like(x[0]) for k in range(width)
        ]
        out.append(bias + sum(weight[:, 0, k] * past[k] for k in range(width)))
    return torch.stack(out)


def mamba1(p, x):
    """A Mamba-1 layer on `(l, d_model)`; `p` maps the names of its tensors."""
    stream, gate = (x @ p["in_proj.weight"].T).chunk(2, dim=-1)
    stream = F.silu(convolved(stream, p["conv1d.weight"], p["conv1d.bias"]))
    A = -torch.exp(p["A_log"])
    rank, states = p["dt_proj.weight"].shape[1], A.shape[1]
    h, out = torch.zeros_like(A), []
    for u, z in zip(stream, gate, strict=True):
        dt, B, C = (p["x_proj.weight"] @ u).split([rank, states, states])
        dt = F.softplus(p["dt_proj.weight"] @ dt + p["dt_proj.bias"])
        h = torch.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
        out.append((h @ C + p["D"] * u) * F.silu(z))
    return torch.stack(out) @ p["out_proj.weight"].T


def mamba2(p, x, headdim, states, groups):
    """A Mamba-2 layer on `(l, d_model)`."""
    inner, heads = p["out_proj.weight"].shape[1], len(p["A_log"])
    z, xBC, dt = (x @ p["in_proj.weight"].T).split([inner, inner + 2 * groups * states, heads], dim=-1)
    xBC = F.silu(convolved(xBC, p["conv1d.weight"], p["conv1d.bias"]))
    dt = F.softplus(dt + p["dt_bias"])
    h, out = torch.zeros(heads, headdim, states, dtype=x.dtype), []
    for t in range(len(x)):
        u, B, C = xBC[t].split([inner, groups * states, groups * states])
        u = u.view(heads, headdim)
        B, C = (w.view(groups, states).repeat_interleave(heads // groups, 0) for w in (B, C))
        decay = torch.exp(-torch.exp(p["A_log"]) * dt[t])
        h = decay[:, None, None] * h + (dt[t, :, None] * u)[:, :, None] * B[:, None, :]
        out.append(((h * C[:, None, :]).sum(-1) + p["D"][:, None] * u).flatten())
    y = (torch.stack(out) * F.silu(z)).unflatten(-1, (groups, -1))
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return (y.flatten(-2) * p["norm.weight"]) @ p["out_proj.weight"].T


def mamba3(p, x, settings):
    """A Mamba-3 layer on `(l, d_model)`, without its optional norm."""
    n, dim, groups = settings["d_state"], settings["headdim"], settings.get("ngroups", 1)
    heads, length, is_mimo = len(p["D"]), len(x), settings.get("is_mimo", False)
    rank, angles = settings["mimo_rank"] if is_mimo else 1, n // 4
    sizes = [*2 * [heads * dim], *2 * [rank * groups * n], *3 * [heads], angles]
    z, u, B, C, dt, a, trap, turn = (x @ p["in_proj.weight"].T).split(sizes, dim=-1)
    dt, share = F.softplus(dt + p["dt_bias"]), torch.sigmoid(trap)
    decay = torch.exp(-F.softplus(a).clamp(min=1e-4) * dt)
    angle = (math.pi * torch.tanh(turn)[:, None] * dt[..., None]).cumsum(0)  # (l, h, s)

    def placed(vectors, name):
        v = rms(vectors.view(length, rank, groups, n), p[f"{name}_norm.weight"])
        v = v.repeat_interleave(heads // groups, 2) + p[f"{name}_bias"].transpose(0, 1)  # (l, r, h, n)
        v, s = v.clone(), angles
        one, two = (
            (slice(0, s), slice(n // 2, n // 2 + s)) if is_mimo else (slice(0, 2 * s, 2), slice(1, 2 * s, 2))
        )
        pairs = torch.complex(v[..., one], v[..., two]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        v[..., one], v[..., two] = pairs.real, pairs.imag
        return v

    B, C = placed(B, "B"), placed(C, "C")
    one = torch.ones(heads, 1, dim, dtype=x.dtype)
    into, gate, out_of = (p.get(f"mimo_{name}", one).transpose(0, 1) for name in "xzo")  # (r, h, p)
    u, z = (t.view(length, 1, heads, dim) for t in (u, z))
    h = last = torch.zeros(heads, dim, n, dtype=x.dtype)
    out = []
    for t in range(length):
        now = torch.einsum("rhp,rhn->hpn", u[t] * into, B[t])
        step, kept, new = ((w * dt[t])[:, None, None] for w in (decay[t] / dt[t], 1 - share[t], share[t]))
        h, last = step * h + kept * step * last + new * now, now
        y = torch.einsum("hpn,rhn->rhp", h, C[t]) + p["D"][:, None] * u[t] * into
        out.append((out_of * y * F.silu(z[t] * gate)).sum(0).flatten())
    return torch.stack(out) @ p["out_proj.weight"].T


def attention(q, k, v, turned=0, base=10000.0):
    """Causal attention: queries `(l, h, p)`, keys and values `(l, g, p)` -> `(l, h p)`."""
    length, heads, dim = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    if turned:
        q, k = (torch.stack([rotated(row, t, turned, base) for t, row in enumerate(rows)]) for rows in (q, k))
    out = []
    for t in range(length):
        scores = torch.einsum("hp,shp->hs", q[t], k[: t + 1]) / math.sqrt(dim)
        out.append(torch.einsum("hs,shp->hp", scores.softmax(-1), v[: t + 1]).flatten())
    return torch.stack(out)


def rotated(heads, position, turned, base):
    """Turn the first channels of each head `(h, p)`, channel `i` with channel `i + turned / 2`."""
    half = turned // 2
    angle = position * base ** (-2.0 * torch.arange(half, dtype=heads.dtype) / turned)
    a, b, rest = heads[:, :half], heads[:, half:turned], heads[:, turned:]
    pairs = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag, rest], dim=-1)


def top1(p, x):
    """BlackMamba's experts on `(l, d)`: the one with the largest score, times that score."""
    out = []
    for token in x:
        scores = torch.sigmoid(p["router.weight"] @ token + p["router.bias"])
        best = int(scores.argmax())
        out.append(scores[best] * geglu(p, f"local_experts.{best}.", token))
    return torch.stack(out)


def geglu(p, prefix, x):
    """Gate first, then value, activated by the exact GELU."""
    gate, value = (x @ p[f"{prefix}linear_fc1.weight"].T).chunk(2, dim=-1)
    gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return (gate * value) @ p[f"{prefix}linear_fc2.weight"].T


def part(tensors, prefix):
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def blackmamba(config, tensors, tokens):
    """Logits `(l, v)` of a BlackMamba checkpoint."""
    embedding = tensors["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    for n, code in enumerate(config["mamba_moe_layers"]):
        p = part(tensors, f"decoder.layers.{n}.")
        u, mixer = rms(x, p["norm.weight"]), part(p, "mixer.")
        if code == "r":
            x = x + mamba1(mixer, u)
        else:
            x = x + (geglu(mixer, "", u) if code == "1" else top1(mixer, u))
    last = part(tensors, "decoder.final_layernorm.")
    return layer_norm(x, last["weight"], last["bias"]) @ embedding.T


def megatron(config, tensors, tokens):
    """Logits `(l, v)` of a Mamba-2 hybrid of Megatron-LM."""
    x, groups, dim = (
        tensors["embedding.word_embeddings.weight"][tokens],
        config["num_query_groups"],
        config["kv_channels"],
    )
    for n, letter in enumerate(config["hybrid_override_pattern"]):
        p = part(tensors, f"decoder.layers.{n}.")
        if letter == "M":
            sizes = (config["mamba_head_dim"], config["mamba_state_dim"], config["mamba_num_groups"])
            x = x + mamba2(part(p, "mixer."), rms(x, p["norm.weight"]), *sizes)
        elif letter == "-":
            u = rms(x, p["mlp.linear_fc1.layer_norm_weight"]) @ p["mlp.linear_fc1.weight"].T
            x = x + (u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))) @ p["mlp.linear_fc2.weight"].T
        else:
            u = rms(x, p["self_attention.linear_qkv.layer_norm_weight"])
            shared = (u @ p["self_attention.linear_qkv.weight"].T).view(len(x), groups, -1, dim)
            q, k, v = shared[:, :, :-2].flatten(1, 2), shared[:, :, -2], shared[:, :, -1]
            x = x + attention(q, k, v) @ p["self_attention.linear_proj.weight"].T
    return rms(x, tensors["decoder.final_norm.weight"]) @ tensors["output_layer.weight"].T


def mamba_ssm(config, tensors, tokens):
    """Logits `(l, v)` of a checkpoint of mamba_ssm: Mamba-1, 2 or 3, MLPs and attention."""

    def normed(x, p, name):
        weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
        return rms(x, weight) if bias is None else layer_norm(x, weight, bias)

    x, settings = tensors["backbone.embedding.weight"][tokens], config["ssm_cfg"]
    for n in range(config["n_layer"]):
        p = part(tensors, f"backbone.layers.{n}.")
        u, mixer = normed(x, p, "norm"), part(p, "mixer.")
        if n in config["attn_layer_idx"]:
            x = x + _mha(config["attn_cfg"], mixer, u)
        elif settings["layer"] == "Mamba2":
            x = x + mamba2(mixer, u, settings["headdim"], settings["d_state"], settings.get("ngroups", 1))
        elif settings["layer"] == "Mamba3":
            x = x + mamba3(mixer, u, settings)
        else:
            x = x + mamba1(mixer, u)
        if config["d_intermediate"]:
            value, gate = (normed(x, p, "norm2") @ p["mlp.fc1.weight"].T).chunk(2, dim=-1)
            x = x + (value * F.silu(gate)) @ p["mlp.fc2.weight"].T
    return normed(x, part(tensors, "backbone."), "norm_f") @ tensors["lm_head.weight"].T


def _mha(settings, p, u):
    heads, dim = settings["num_heads"], settings["head_dim"]
    groups = settings["num_heads_kv"] or heads
    qkv = u @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    if settings["d_conv"]:
        qkv = convolved(qkv, p["conv1d.weight"], p["conv1d.bias"])
    q, k, v = qkv.unflatten(-1, (-1, dim)).split([heads, groups, groups], dim=1)
    y = attention(q, k, v, settings.get("rotary_emb_dim", 0), settings.get("rotary_emb_base", 10000.0))
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


SMALL = {"d_model": 32, "n_layer": 4, "vocab_size": 50, "attn_layer_idx": [1, 3]}
PLAIN = {"causal": True, "num_heads": 4, "head_dim": 8}
CASES = {
    "blackmamba": (TOYS["blackmamba"], "blackmamba", blackmamba),
    "mamba2_hybrid": (TOYS["mamba2_hybrid"], "megatron", megatron),
    "mamba2-attention": (TOYS["mamba2-attention"], "mamba_ssm", mamba_ssm),
    "mamba-layer-norms": (TOYS["mamba-layer-norms"], "mamba_ssm", mamba_ssm),
    "mamba3-mimo": (TOYS["mamba3"], "mamba_ssm", mamba_ssm),
    "mamba3-siso": (
        Mamba3JSON(
            **{**SMALL, "attn_layer_idx": []},
            ssm_cfg={"layer": "Mamba3", "d_state": 8, "headdim": 8, "ngroups": 2},
        ),
        "mamba_ssm",
        mamba_ssm,
    ),
    "mamba2-attention-mlp": (
        Mamba2JSON(
            **SMALL,
            d_intermediate=40,
            ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2},
            attn_cfg={**PLAIN, "qkv_proj_bias": False, "out_proj_bias": False},
        ),
        "mamba_ssm",
        mamba_ssm,
    ),
    "mamba-attention-layer-norms": (
        Mamba1JSON(**SMALL, rms_norm=False, attn_cfg={**PLAIN, "rotary_emb_dim": 8}, tie_embeddings=False),
        "mamba_ssm",
        mamba_ssm,
    ),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A checkpoint in float64, every weight away from its initial value: folder, layout and naive model."""
    published, layout, run = CASES[request.param]
    torch.manual_seed(0)
    model = LanguageModel(published.ours(), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mambakit.save(model, tmp_path / "it", layout=layout)
    return tmp_path / "it", layout, run


def stored(folder):
    with open_tensors(folder) as tensors:
        return json.loads((folder / "config.json").read_text()), dict(tensors)


@torch.no_grad()
def test_logits_are_those_of_the_layers_written_down(case):
    folder, _, run = case
    model, (config, tensors) = mambakit.load(folder), stored(folder)
    tokens = torch.randint(0, 50, (2, 13))
    expected = torch.stack([run(config, tensors, row) for row in tokens])
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_greedy_text_is_the_same(case):
    folder, _, run = case
    model, (config, tensors) = mambakit.load(folder), stored(folder)
    prompt = torch.randint(0, 50, (1, 5))
    found = mambakit.generate(model, prompt, max_tokens=64, sampling=mambakit.Sampling(temperature=0))
    logits = run(config, tensors, torch.cat([prompt, found], dim=1)[0, :-1])
    assert torch.equal(logits[4:].argmax(-1), found[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_and_back_changes_no_bit(case, dtype, tmp_path):
    folder, layout, _ = case
    mambakit.save(mambakit.load(folder, dtype=dtype), tmp_path / "once", layout=layout)
    mambakit.save(mambakit.load(tmp_path / "once"), tmp_path / "twice")
    (first, before), (second, after) = stored(tmp_path / "once"), stored(tmp_path / "twice")
    assert first == second and set(before) == set(after) == set(stored(folder)[1])
    for name, tensor in before.items():
        assert tensor.dtype == dtype and torch.equal(tensor, after[name]), name


@torch.no_grad()
def test_logits_in_bf16_are_near(case, tmp_path):
    folder, layout, run = case
    mambakit.save(mambakit.load(folder, dtype=torch.bfloat16), tmp_path / "bf16", layout=layout)
    model, (config, tensors) = mambakit.load(tmp_path / "bf16"), stored(tmp_path / "bf16")
    tokens = torch.randint(0, 50, (13,))
    exact = run(config, {name: tensor.double() for name, tensor in tensors.items()}, tokens)
    # The median over tokens: near a tie, rounding sends a token to another expert.
    error = (model(tokens[None])[0].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.02


def test_a_checkpoint_of_megatron_is_read_where_it_is(tmp_path):
    """Published folders have no `config.json`, and their file holds more than tensors."""
    import argparse

    published = TOYS["mamba2_hybrid"]
    model = LanguageModel(published.ours())
    mambakit.save(model, tmp_path / "ours", layout="megatron")
    config, tensors = stored(tmp_path / "ours")
    place = tmp_path / "theirs" / "release" / "mp_rank_00"
    place.mkdir(parents=True)
    more = {"decoder.layers.0.mixer.in_proj._extra_state": None}
    content = {"model": tensors | more, "args": argparse.Namespace(num_layers=5), "checkpoint_version": 3.0}
    torch.save(content, place / "model_optim_rng.pt")
    with pytest.raises(
        mambakit.checkpoints.CheckpointError, match=r"has shape \(50, 32\), expected \(256000"
    ):
        mambakit.load(tmp_path / "theirs")
    loaded = mambakit.load(tmp_path / "theirs", overrides=config)
    tokens = torch.arange(50)[None]
    assert torch.equal(loaded(tokens), model(tokens))
