"""A step of the engine against the model's own forward, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mambakit.generation.engine import FORMS, DecodeEngine
from mambakit.generation.engine.weights import rounded, rounded_activations
from mambakit.models import LanguageModel

LENGTH = 12


def tokens(batch: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(71, (length, batch), generator=torch.Generator().manual_seed(batch))


def in_float64(model: LanguageModel) -> LanguageModel:
    """The same model in float64: the specification."""
    exact = LanguageModel(model.config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    return exact.eval().requires_grad_(False)


def as_rounded(model: LanguageModel, form: str) -> LanguageModel:
    """The specification with the engine's weights and, against integers, its activations."""
    exact = in_float64(model)
    embedding = exact.embedding.weight.clone()
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded(module.weight.float(), form))
            if form.startswith("int"):
                module.register_forward_pre_hook(lambda _, x: (rounded_activations(x[0]).double(),))
    exact.embedding.weight = nn.Parameter(embedding, requires_grad=False)  # it may be the head's
    return exact


def by_forward(model: LanguageModel, steps: torch.Tensor) -> torch.Tensor:
    state = model.init_state(steps.shape[1])
    return torch.stack([model(step[:, None], state)[:, 0] for step in steps]).double()


def by_engine(engine: DecodeEngine, model: LanguageModel, steps: torch.Tensor) -> torch.Tensor:
    state = model.init_state(steps.shape[1])
    # Memory that is not written to shows.
    outs = torch.full((*steps.shape, model.config.vocab_size), torch.nan)
    return torch.stack([engine.step(step, state, out=out) for step, out in zip(steps, outs, strict=True)])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest of all tokens' relative errors."""
    return ((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_float32_is_the_forward(make, name, batch):
    model = make(name)
    wanted = by_forward(in_float64(model), tokens(batch))
    assert error(by_engine(DecodeEngine(model), model, tokens(batch)), wanted) < 3e-6


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_bfloat16_is_the_forward_of_rounded_weights(make, name, batch):
    model = make(name)
    wanted = by_forward(as_rounded(model, "bfloat16"), tokens(batch))
    engine = DecodeEngine(model, "bfloat16")
    assert error(by_engine(engine, model, tokens(batch)), wanted) < 3e-6
    assert error(wanted, by_forward(in_float64(model), tokens(batch))) > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_integers_are_the_forward_of_rounded_weights_and_activations(make, name, form, batch):
    """An activation half way between two integers may go to the other one, which is rare and no error."""
    model = make(name)
    wanted = by_forward(as_rounded(model, form), tokens(batch))
    found = by_engine(DecodeEngine(model, form), model, tokens(batch)).double()
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.median() < 1e-3
    assert errors.max() < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_see_its_neighbours(make, name, form):
    """Bit for bit, for every number of neighbours."""
    model = make(name)
    engine, steps = DecodeEngine(model, form), tokens(16, 4)
    whole = by_engine(engine, model, steps)
    for batch in range(1, 16):
        assert torch.equal(by_engine(engine, model, steps[:, :batch]), whole[:, :batch]), batch


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["mamba1", "mamba2 groups", "all"])
def test_results_do_not_depend_on_the_number_of_threads(make, of, form, monkeypatch):
    model = make(of, vocab_size=1501)
    monkeypatch.setattr("mambakit.generation.engine.engine._THREAD_BYTES", 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            engine = DecodeEngine(model, form)
            assert engine._thread_count() == threads
            results.append(by_engine(engine, model, tokens(3)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_instructions_for_bytes_give_the_same_integers(make, name, form):
    """With and without VNNI; on a processor that has none both are the same code."""
    model = make(name)
    engine = DecodeEngine(model, form)
    with_them = by_engine(engine, model, tokens(5))
    engine._vnni = False
    assert torch.equal(by_engine(engine, model, tokens(5)), with_them)


@pytest.mark.parametrize("of", ["mamba1", "mamba2 groups", "all"])
def test_a_model_in_bfloat16_is_computed_more_exactly_than_by_itself(make, of):
    """Weights as they are, activations in float32; the convolution's state is bfloat16, as in the model."""
    model = make(of, dtype=torch.bfloat16)
    wanted = by_forward(in_float64(model), tokens(3))
    for form in ("float32", "bfloat16"):
        found = by_engine(DecodeEngine(model, form), model, tokens(3))
        assert error(found, wanted) < error(by_forward(model, tokens(3)), wanted) / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["embedding.weight", "backbone.blocks.0.mixer.out_proj.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(make, form, place, value):
    model = make("mamba2")
    model.get_parameter(place)[5, 3] = value
    logits = DecodeEngine(model, form).step(torch.tensor([5]), model.init_state(1))
    assert not logits.isfinite().all()


def test_an_engine_keeps_the_weights_that_it_was_made_of(make):
    model = make("all")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = DecodeEngine(model, "int8")
    wanted = by_engine(engine, model, tokens(2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for block in model.backbone.blocks:
        block.norm.weight.zero_()
    model.lm_head.weight.zero_()
    assert torch.equal(by_engine(engine, model, tokens(2)), wanted)


def test_what_a_step_refuses(make):
    model, other = make("mamba2"), make("mamba1")
    engine = DecodeEngine(model)
    for wrong in (71, -1):
        with pytest.raises(ValueError, match=f"token {wrong}, expected a number from 0 to 70"):
            engine.step(torch.tensor([0, wrong]), model.init_state(2))
    with pytest.raises(ValueError, match="1 to 16 sequences, not 17"):
        engine.step(torch.zeros(17, dtype=torch.int64), model.init_state(17))
    with pytest.raises(ValueError, match=r"0\.conv is \(2, 3, 80\) .* expected \(2, 3, 112\)"):
        engine.step(torch.tensor([0, 1]), other.init_state(2))
    with pytest.raises(ValueError, match=r"expected \(1, 3, 112\)"):
        engine.step(torch.tensor([0]), model.init_state(2))
    with pytest.raises(ValueError, match="no '1'"):
        DecodeEngine(model).step(torch.tensor([0]), make("mamba2", pattern="M").init_state(1))
    state = model.init_state(2)
    state["0"]["ssm"] = state["0"]["ssm"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"0\.ssm is not contiguous"):
        engine.step(torch.tensor([0, 1]), state)
    with pytest.raises(ValueError, match=r"tokens is \(2, 1\) torch.int64, expected \(b,\) integers"):
        engine.step(torch.tensor([[0], [1]]), model.init_state(2))
    with pytest.raises(ValueError, match=r"tokens is \(1,\) torch.float32"):
        engine.step(torch.zeros(1), model.init_state(1))
    with pytest.raises(ValueError, match=r"out is \(1, 3\)"):
        engine.step(torch.tensor([0]), model.init_state(1), out=torch.empty(1, 3))
