"""Muon: what orthogonalising does, PyTorch's own as a peer, which parameters it takes, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig
from mambakit.training import muon, optim
from mambakit.training.muon import Muon, orthogonal
from mambakit.training.optim import OptimizerConfig

CONFIG = OptimizerConfig(name="muon", lr=0.01, muon_lr=0.02, weight_decay=0.1)


def model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    mixers = {"M": Mamba2Config(d_state=8, headdim=8)}
    return LanguageModel(LanguageModelConfig(vocab_size=11, d_model=16, pattern="M-M", mixers=mixers))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("shape", [(3, 20, 50), (3, 50, 20), (2, 30, 30)])
def test_singular_values_come_near_one_and_directions_stay(shape, rounds, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: rounds)
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 1e-3
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 or shape[1] == shape[2]  # a random square matrix has values next to zero
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ found @ vh.mT
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < (
        0.05 if rounds else 1e-3
    )
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_rounding_does_not_grow_with_the_spread_of_singular_values(monkeypatch):
    """Some directions hundreds of times as large as most; five steps on one Gram matrix would miss."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(4, 60, 60))
    right, _ = torch.linalg.qr(torch.randn(4, 150, 60))
    matrices = left * torch.logspace(0, -2.5, 60) @ right.mT

    def rounded(steps):
        with monkeypatch.context() as patch:
            patch.setattr(muon, "multiplies_bf16", lambda device: True)
            patch.setitem(muon.STEPS_PER_GRAM, torch.bfloat16, steps)
            return (orthogonal(matrices) - exact).norm() / exact.norm()

    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)
    exact = orthogonal(matrices)
    assert rounded(muon.STEPS_PER_GRAM[torch.bfloat16]) < 0.1
    assert rounded(muon.STEPS) > 0.2


def test_steps_like_pytorchs_muon():
    """PyTorch's iterates in bfloat16, so the two agree to its rounding."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.empty(24, 40))
    theirs.data.copy_(ours)
    first = Muon([{"params": [ours], "muon": True}], lr=0.02, weight_decay=0.1)
    second = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    start = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    moved = (ours - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() / moved < 0.02


def test_takes_the_matrices_of_the_backbone_only():
    kinds = {name: g.name for g in optim.groups(model(), CONFIG) for name in g.parameters}
    assert {name for name, kind in kinds.items() if kind == "muon"} == {
        f"backbone.blocks.{n}.mixer.{p}_proj.weight" for n in range(3) for p in ("in", "out")
    }
    assert kinds["embedding.weight"] == "decay"
    assert kinds["backbone.blocks.0.mixer.conv1d.weight"] == "decay"
    assert kinds["backbone.blocks.0.mixer.A_log"] == "ssm"


def train(lm: LanguageModel, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = lm(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_state_round_trip_continues_bit_for_bit():
    whole, part = model(), model()
    uninterrupted = optim.build(optim.groups(whole, CONFIG), CONFIG)
    train(whole, uninterrupted, 6)
    before = optim.build(optim.groups(part, CONFIG), CONFIG)
    train(part, before, 3)
    resumed = model(seed=1)
    resumed.load_state_dict(part.state_dict())
    after = optim.build(optim.groups(resumed, CONFIG), CONFIG)
    optim.unpack(after, optim.pack(before))
    train(resumed, after, 3, first=3)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_flagged_step_changes_nothing():
    lm = model()
    optimizer = optim.build(optim.groups(lm, CONFIG), CONFIG)
    train(lm, optimizer, 2)
    weights = [p.detach().clone() for p in lm.parameters()]
    momentum = {name: value.clone() for name, value in optim.pack(optimizer).items() if "momentum" in name}
    optimizer.found_inf = torch.tensor(1.0)
    for p in lm.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    matrices = {n for g in optim.groups(lm, CONFIG) if g.name == "muon" for n in g.parameters}
    for (name, p), old in zip(lm.named_parameters(), weights, strict=True):
        if name in matrices:
            assert torch.allclose(p, old), name
    for name, value in optim.pack(optimizer).items():
        if "momentum" in name:
            assert torch.equal(value, momentum[name])
