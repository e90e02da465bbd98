"""GGUF files, read back by the `gguf` package."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from mambakit import LanguageModel, LanguageModelConfig, Mamba1Config, Mamba2Config
from mambakit.config import ConfigError
from mambakit.export import export_gguf

gguf = pytest.importorskip("gguf")

MAMBA1 = LanguageModelConfig(
    vocab_size=300, d_model=64, pattern="2M", mixers={"M": Mamba1Config(d_state=4, dt_rank=5)}
)
MAMBA2 = LanguageModelConfig(
    vocab_size=300,
    d_model=64,
    pattern="2M",
    mixers={"M": Mamba2Config(d_state=8, headdim=16, ngroups=2)},
    tie_embeddings=False,
)
MATRICES = {"embedding", "in_proj", "x_proj", "out_proj", "lm_head"}
TOKENS = {**{chr(i): i for i in range(32, 127)}, "th": 127, "the": 128}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": TOKENS, "merges": [["t", "h"], "th e"]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "added_tokens": [
        {"id": 130, "content": "<|endoftext|>", "special": True},
        {"id": 131, "content": "    ", "special": False},
    ],
}


def make(config: LanguageModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():  # no two tensors alike, none of zeros or ones
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def value(reader, key):
    return reader.get_field(key).contents()


def numbers(tensor):
    """A tensor of a file as float32, in numpy's order of axes."""
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def expected(model) -> dict[str, np.ndarray]:
    """What the file should hold, from names and formulas alone."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        parts = name.split(".")
        last = ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]
        theirs = {
            "embedding.weight": "token_embd.weight",
            "lm_head.weight": "output.weight",
            "norm_f.weight": "output_norm.weight",
            "in_proj.weight": "ssm_in.weight",
            "conv1d.weight": "ssm_conv1d.weight",
            "conv1d.bias": "ssm_conv1d.bias",
            "x_proj.weight": "ssm_x.weight",
            "dt_proj.weight": "ssm_dt.weight",
            "dt_bias": "ssm_dt.bias",
            "A_log": "ssm_a",
            "D": "ssm_d",
            "norm.weight": "ssm_norm.weight" if "mixer" in parts else "attn_norm.weight",
            "out_proj.weight": "ssm_out.weight",
        }[last]
        prefix = f"blk.{parts[2]}." if parts[1] == "blocks" else ""
        values = -tensor.exp() if theirs == "ssm_a" else tensor
        found[prefix + theirs] = values.numpy()
    return found


@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=["mamba", "mamba2"])
def test_every_number_is_in_the_file_bit_for_bit(config, tmp_path):
    model = make(config)
    reader = gguf.GGUFReader(export_gguf(model, tmp_path / "model.gguf"))
    wanted = expected(model)
    assert {tensor.name for tensor in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert numbers(tensor).tobytes() == wanted[tensor.name].tobytes(), tensor.name
    shapes = {tensor.name: tensor.shape[::-1].tolist() for tensor in reader.tensors}
    mixer = config.blocks[0]
    assert shapes["blk.1.ssm_conv1d.weight"] == [len(model.backbone.blocks[1].mixer.conv1d.weight), 4]
    if isinstance(mixer, Mamba2Config):
        assert shapes["blk.0.ssm_a"] == shapes["blk.0.ssm_d"] == [8, 1]
        assert shapes["blk.0.ssm_norm.weight"] == [2, 64]
    name = "mamba" if isinstance(mixer, Mamba1Config) else "mamba2"
    assert value(reader, "general.architecture") == name
    sizes = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": mixer.d_state, "block_count": 2}
    sizes |= {"embedding_length": 64, "vocab_size": 300, "feed_forward_length": 0, "attention.head_count": 0}
    sizes |= {"ssm.time_step_rank": 5} if name == "mamba" else {"ssm.time_step_rank": 8, "ssm.group_count": 2}
    for key, size in sizes.items():
        assert value(reader, f"{name}.{key}") == size, key
    assert value(reader, f"{name}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert value(reader, "tokenizer.ggml.model") == "none"


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_and_nothing_else(dtype, tmp_path):
    model = make(MAMBA2)
    reader = gguf.GGUFReader(export_gguf(model, tmp_path / "model.gguf", dtype=dtype))
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    rounded = {"token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight"}
    for tensor in reader.tensors:
        exact = expected(model)[tensor.name]
        if not any(tensor.name.endswith(name) for name in rounded):
            assert numbers(tensor).tobytes() == exact.tobytes()
            continue
        assert tensor.tensor_type == kind
        if dtype == "q8_0":  # by the format's own words: 32 numbers share a scale, the largest is 127
            rows = exact.reshape(-1, 32)
            scale = np.abs(rows).max(1, keepdims=True) / 127
            steps = np.rint(rows / scale)
            assert np.abs(numbers(tensor).reshape(-1, 32) - steps * scale).max() < 1e-3 * np.abs(rows).max()
            assert np.abs(numbers(tensor).reshape(-1, 32) - rows).max() < 0.51 * scale.max()
        else:
            wanted = torch.tensor(exact).to(torch.float16 if dtype == "f16" else torch.bfloat16)
            assert numbers(tensor).tobytes() == wanted.float().numpy().tobytes()


def test_rows_of_no_whole_blocks_are_written_in_f16(tmp_path):
    mixer = Mamba1Config(d_state=4, dt_rank=5, expand=1.25)  # 80 inner channels: no multiple of 32
    model = make(dataclasses.replace(MAMBA1, mixers={"M": mixer}))
    reader = gguf.GGUFReader(export_gguf(model, tmp_path / "model.gguf", dtype="q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ssm_in.weight"] == "Q8_0" and kinds["blk.0.ssm_out.weight"] == "F16"
    assert kinds["blk.0.ssm_dt.weight"] == "F32"


def test_a_tokeniser_goes_along(tmp_path):
    path = export_gguf(make(MAMBA1), tmp_path / "model.gguf", tokenizer=json.dumps(TOKENIZER), eos=130)
    reader = gguf.GGUFReader(path)
    assert value(reader, "tokenizer.ggml.model") == "gpt2" and value(reader, "tokenizer.ggml.pre") == "gpt-2"
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 300  # the embedding's rows
    assert (tokens[65], kinds[65]) == ("A", 1) and (tokens[128], kinds[128]) == ("the", 1)
    assert (tokens[130], kinds[130]) == ("<|endoftext|>", 3) and (tokens[131], kinds[131]) == ("    ", 4)
    assert (tokens[299], kinds[299]) == ("[PAD299]", 5)
    assert value(reader, "tokenizer.ggml.merges") == ["t h", "th e"]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 130


def test_falcon_mamba_is_mamba_with_norms(tmp_path):
    mixer = Mamba1Config(inner_norm="plain", inner_norm_eps=1e-6)
    model = make(dataclasses.replace(MAMBA1, mixers={"M": mixer}))
    with pytest.warns(UserWarning, match="norm_eps=1e-05 in the norms inside blocks.*inner_norm_eps=1e-06"):
        reader = gguf.GGUFReader(export_gguf(model, tmp_path / "model.gguf"))
    assert value(reader, "mamba.ssm.dt_b_c_rms") is True


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"pattern": "M-"}, "a network of mamba1, mlp blocks has no GGUF form"),
        ({"residual_scale": 0.5}, "residual_scale=0.5 cannot be said to llama.cpp, expected 1.0"),
        ({"mixers": {"M": Mamba1Config(bias=True)}}, "bias=True cannot be said"),
        ({"mixers": {"M": Mamba1Config(inner_norm="learned")}}, "inner_norm='learned'"),
        ({"mixers": {"M": Mamba2Config(headdim=16, dt_limit=(0.0, 0.1))}}, "dt_limit"),
        ({"mixers": {"M": Mamba2Config(headdim=16, gated_norm=False)}}, "gated_norm=False"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(config, reason, tmp_path):
    model = LanguageModel(dataclasses.replace(MAMBA1, **config), device="meta")
    with pytest.raises(ConfigError, match=reason):
        export_gguf(model, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokeniser Whitespace"),
        ({"model": {"type": "Unigram"}}, "a Unigram tokeniser"),
        (
            {"added_tokens": [{"id": 300, "content": "x", "special": True}]},
            "has token 300, but the model knows",
        ),
    ],
)
def test_a_tokeniser_that_llama_cpp_does_not_have_is_refused(change, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        export_gguf(make(MAMBA1), tmp_path / "model.gguf", tokenizer=json.dumps(TOKENIZER | change))


def test_names_that_do_not_exist_and_files_that_do(tmp_path):
    with pytest.raises(ConfigError, match=r"q8_1.*q8_0"):
        export_gguf(make(MAMBA1), tmp_path / "model.gguf", dtype="q8_1")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="exists, expected a new file"):
        export_gguf(make(MAMBA1), tmp_path / "model.gguf")
