"""The engine and the forward continue each other's states; forks, selections and files work in between."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation.engine import DecodeEngine
from mambakit.layers.mixer import State

LENGTH = 9


def sequence(batch: int) -> torch.Tensor:
    return torch.randint(71, (batch, 3 * LENGTH), generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ((found - wanted).norm() / wanted.norm()).item() < 3e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sequence_goes_from_forward_to_engine_and_back(make, name, batch):
    model, tokens = make(name), sequence(batch)
    wanted = model(tokens)
    engine, state = DecodeEngine(model), model.init_state(batch)
    found = [model(tokens[:, :LENGTH], state)]
    found += [engine.step(token, state)[:, None] for token in tokens[:, LENGTH : 2 * LENGTH].unbind(1)]
    found += [model(tokens[:, 2 * LENGTH :], state)]
    close(torch.cat(found, 1), wanted)


def test_the_state_of_the_engine_is_the_state_of_the_forward(make, name):
    model, tokens = make(name), sequence(3)
    engine, one, other = DecodeEngine(model), model.init_state(3), model.init_state(3)
    model(tokens, one)
    for token in tokens.unbind(1):
        engine.step(token, other)
    for (key, wanted), (_, found) in zip(one.tensors(), other.tensors(), strict=True):
        assert found.numel() == 0 or (found - wanted).norm() < 3e-6 * wanted.norm(), key


def test_a_state_may_be_saved_forked_selected_and_reset(make, tmp_path):
    model, tokens = make("all"), sequence(3)
    engine, state = DecodeEngine(model), model.init_state(3)
    for token in tokens[:, :LENGTH].unbind(1):
        engine.step(token, state)
    state.save(tmp_path / "state.safetensors")
    fork, chosen = state.clone(), state.select(torch.tensor([2, 0, 2, 1]))
    token = tokens[:, LENGTH]
    wanted = engine.step(token, state)
    assert torch.equal(engine.step(token, fork), wanted)
    assert torch.equal(engine.step(token[[2, 0, 2, 1]], chosen), wanted[[2, 0, 2, 1]])
    loaded = State.load(tmp_path / "state.safetensors")
    assert torch.equal(engine.step(token, loaded), wanted)
    loaded.reset(torch.tensor([1]))
    fresh = engine.step(token[1:2], model.init_state(1))
    assert torch.equal(engine.step(token, loaded)[1], fresh[0])


def test_two_engines_take_turns(make):
    """Each has working memory of its own; one more exact engine may score what another wrote."""
    model, tokens = make("mamba1"), sequence(2)
    engines = [DecodeEngine(model, form) for form in ("float32", "int8")]
    states = [model.init_state(2) for _ in engines]
    together = [
        [engine.step(token, state) for engine, state in zip(engines, states, strict=True)]
        for token in tokens.unbind(1)
    ]
    for i, engine in enumerate(engines):
        state = model.init_state(2)
        for token, steps in zip(tokens.unbind(1), together, strict=True):
            assert torch.equal(engine.step(token, state), steps[i])
