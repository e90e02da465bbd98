"""Checkpoints that transformers wrote: the same logits, the same text, and back without a changed bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import mambakit

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16}
TINY = {
    "mamba": ("Mamba", {**SMALL, "state_size": 5}),
    "mamba-biases-untied": ("Mamba", {**SMALL, "use_bias": True, "tie_word_embeddings": False, "expand": 3}),
    "mamba-constant-dt": ("Mamba", {**SMALL, "time_step_rank": 7, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba2": ("Mamba2", {**SMALL, **MAMBA2}),
    "mamba2-biases-tied": ("Mamba2", {**SMALL, **MAMBA2, "use_bias": True, "tie_word_embeddings": True}),
    "mamba2-limited": ("Mamba2", {**SMALL, **MAMBA2, "time_step_limit": (0.02, 0.05)}),
    "falcon_mamba": ("FalconMamba", {**SMALL, "mixer_rms_eps": 1e-3}),
}


def made(name, folder, dtype=torch.float64):
    """A model of theirs with every weight away from its initial value, saved."""
    kind, settings = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TINY)
def test_logits_are_equal_in_float64(name, tmp_path, in_float64):
    theirs, ours = made(name, tmp_path), mambakit.load(tmp_path)
    tokens = torch.randint(0, 50, (3, 41))
    expected = in_float64(lambda: theirs(tokens).logits)
    with torch.no_grad():
        found = ours(tokens)
    assert found.dtype == expected.dtype == torch.float64
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_logits_in_bf16_are_as_near_the_truth_as_theirs(name, tmp_path, in_float64):
    theirs = made(name, tmp_path, torch.bfloat16)
    tokens = torch.randint(0, 50, (3, 41))
    with torch.no_grad():
        found, other = mambakit.load(tmp_path)(tokens).double(), theirs(tokens).logits.double()
    exact = in_float64(lambda: theirs.double()(tokens).logits)
    assert (found - exact).norm() <= 1.5 * (other - exact).norm()


@pytest.mark.parametrize("name", TINY)
def test_greedy_text_is_the_same(name, tmp_path):
    theirs, ours = made(name, tmp_path, torch.float32), mambakit.load(tmp_path)
    prompt = torch.randint(0, 50, (2, 9))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # Their one-token step forgets to clamp dt, so that their own cache changes the text; ours clamps always.
    cache = "limited" not in name
    with torch.no_grad():
        expected = theirs.generate(prompt, max_new_tokens=64, use_cache=cache, **settings)
    found = mambakit.generate(ours, prompt, max_tokens=64, sampling=mambakit.Sampling(temperature=0))
    assert torch.equal(found, expected[:, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TINY)
def test_there_and_back_changes_no_bit(name, tmp_path, dtype):
    theirs = made(name, tmp_path / "theirs", dtype)
    mambakit.save(mambakit.load(tmp_path / "theirs"), tmp_path / "back")
    before, after = (load_file(tmp_path / at / "model.safetensors") for at in ("theirs", "back"))
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype and torch.equal(tensor, after[key]), key
    again = type(theirs).from_pretrained(tmp_path / "back", dtype=dtype)
    tokens = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, theirs(tokens).logits)
    kept = {
        key: json.loads((tmp_path / at / "config.json").read_text())
        for at in ("theirs", "back")
        for key in [at]
    }
    assert {k: v for k, v in kept["back"].items() if k in kept["theirs"]}.keys() == kept["theirs"].keys()
    assert kept["back"]["eos_token_id"] == kept["theirs"]["eos_token_id"]


@pytest.mark.parametrize("name", ["mamba", "mamba-biases-untied", "mamba2-biases-tied", "mamba2-limited"])
def test_through_the_layout_of_mamba_ssm_changes_no_bit(name, tmp_path):
    made(name, tmp_path / "theirs", torch.bfloat16)
    model = mambakit.load(tmp_path / "theirs")
    mambakit.save(model, tmp_path / "old", layout="mamba_ssm")
    stored = torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.norm_f.weight"} <= set(stored)
    back = mambakit.load(tmp_path / "old")
    assert (back.lm_head.weight is back.embedding.weight) == model.config.tie_embeddings
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    tokens = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(tokens), back(tokens))
