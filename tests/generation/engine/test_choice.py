"""When an engine is used, when not, and what is said then."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from mambakit import ops
from mambakit.generation import Sampling, generate, stream
from mambakit.generation.engine import FORMS, DecodeEngine, choice
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.signed_mamba1 import SignedMamba1Config
from mambakit.models import SequenceClassifier, SequenceClassifierConfig
from mambakit.ops import native

needs_library = pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(choice, "_said", set())


def choose(model, wanted="auto", batch=1, max_tokens=1000, state=None):
    state = model.init_state(batch) if state is None else state
    return choice.engine_for(model, wanted, state, batch, max_tokens)


class Adapted(nn.Linear):
    """A linear layer that is more than its weight."""


NORMED = Mamba1Config(inner_norm="plain")


def adapted(make):
    model = make("mamba1")
    model.backbone.blocks[1].mixer.ssm.x_proj = Adapted(80, 35, bias=False)
    return model


def hooked(make):
    model = make("mamba1")
    model.backbone.blocks[0].norm.register_forward_hook(lambda *_: None)
    return model


def classifier(make):
    return SequenceClassifier(SequenceClassifierConfig(d_model=8, pattern="-", n_classes=2, vocab_size=3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda make: make("attention"), "block 1 is Attention; it takes Mamba1, Mamba2, GatedMLP"),
        (lambda make: make("mamba1", mixers={"M": SignedMamba1Config()}), "block 0 is SignedMamba1"),
        (
            lambda make: make("mamba1", mixers={"M": Mamba1Config(inner_norm="plain")}),
            "block 0 has inner_norm=plain",
        ),
        (
            lambda make: make("mamba1", residual_scale=0.5),
            "the model has residual_scale=0.5, of which it knows",
        ),
        (lambda make: make("mamba1", dtype=torch.float64), "embedding.weight is float64; it takes float32"),
        (lambda make: make("mamba1").to("meta"), "embedding.weight is on meta, not on the CPU"),
        (adapted, r"backbone.blocks.1.mixer.ssm.x_proj is Adapted, of which it knows nothing"),
        (hooked, r"backbone.blocks.0.norm has hooks"),
        (classifier, "it takes a LanguageModel, not SequenceClassifier"),
    ],
)
def test_reasons(make, build, reason):
    model = build(make)
    assert reason in DecodeEngine.supports(model)
    with pytest.raises(ValueError, match="the decode engine cannot take this model: .*" + reason[-20:]):
        DecodeEngine(model)


def test_without_a_library_the_reason_says_how_to_get_one(make, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Native(reason="not built; do this"))
    assert DecodeEngine.supports(make("mamba1")) == "not built; do this"


def test_unknown_names_are_refused_with_the_nearest_one(make):
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        stream(make("mamba1"), torch.zeros(1, 1, dtype=torch.int64), max_tokens=1, engine="int9")
    with pytest.raises(ValueError, match="unknown form 'int5'"):
        DecodeEngine(make("mamba1"), "int5")


@needs_library
@pytest.mark.parametrize("of", ["mamba1", "mamba2", "all"])
def test_generation_with_an_engine_is_generation(make, of):
    model = make(of)
    prompt = torch.randint(71, (3, 5), generator=torch.Generator().manual_seed(0))
    wanted = generate(model, prompt, max_tokens=80, sampling=Sampling(seed=0), engine="off")
    assert len(wanted.unique()) > 20
    for engine in ("auto", "float32", DecodeEngine(model)):
        found = generate(model, prompt, max_tokens=80, sampling=Sampling(seed=0), engine=engine)
        assert torch.equal(found, wanted)


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_generation_uses_the_form_that_was_asked_for(make, form):
    model = make("mamba2")
    engine, state = DecodeEngine(model, form), model.init_state(1)
    new = generate(model, torch.tensor([[1, 2, 3]]), max_tokens=30, sampling=GREEDY, engine=form)
    model(torch.tensor([[1, 2, 3]]), state)
    for token, after in zip(new[0], new[0, 1:], strict=False):
        assert engine.step(token[None], state).argmax() == after


@needs_library
def test_the_state_is_that_of_the_caller_afterwards(make):
    model = make("all")
    prompt = torch.tensor([[1, 2, 3]])
    one, other = model.init_state(1), model.init_state(1)
    new = generate(model, prompt, max_tokens=70, sampling=GREEDY, state=one, engine="float32")
    model(torch.cat([prompt, new[:, :-1]], 1), other)
    for (_, found), (_, wanted) in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_engine_that_was_asked_for_and_cannot_be_had_is_said_once(make):
    model = make("attention")
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.warns(UserWarning, match="generating without the int8 engine: block 1 is Attention"):
        found = generate(model, prompt, max_tokens=5, sampling=GREEDY, engine="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model, prompt, max_tokens=5, sampling=GREEDY, engine="int8"), found)
        assert torch.equal(generate(model, prompt, max_tokens=5, sampling=GREEDY), found)


@needs_library
def test_too_many_sequences_and_other_states_go_to_the_forward(make):
    model = make("mamba1")
    assert choose(model, batch=17) is None
    with pytest.warns(UserWarning, match="up to 16 sequences, not 17"):
        assert choose(model, "int8", batch=17) is None
    narrow = model.init_state(1, dtype=torch.bfloat16)
    assert choose(model, state=narrow) is None
    with pytest.warns(UserWarning, match=r"the state's 0\.conv is .* torch.bfloat16"):
        assert choose(model, "float32", state=narrow) is None


@needs_library
def test_automatic_choices(make, monkeypatch):
    model = make("mamba1")
    assert choose(model, max_tokens=10) is None, "packing would take longer"
    assert choose(model, "off") is None
    with ops.backend("reference"):
        assert choose(model) is None, "the caller wants to see those operators"
    monkeypatch.setattr(choice, "_free_memory", lambda: 1000)
    assert choose(model) is None, "no memory"
    monkeypatch.undo()
    engine = choose(model)
    assert engine.weights == "float32"
    assert choose(model, max_tokens=10) is engine, "it is there already"
    assert choose(make("mamba1", dtype=torch.bfloat16)).weights == "bfloat16"


@needs_library
def test_an_engine_is_made_again_when_the_parameters_change_and_goes_with_its_model(make):
    model = make("mamba1")
    engine = choose(model)
    model.lm_head.weight.mul_(2)
    again = choose(model)
    assert again is not engine
    model.backbone.blocks[0].norm.weight.data[3] += 1e-3  # past PyTorch's count of changes
    third = choose(model)
    assert third is not again
    assert choose(model) is third
    assert choose(model, "int8").weights == "int8"
    gone = weakref.ref(choose(model))
    del model
    gc.collect()
    assert gone() is None


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_library
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_decoding_needs_no_more_memory_with_every_token(make):
    """Thousands of tokens leave the process as large as it was."""
    model = make("mamba1")
    steps = stream(model, torch.tensor([[1]]), max_tokens=10**9, sampling=GREEDY, engine="float32")
    for _ in range(500):
        next(steps)
    before = resident()
    for _ in range(5000):
        next(steps)
    assert resident() - before < 1 << 20


@needs_library
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_an_engine_follows_every_optimiser(make, settings):
    """Fused ones write without raising PyTorch's count of changes."""
    model = make("mamba1").requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **settings)
    engine = choose(model)
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    assert choose(model) is not engine


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_see_one_bit_of_any_parameter(dtype):
    """Odd lengths, views that begin anywhere, and parameters without a count of changes."""
    with torch.inference_mode():
        whole = torch.randn(2, 11, dtype=dtype)
    for view in (whole, whole[1], whole[:, 3], whole[1, 10:], whole.T, whole[0, 0]):
        parameter = nn.Parameter(view, requires_grad=False)
        before = choice._fingerprint(parameter)
        assert choice._fingerprint(parameter) == before
        for place in range(view.numel()):
            copy = view.clone(memory_format=torch.contiguous_format)
            changed = nn.Parameter(copy, requires_grad=False)
            assert choice._fingerprint(changed)[1:] == before[1:]
            copy.view(-1)[place] *= 1.01
            assert choice._fingerprint(changed)[1:] != before[1:]


@needs_library
def test_an_engine_that_cannot_continue_the_state_is_refused_before_the_prompt_is_read(make):
    model = make("mamba1")
    engine, state = DecodeEngine(model), model.init_state(17)
    with pytest.raises(ValueError, match="cannot continue this state: it takes up to 16 sequences, not 17"):
        stream(model, torch.zeros(17, 3, dtype=torch.int64), max_tokens=1, engine=engine, state=state)
