"""The recorded step: what it binds to and when it records, without a GPU; that it records, with one."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.generation import RecordedDecoder, Sampling, generate
from mambakit.generation.engine.choice import engine_for
from mambakit.generation.recorded import choice, decoder

_spec = importlib.util.spec_from_file_location("recorded_models", Path(__file__).with_name("conftest.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

RECORDABLE = [name for name in models.MODELS if name != "attention"]
GREEDY = Sampling(temperature=0)


# ---------------------------------------------------------------------------------------------------------
# What every mixer owes to a recording


@pytest.mark.parametrize(
    ("name", "state_dtype"),
    [
        *((name, torch.float32) for name in RECORDABLE),
        *((name, torch.bfloat16) for name in RECORDABLE if name != "hybrid"),  # S4's are complex
    ],
)
def test_a_token_leaves_every_tensor_of_the_state_where_it_was(name, state_dtype):
    model = models.build(name)
    with torch.no_grad():
        state = model.init_state(2)
        model(models.tokens(2, 5), state)
        state = state if state_dtype == torch.float32 else state.to(state_dtype)
        before = [(leaf, t, t.data_ptr(), t.dtype, t.clone()) for leaf, t in state.tensors()]
        model(models.tokens(2, 1, seed=1), state)
    for (leaf, tensor, place, dtype, value), (_, now) in zip(before, state.tensors(), strict=True):
        assert now is tensor, leaf
        assert (now.data_ptr(), now.dtype) == (place, dtype), leaf
        assert not now.numel() or not torch.equal(now, value), f"{leaf} did not move on"


class HostReads(TorchDispatchMode):
    """Counts operations whose result, or its size, the host waits for."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", models.MODELS)
def test_a_token_is_not_looked_at_by_the_host(name):
    model = models.build(name)
    state = model.init_state(2)
    with torch.no_grad():
        model(models.tokens(2, 5), state)
        with HostReads() as reads:
            model(models.tokens(2, 1), state)
    assert bool(reads.seen) == (name == "attention"), reads.seen
    assert bool(decoder._read_on_the_host(model)) == (name == "attention")


# ---------------------------------------------------------------------------------------------------------
# Binding and recording, with a graph that is a function


class Replayed:
    """What a CUDA graph does, by calling what was recorded."""

    def __init__(self, call):
        self.replay = call


class Imitated(RecordedDecoder):
    """A decoder on the CPU; `calls` says what it did."""

    def __init__(self, model, monkeypatch):
        monkeypatch.setattr(RecordedDecoder, "supports", staticmethod(lambda model: None))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        super().__init__(model, fused=False)
        self.calls = []

    def _normally(self, state):
        self.calls.append("normal")
        return self._forward(self._tokens, state)

    def _record(self, state):
        self.calls.append("record")
        self._logits = torch.empty(len(self._tokens), models.VOCAB)
        places = weakref.ref(state)

        def call():
            self.calls.append("replay")
            self._logits.copy_(self._forward(self._tokens, places()))

        self._graph = Replayed(call)


@pytest.fixture
def imitated(monkeypatch):
    return Imitated(models.build("hybrid"), monkeypatch)


def test_the_first_step_is_normal_the_second_is_recorded(imitated):
    model, (one, other) = models.build("hybrid"), (models.build("hybrid").init_state(2) for _ in range(2))
    for number in range(5):
        token = models.tokens(2, 1, seed=number)
        found = imitated.step(token[:, 0], one)
        with torch.no_grad():
            torch.testing.assert_close(found, model(token, other)[:, -1])
        assert imitated.is_recorded == (number > 0)
    assert imitated.calls == ["normal", "record", *["replay"] * 4]


def test_another_state_or_batch_starts_again(imitated):
    model = models.build("mamba1")
    first, second, larger = model.init_state(1), model.init_state(1), model.init_state(2)
    imitated._forward = decoder._ordinary(model)
    for state, batch in ((first, 1), (first, 1), (second, 1), (first, 1), (larger, 2), (larger, 2)):
        imitated.step(torch.zeros(batch, dtype=torch.int64), state)
    normal, recorded = ["normal"], ["record", "replay"]
    assert imitated.calls == normal + recorded + 3 * normal + recorded
    larger["0"]["ssm"] = larger["0"]["ssm"].clone()  # one tensor of it replaced
    imitated.step(torch.zeros(2, dtype=torch.int64), larger)
    assert imitated.calls[-1] == "normal"


def test_logits_are_the_callers(imitated):
    state = models.build("hybrid").init_state(1)
    token = torch.zeros(1, dtype=torch.int64)
    kept = [imitated.step(token, state) for _ in range(4)]
    copies = [logits.clone() for logits in kept]
    out = torch.empty(1, models.VOCAB, dtype=torch.float64)
    assert imitated.step(token, state, out=out) is out
    for logits, copy in zip(kept, copies, strict=True):
        assert torch.equal(logits, copy)
    assert not torch.equal(kept[2], kept[3])


def test_inference_mode_may_come_and_go(imitated):
    state, token = models.build("hybrid").init_state(2), torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        imitated.step(token, state)
    imitated.step(token + 1, state)
    assert torch.equal(imitated._tokens, token + 1)


def test_a_decoder_keeps_no_state_alive(imitated):
    state = models.build("hybrid").init_state(1)
    for _ in range(3):
        imitated.step(torch.zeros(1, dtype=torch.int64), state)
    watched = [weakref.ref(tensor) for _, tensor in state.tensors()]
    del state
    gc.collect()
    assert all(ref() is None for ref in watched)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (torch.zeros(1, 1, dtype=torch.int64), r"tokens is \(1, 1\) torch.int64"),
        (torch.zeros(0, dtype=torch.int64), r"expected integers \(b,\), b >= 1"),
        (torch.zeros(1), r"tokens is \(1,\) torch.float32"),
        (torch.zeros(2, dtype=torch.int64), "expected 2 rows on cpu"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "on meta, expected integers"),
    ],
)
def test_what_does_not_fit_is_refused(imitated, tokens, reason):
    state = models.build("hybrid").init_state(1)
    with pytest.raises(ValueError, match=reason):
        imitated.step(tokens, state)
    with pytest.raises(ValueError, match=r"out has shape \(1, 3\), expected \(1, 71\)"):
        imitated.step(torch.zeros(1, dtype=torch.int64), state, out=torch.empty(1, 3))


# ---------------------------------------------------------------------------------------------------------
# Reasons, and the choice of `generate`


def test_reasons():
    model = models.build("mamba1")
    assert RecordedDecoder.supports(model) == "it takes models on a CUDA device, not on 'cpu'"
    assert RecordedDecoder.supports(torch.nn.Linear(2, 2)) == "it takes a LanguageModel, not Linear"
    with pytest.raises(ValueError, match="cannot be recorded: it takes models on a CUDA device"):
        RecordedDecoder(model)
    reason = decoder._read_on_the_host(models.build("attention"))
    assert reason.startswith("block 1 is Attention, whose state's 'length' is read on the host")
    for name in RECORDABLE:
        assert decoder._read_on_the_host(models.build(name)) is None, name


def test_a_state_of_another_model_is_named():
    model = models.build("mamba1")
    check = RecordedDecoder.unsupported_state
    assert check(model, model.init_state(3), 3) is None
    assert "expected (2, " in check(model, model.init_state(3), 2)
    assert "has no '1.conv'" in check(
        model, models.build("mamba2 one").init_state(1), 1
    ) or "0.conv is" in check(model, models.build("mamba2 one").init_state(1), 1)


def test_recording_is_chosen_where_it_pays(monkeypatch):
    model = models.build("mamba1")
    assert choice.is_worth_it(model, 16)
    assert not choice.is_worth_it(model, 15)

    class Foreign(torch.nn.Linear):
        __module__ = "somewhere.else"

    model.lm_head = Foreign(40, models.VOCAB)
    assert not choice.is_worth_it(model, 1000)


def test_a_state_keeps_its_decoder_and_no_longer(monkeypatch):
    monkeypatch.setattr(RecordedDecoder, "supports", staticmethod(lambda model: None))
    monkeypatch.setattr(choice, "_decoders", {})
    model = models.build("mamba1")
    one, other = model.init_state(1), model.init_state(1)
    kept = choice.decoder_for(model, one)
    assert choice.decoder_for(model, one) is kept
    assert choice.decoder_for(model, other) is not kept
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert choice.decoder_for(model, one) is not kept
    assert len(choice._decoders) == 2
    del one, other
    gc.collect()
    assert not choice._decoders


def test_a_recording_that_cannot_be_had_is_said(monkeypatch):
    from mambakit.generation.engine import choice as engines

    monkeypatch.setattr(engines, "_said", set())
    model = models.build("mamba1")
    with pytest.warns(UserWarning, match="without a recorded step: it takes models on a CUDA device"):
        assert engine_for(model, "recorded", model.init_state(1), 1, 100) is None


def test_generation_by_a_decoder_is_generation(imitated):
    model, prompt = models.build("hybrid"), models.tokens(3, 5)
    wanted = generate(model, prompt, max_tokens=20, sampling=Sampling(seed=0), engine="off")
    found = generate(model, prompt, max_tokens=20, sampling=Sampling(seed=0), engine=imitated)
    assert torch.equal(found, wanted)
    assert len(wanted.unique()) > 10
    assert imitated.calls.count("replay") == 18


# ---------------------------------------------------------------------------------------------------------
# On a GPU


def cuda(name: str, dtype: torch.dtype):
    return models.build(name, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("how", "batch"), [("ordinary", 2), ("fused", 1), ("fused", 9), ("overlapping", 3), ("overlapping", 9)]
)
@pytest.mark.parametrize("name", RECORDABLE)
def test_recorded_steps_are_the_forward(name, how, batch, dtype):
    model = cuda(name, dtype)
    recorded = RecordedDecoder(model, fused=how != "ordinary", overlap=how == "overlapping")
    exact = models.exact(model)
    with torch.no_grad():
        own = model.init_state(batch)
        model(models.tokens(batch, 6, device="cuda"), own)
        ours, wanted = own.clone(), models.double(own)
        for number in range(6):
            token = models.tokens(batch, 1, seed=number + 1, device="cuda")
            found = recorded.step(token[:, 0], ours)
            other, best = model(token, own)[:, -1], exact(token, wanted)[:, -1]
            models.holds(found, other, best, f"logits of step {number}", dtype)
    assert recorded.is_recorded
    for (leaf, one), (_, other), (_, best) in zip(*(s.tensors() for s in (ours, own, wanted)), strict=True):
        if not one.is_complex():
            models.holds(one, other, best, leaf, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_recorded_steps_take_narrow_states(name, batch):
    model = cuda(name, torch.bfloat16)
    fused, ordinary = RecordedDecoder(model), RecordedDecoder(model, fused=False)
    assert fused.fused
    state = model.init_state(batch)
    with torch.no_grad():
        model(models.tokens(batch, 6, device="cuda"), state)
    one, other = state.to(torch.bfloat16), state.to(torch.bfloat16)
    for number in range(6):
        token = models.tokens(batch, 1, seed=number, device="cuda")[:, 0]
        found, wanted = fused.step(token, one), ordinary.step(token, other)
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mamba1", "mamba2", "hybrid"])
def test_recorded_generation_on_a_gpu(name):
    model, prompt = cuda(name, torch.float32), models.tokens(3, 5, device="cuda")
    wanted = generate(model, prompt, max_tokens=40, sampling=GREEDY, engine="off")
    state = model.init_state(3)
    for engine in ("auto", "recorded"):
        found = generate(model, prompt, max_tokens=40, sampling=GREEDY, engine=engine, state=state)
        assert torch.equal(found, wanted), engine
        assert choice._decoders[id(state)][1].is_recorded
        state.reset()


@pytest.mark.gpu
def test_the_other_states_of_a_decoder_are_left_alone():
    model = cuda("mamba2", torch.float32)
    recorded = RecordedDecoder(model)
    one, other = model.init_state(2), model.init_state(2)
    token = models.tokens(2, 1, device="cuda")
    for _ in range(3):
        recorded.step(token[:, 0], one)
    before = one.clone()
    for _ in range(3):
        found = recorded.step(token[:, 0], other)
    for (leaf, tensor), (_, kept) in zip(one.tensors(), before.tensors(), strict=True):
        assert torch.equal(tensor, kept), leaf
    again = model.init_state(2)
    with torch.no_grad():
        for _ in range(3):
            wanted = model(token, again)[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    del other
    assert recorded.step(token[:, 0], one).isfinite().all()


@pytest.mark.gpu
def test_attention_is_refused_with_its_reason_and_generates_all_the_same():
    model, prompt = cuda("attention", torch.float32), models.tokens(1, 5, device="cuda")
    with pytest.raises(ValueError, match="block 1 is Attention, whose state's 'length' is read on the host"):
        RecordedDecoder(model)
    assert generate(model, prompt, max_tokens=20, sampling=GREEDY).shape == (1, 20)
