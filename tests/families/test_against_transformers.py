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
HYBRID = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID2 = {**HYBRID, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6}
GRANITE = {
    **HYBRID2,
    **{"num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}
NEMOTRON = {
    **{
        "vocab_size": 50,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    **{"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "intermediate_size": 48},
    **{"mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "time_step_min": 1e-30},
    **{"n_routed_experts": 6, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40},
}
SHARED = {**SMALL, "num_hidden_layers": 6, "intermediate_size": 48, "num_attention_heads": 4}
ZAMBA = {
    **{**SHARED, "num_key_value_heads": 2, "mamba_d_state": 5, "mamba_dt_rank": 3},
    **{"layers_block_type": [*(2 * ["linear_attention", "hybrid"]), "hybrid", "linear_attention"]},
}
ZAMBA2 = {
    **{**SHARED, "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 6, "num_mem_blocks": 2},
    **{"adapter_rank": 3, "time_step_min": 1e-30},  # their lower limit of a step, in prefill only
    **{"layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"]},
}
TINY = {
    "mamba": ("Mamba", {**SMALL, "state_size": 5}),
    "mamba-biases-untied": ("Mamba", {**SMALL, "use_bias": True, "tie_word_embeddings": False, "expand": 3}),
    "mamba-constant-dt": ("Mamba", {**SMALL, "time_step_rank": 7, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba2": ("Mamba2", {**SMALL, **MAMBA2}),
    "mamba2-biases-tied": ("Mamba2", {**SMALL, **MAMBA2, "use_bias": True, "tie_word_embeddings": True}),
    "mamba2-limited": ("Mamba2", {**SMALL, **MAMBA2, "time_step_limit": (0.02, 0.05)}),
    "falcon_mamba": ("FalconMamba", {**SMALL, "mixer_rms_eps": 1e-3}),
    "jamba": (
        "Jamba",
        {
            **{**HYBRID, "num_hidden_layers": 6, "num_experts": 4, "use_mamba_kernels": False},
            **{"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 5, "mamba_dt_rank": 3},
        },
    ),
    "jamba-dense": ("Jamba", {**HYBRID, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "zamba": ("Zamba", ZAMBA),
    "zamba-one-head-biases": (
        "Zamba",
        {
            **{k: v for k, v in ZAMBA.items() if k != "layers_block_type"},
            **{"n_mamba_heads": 1, "attn_layer_period": 2},
            **{"attn_layer_offset": 1, "mamba_proj_bias": True},
        },
    ),
    "zamba2": ("Zamba2", ZAMBA2),
    "zamba2-adapters-rope": (
        "Zamba2",
        {**ZAMBA2, "use_shared_attention_adapter": True, "use_mem_rope": True, "num_mem_blocks": 3},
    ),
    "zamba2-biases-one-block": ("Zamba2", {**ZAMBA2, "num_mem_blocks": 1, "add_bias_linear": True}),
    "bamba": ("Bamba", {**HYBRID2, "attn_layer_indices": [1]}),
    "bamba-biases-tied": (
        "Bamba",
        {
            **{**HYBRID2, "attn_layer_indices": [0, 2], "tie_word_embeddings": True, "mamba_proj_bias": True},
            **{"attention_bias": True, "mlp_bias": True},
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {  # factors that float32 holds exactly, since theirs are float32 in any model
            **{**HYBRID2, "mamba_n_heads": 6, "mamba_d_ssm": 48, "embedding_multiplier": 3.0},
            **{"lm_head_multiplier": 0.5, "mlp_multipliers": [0.75, 1.25], "key_multiplier": 0.625},
            **{"attention_in_multiplier": 1.5, "attention_out_multiplier": 0.875, "ssm_in_multiplier": 1.25},
            **{"ssm_out_multiplier": 0.75, "ssm_multipliers": [0.75, 1.125, 0.875, 1.25, 0.625]},
        },
    ),
    "falcon_h1-norm": ("FalconH1", {**HYBRID2, "mamba_d_ssm": 64, "mamba_rms_norm": True}),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "nemotron_h-latent-groups": (
        "NemotronH",
        {**NEMOTRON, "moe_latent_size": 16, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "granite": ("GraniteMoeHybrid", GRANITE),
    "granite-dense-rope": (
        "GraniteMoeHybrid",
        {**GRANITE, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
}


def made(name, folder, dtype=torch.float64):
    """A model of theirs with every weight away from its initial value, saved."""
    kind, settings = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype)
    for buffer in (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")):
        buffer.data = 0.1 * torch.randn(buffer.shape)  # float32 in every file
    model.save_pretrained(folder)
    return read(type(model), folder, dtype)


def read(kind, folder, dtype):
    """A saved model of theirs; experts one by one, and the rates of rotations as exact as the weights."""
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if dtype == torch.float64 and hasattr(module, "inv_freq"):
            pairs = len(module.inv_freq)
            module.inv_freq = 10000.0 ** -(torch.arange(pairs, dtype=dtype) / pairs)
    return model


@pytest.mark.parametrize("name", TINY)
def test_logits_are_equal_in_float64(name, tmp_path, in_float64):
    theirs, ours = made(name, tmp_path), mambakit.load(tmp_path)
    tokens = torch.randint(0, 50, (3, 41))
    expected = in_float64(lambda: theirs(tokens).logits)
    with torch.no_grad():
        found = ours(tokens)
    assert found.dtype == expected.dtype == torch.float64
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_logits_in_bf16_are_as_near_the_truth_as_theirs(name, tmp_path, in_float64):
    theirs = made(name, tmp_path, torch.bfloat16)
    tokens = torch.randint(0, 50, (3, 41))
    with torch.no_grad():
        found, other = mambakit.load(tmp_path)(tokens).double(), theirs(tokens).logits.double()
    wide = read(type(theirs), tmp_path, torch.float64)
    exact = in_float64(lambda: wide(tokens).logits)
    # The median over tokens: near a tie, rounding sends a token to another expert, in either model.
    ours, other = ((x - exact).norm(dim=-1).median() for x in (found, other))
    assert ours <= 1.5 * other


@pytest.mark.parametrize("name", TINY)
def test_greedy_text_is_the_same(name, tmp_path):
    theirs, ours = made(name, tmp_path, torch.float32), mambakit.load(tmp_path)
    prompt = torch.randint(0, 50, (2, 9))
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(prompt)  # else it takes tokens 0 of the prompt for padding
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
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    again = read(type(theirs), tmp_path / "back", dtype)
    tokens = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
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
