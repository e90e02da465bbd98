"""GGUF: a language model as one file for llama.cpp, whose architectures `mamba` and `mamba2` are ours.

Matrices are written in the type that is asked for; norms, convolutions and what belongs to the recurrence
stay in float32. What llama.cpp wants differently: decay rates are `-exp(A_log)`, Mamba-2's scalars are
columns, its gated norm has a row per group, a convolution always has a bias, and a tied head is left out.

Names and shapes: the converter and the loader of llama.cpp.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambakit import files
from mambakit.config import ConfigError, unknown
from mambakit.layers.mamba1 import Mamba1, Mamba1Config
from mambakit.layers.mamba2 import Mamba2, Mamba2Config
from mambakit.models.language import LanguageModel, LanguageModelConfig

if TYPE_CHECKING:
    import gguf

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""Types of matrices."""
ARCHITECTURES = {Mamba1Config: "mamba", Mamba2Config: "mamba2"}
CONTEXT = 2**20
"""Tokens that a reader is told it may read; the model knows no limit."""
_MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_out.weight")
# What llama.cpp computes as if it were so: setting -> the only value.
_ONLY_MODEL = {"residual_scale": 1.0, "embedding_scale": 1.0, "logits_scale": 1.0}
_ONLY_MIXER = {
    "bias": (False,),
    "inner_norm": ("none", "plain"),
    "dt_limit": ((0.0, float("inf")),),
    "norm_before_gate": (False,),
    "gated_norm": (True,),
    "in_scales": (None,),
}


def export_gguf(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    dtype: str = "f32",
    tokenizer: str | None = None,
    eos: int | None = None,
    name: str | None = None,
) -> Path:
    """Write a language model for llama.cpp.

    Args:
        model: A stack of Mamba-1 blocks (with Falcon Mamba's inner norms or without) or of Mamba-2 blocks.
        path: The file, which must not exist.
        dtype: Type of the matrices: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`. One whose rows are no whole
            blocks of a quantised type is written in `f16`.
        tokenizer: The text of a `tokenizer.json` of byte-level BPE; without, the file knows numbers only.
        eos: The token that ends a text.
        name: What the model is called.

    Returns:
        The file.

    Raises:
        ConfigError: A network or a tokeniser that llama.cpp does not have, an unknown type, a file that
            exists, or a missing package.
    """
    path = Path(path)
    if dtype not in TYPES:
        raise ConfigError(unknown("type", dtype, TYPES))
    architecture = _architecture(model.config)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, model.config.vocab_size)
    if path.exists():
        raise ConfigError(f"{path} exists, expected a new file")
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"exporting to GGUF needs: pip install 'mambakit[export]' ({error})") from None

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(name or architecture)
        _describe(writer, model)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_vocabulary(writer, vocabulary, eos)
        for tensor_name, tensor in _tensors(model):
            values, kind = _packed(tensor_name, tensor, gguf.GGMLQuantizationType[dtype.upper()])
            writer.add_tensor(tensor_name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, write)
    return path


def _architecture(config: LanguageModelConfig) -> str:
    """llama.cpp's name of the network; refuses what it would compute differently."""
    mixer = config.blocks[0]
    if type(mixer) not in ARCHITECTURES or any(block != mixer for block in config.blocks):
        tags = ", ".join(dict.fromkeys(block.tag for block in config.blocks))
        raise ConfigError(f"a network of {tags} blocks has no GGUF form, expected one kind, mamba1 or mamba2")
    for where, allowed in ((config, {k: (v,) for k, v in _ONLY_MODEL.items()}), (mixer, _ONLY_MIXER)):
        for setting, values in allowed.items():
            value = getattr(where, setting, values[0])
            if value not in values:
                wanted = " or ".join(map(repr, values))
                raise ConfigError(f"{setting}={value!r} cannot be said to llama.cpp, expected {wanted}")
    inner = {Mamba1Config: "inner_norm_eps", Mamba2Config: "norm_eps"}[type(mixer)]
    unused = isinstance(mixer, Mamba1Config) and mixer.inner_norm == "none"
    if not unused and getattr(mixer, inner) != config.norm_eps:
        warnings.warn(
            f"llama.cpp adds the model's norm_eps={config.norm_eps:g} in the norms inside blocks, too, where "
            f"this model has {inner}={getattr(mixer, inner):g}: its results will differ a little",
            stacklevel=3,
        )
    return ARCHITECTURES[type(mixer)]


def _describe(writer: gguf.GGUFWriter, model: LanguageModel) -> None:
    """The sizes of the network."""
    config, mixer = model.config, model.config.blocks[0]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(config.blocks))
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner(config.d_model))
    writer.add_ssm_state_size(mixer.d_state)
    if isinstance(mixer, Mamba1Config):
        writer.add_ssm_time_step_rank(mixer.rank(config.d_model))
        writer.add_ssm_dt_b_c_rms(mixer.inner_norm == "plain")
    else:
        writer.add_ssm_time_step_rank(mixer.nheads(config.d_model))
        writer.add_ssm_group_count(mixer.ngroups)


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, in their shape and in float32."""
    made = {
        "token_embd.weight": model.embedding.weight,
        "output_norm.weight": model.backbone.norm_f.weight,
    }
    if not model.config.tie_embeddings:
        made["output.weight"] = model.lm_head.weight
    for number, block in enumerate(model.backbone.blocks):
        mixer, conv = block.mixer, block.mixer.conv1d
        parts = {
            "attn_norm.weight": block.norm.weight,
            "ssm_in.weight": mixer.in_proj.weight,
            "ssm_conv1d.weight": conv.weight.squeeze(1),
            "ssm_conv1d.bias": conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias,
            "ssm_out.weight": mixer.out_proj.weight,
            **(_mamba1(mixer) if isinstance(mixer, Mamba1) else _mamba2(mixer)),
        }
        made |= {f"blk.{number}.{name}": tensor for name, tensor in parts.items()}
    for name, tensor in made.items():
        yield name, tensor.detach().to("cpu", torch.float32).contiguous()


def _mamba1(mixer: Mamba1) -> dict[str, Tensor]:
    return {
        "ssm_x.weight": mixer.ssm.x_proj.weight,
        "ssm_dt.weight": mixer.ssm.dt_proj.weight,
        "ssm_dt.bias": mixer.ssm.dt_bias,
        "ssm_a": -torch.exp(mixer.ssm.A_log.float()),
        "ssm_d": mixer.ssm.D,
    }


def _mamba2(mixer: Mamba2) -> dict[str, Tensor]:
    return {
        "ssm_dt.bias": mixer.dt_bias,
        "ssm_a": -torch.exp(mixer.A_log.float()).unsqueeze(1),
        "ssm_d": mixer.D.unsqueeze(1),
        "ssm_norm.weight": mixer.norm.weight.unflatten(0, (mixer.config.ngroups, -1)),
    }


def _packed(name: str, tensor: Tensor, wanted: gguf.GGMLQuantizationType) -> tuple[Any, Any]:
    """A tensor's bytes and type: matrices as wanted, everything else in float32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = wanted if name.endswith(_MATRICES) else kinds.F32
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = kinds.F16
    return gguf.quants.quantize(tensor.numpy(), kind), kind


# ---------------------------------------------------------------------------------------------------------
# Tokenisers


def _vocabulary(text: str, size: int) -> dict[str, list[Any]]:
    """Tokens, their types and the merges of a `tokenizer.json`, filled up to `size` tokens."""
    try:
        found = json.loads(text)
        kind, tokens, merges = (found["model"].get(key) for key in ("type", "vocab", "merges"))
        added = found.get("added_tokens") or []
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("not a tokenizer.json: expected an object with a model") from None
    if kind != "BPE" or not _is_byte_level(found.get("pre_tokenizer")):
        raise ConfigError(
            f"a {kind} tokeniser with the pre-tokeniser {_kind(found.get('pre_tokenizer'))} cannot be told "
            "to llama.cpp from here, expected BPE with ByteLevel, as GPT-2 and GPT-NeoX have"
        )
    names = {number: (word, 1) for word, number in tokens.items()}
    names |= {one["id"]: (one["content"], 3 if one["special"] else 4) for one in added}
    if max(names) >= size:
        raise ConfigError(f"the tokeniser has token {max(names)}, but the model knows {size} tokens")
    rows = [names.get(number, (f"[PAD{number}]", 5)) for number in range(size)]
    return {
        "tokens": [word for word, _ in rows],
        "types": [kind for _, kind in rows],
        "merges": [one if isinstance(one, str) else " ".join(one) for one in merges],
    }


def _is_byte_level(part: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokeniser cuts text as GPT-2's does."""
    if part and part.get("type") == "Sequence" and len(part["pretokenizers"]) == 1:
        part = part["pretokenizers"][0]
    return _kind(part) == "ByteLevel" and part.get("use_regex", True) and not part.get("add_prefix_space")


def _kind(part: Mapping[str, Any] | None) -> str:
    return "none" if part is None else part.get("type", "none")


def _add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Mapping[str, list[Any]] | None, eos: int | None
) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_add_bos_token(False)
    if eos is not None:
        writer.add_eos_token_id(eos)
        writer.add_bos_token_id(eos)
