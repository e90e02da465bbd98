"""Checkpoints with rounded weights: rounded while they are read, saved, loaded, and what it costs."""

from __future__ import annotations

import importlib
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambakit
from mambakit import LanguageModel
from mambakit.checkpoints import CheckpointError
from mambakit.layers import Mamba2Config, quantise
from mambakit.testing.toys import TOYS

FORMS = ("int8", "int4")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint of every family."""
    folder = tmp_path_factory.mktemp("published")
    for name, toy in TOYS.items():
        torch.manual_seed(0)
        mambakit.save(LanguageModel(toy.ours()), folder / name)
    return folder


def equal(one: LanguageModel, other: LanguageModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOYS)
def test_rounding_while_reading_is_rounding_afterwards_and_survives_a_file(checkpoints, tmp_path, name, form):
    model = mambakit.load(checkpoints / name, quantize=form)
    assert equal(model, quantise(mambakit.load(checkpoints / name), form))
    mambakit.save(model, tmp_path / "small")
    again = mambakit.load(tmp_path / "small")
    assert equal(again, model) and equal(mambakit.load(tmp_path / "small", quantize=form), model)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(again(tokens), model(tokens)) and not again.training
    wide = mambakit.load(tmp_path / "small", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_no_more_than_one_weight_exists_in_its_own_precision(checkpoints, monkeypatch):
    """Every weight that is rounded is watched: the one before must be gone."""
    module = importlib.import_module("mambakit.load")
    seen: list[weakref.ref] = []

    def watching(weight, form, rounded=module.round_weight):
        assert not [one for one in seen if one() is not None]
        seen.append(weakref.ref(weight))
        return rounded(weight, form)

    monkeypatch.setattr(module, "round_weight", watching)
    mambakit.load(checkpoints / "jamba", dtype=torch.bfloat16, quantize="int8")
    assert len(seen) > 10


def test_weights_of_a_shared_layer_are_rounded_once():
    shared = torch.nn.Linear(8, 8)
    model = quantise(torch.nn.Sequential(shared, torch.nn.Tanh(), shared), "int8")
    assert model[0] is model[2] is not shared


def edit(folder, **changes):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))


def swap(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


NAME = "backbone.blocks.0.mixer.in_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda at: edit(at, quantization_config={"quant_method": "gptq"}),
            "method 'gptq', expected 'mambakit'",
        ),
        (lambda at: edit(at, quantization_config="int8"), "method None, expected 'mambakit'"),
        (
            lambda at: edit(at, quantization_config={"quant_method": "mambakit", "form": "int3"}),
            "unknown form 'int3'; did you mean 'int",
        ),
        (
            lambda at: edit(at, quantization_config={"quant_method": "mambakit", "form": "int4"}),
            rf"{NAME}.integers is \(128, 32\) torch.int8, expected \(128, 32\) torch.uint8",
        ),
        (lambda at: edit(at, quantization_config=None), "embeddings.weight is missing"),
        (lambda at: swap(at, lambda t: t.pop(f"{NAME}.scales")), f"{NAME}.scales is missing"),
        (lambda at: swap(at, lambda t: t.update(more=torch.ones(1))), "more belongs to no part"),
        (
            lambda at: swap(at, lambda t: t.update({f"{NAME}.scales": torch.ones(128).half()})),
            r"scales is \(128,\) torch.float16, expected \(128,\) torch.float32",
        ),
        (
            lambda at: swap(at, lambda t: t.update({"embedding.weight": t["embedding.weight"].int()})),
            "weights of torch.int32",
        ),
    ],
)
def test_a_rounded_checkpoint_that_does_not_fit_is_one_clear_line(checkpoints, tmp_path, change, message):
    mambakit.save(mambakit.load(checkpoints / "mamba", quantize="int8"), tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises(CheckpointError, match=message) as caught:
        mambakit.load(tmp_path / "it")
    assert "\n" not in str(caught.value)


def test_wishes_that_make_no_sense_are_refused(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="quantize: unknown form 'int9'; did you mean 'int"):
        mambakit.load(checkpoints / "mamba", quantize="int9")
    model = mambakit.load(checkpoints / "mamba", quantize="int8")
    for wish in ({"dtype": torch.float32}, {"layout": "mamba_ssm"}):
        with pytest.raises(CheckpointError, match="saved in its own types and layout only"):
            mambakit.save(model, tmp_path / "it", **wish)
    mambakit.save(model, tmp_path / "it")
    with pytest.raises(CheckpointError, match="the weights are int8 already, not to be made int4"):
        mambakit.load(tmp_path / "it", quantize="int4")


def taught() -> tuple[LanguageModel, torch.Tensor]:
    """A model that has learned the times table, in characters, and more of the text."""
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randint(1, 13, (6000, 2), generator=draw).tolist()
    text = torch.tensor([ord(c) - 32 for a, b in pairs for c in f"{a}*{b}={a * b} "])
    train, test = text[:-8192].unfold(0, 65, 64), text[-8192:].unfold(0, 65, 64)
    torch.manual_seed(0)
    mixers = {"M": Mamba2Config(d_state=16, headdim=16)}
    config = mambakit.LanguageModelConfig(vocab_size=64, d_model=64, pattern="2M", mixers=mixers)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        batch = train[torch.randint(len(train), (16,), generator=draw)]
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 100)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), test


def test_what_rounding_costs_a_trained_model(tmp_path):
    """Random networks amplify any change; only a trained one says what rounding costs."""
    model, text = taught()
    mambakit.save(model, tmp_path / "it")

    def perplexity(one):
        with torch.no_grad():
            logits = one(text[:, :-1]).flatten(0, 1)
        return math.exp(torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten()))

    exact = perplexity(model)
    assert exact < 3.5, "the model has learned too little to lose anything"
    loss = {form: perplexity(mambakit.load(tmp_path / "it", quantize=form)) / exact - 1 for form in FORMS}
    assert abs(loss["int8"]) < 0.003 and abs(loss["int8"]) < loss["int4"] < 0.05, (exact, loss)
