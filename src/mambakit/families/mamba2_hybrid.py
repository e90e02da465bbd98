"""NVIDIA's Mamba-2-Hybrid 8B and its pure sister: Mamba-2, four layers of attention, and plain MLPs.

Attention has no positions, MLPs activate with GELU and have no gate, nothing has biases. The checkpoints are
Megatron-LM's: norms are kept with the linear layer behind them, queries, keys and values in one matrix, group
by group.

The keys are Megatron-LM's options. A published folder has no `config.json`; without one it is taken for the
hybrid, and one with `{"model_type": "mamba2_hybrid", "hybrid_override_pattern": "MMM..."}` describes others.

Source: Waleffe et al., "An empirical study of Mamba-based language models" (2406.07887), section 2.
"""

from __future__ import annotations

import dataclasses

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import groups_apart
from mambakit.families.family import MOST_LAYERS, Family, Layout, Published, Size, give, is_of_type, one_of
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import MLPConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {"vocab_size": "padded_vocab_size", "d_model": "hidden_size", "norm_eps": "layernorm_epsilon"}
MIXER = {"d_state": "mamba_state_dim", "headdim": "mamba_head_dim", "ngroups": "mamba_num_groups"}
ATTENTION = {"n_heads": "num_attention_heads", "n_kv_heads": "num_query_groups", "head_dim": "kv_channels"}
PATTERN = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
_LETTERS = {Mamba2Config: "M", AttentionConfig: "*", MLPConfig: "-"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2HybridOptions(Published):
    """Options of Megatron-LM that describe the network; the defaults are those of the 8B hybrid."""

    padded_vocab_size: int = 256000
    hidden_size: int = 4096
    ffn_hidden_size: int = 16384
    hybrid_override_pattern: str = PATTERN
    num_attention_heads: int = 32
    num_query_groups: int = 8
    kv_channels: int = 128
    mamba_state_dim: int = 128
    mamba_head_dim: int = 64
    mamba_num_groups: int = 8
    layernorm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        pattern = self.hybrid_override_pattern
        if not 1 <= len(pattern) <= MOST_LAYERS or not set(pattern) <= set(_LETTERS.values()):
            raise ValueError(f"hybrid_override_pattern is {pattern[:80]!r}, expected letters M, * and -")
        return LanguageModelConfig(
            pattern=pattern,
            mixers={
                "M": Mamba2Config(norm_eps=self.layernorm_epsilon, **self.take(MIXER)),
                "*": AttentionConfig(rope=None, **self.take(ATTENTION)),
                "-": MLPConfig(d_hidden=self.ffn_hidden_size, activation="gelu"),
            },
            residual_in_fp32=False,
            tie_embeddings=not self.untie_embeddings_and_output_weights,
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Mamba2HybridOptions:
        """Describe a network of ours in their words."""
        blocks, settings = config.blocks, give(config, NETWORK)
        if strange := [block for block in blocks if type(block) not in _LETTERS]:
            raise ValueError(
                f"a block of {type(strange[0]).__name__}, expected Mamba-2, attention, plain MLPs"
            )
        for kind, keys in ((Mamba2Config, MIXER), (AttentionConfig, ATTENTION)):
            if (found := one_of(blocks, kind)) is not None:
                settings |= give(found, keys)
        if (mlp := one_of(blocks, MLPConfig)) is not None:
            settings["ffn_hidden_size"] = mlp.d_hidden
        return cls(
            hybrid_override_pattern="".join(_LETTERS[type(block)] for block in blocks),
            untie_embeddings_and_output_weights=not config.tie_embeddings,
            **settings,
        )


def rows(config: LanguageModelConfig) -> tuple[Row, ...]:
    """The tensors of a network."""
    ours, theirs, attention = (
        "backbone.blocks.{i}",
        "decoder.layers.{i}",
        one_of(config.blocks, AttentionConfig),
    )
    found = [
        Row("embedding.weight", "embedding.word_embeddings.weight"),
        Row("lm_head.weight", "output_layer.weight"),
        Row("backbone.norm_f.weight", "decoder.final_norm.weight"),
        Row(f"{ours}.norm.weight", f"{theirs}.norm.weight", kind="mamba2"),
        Row(f"{ours}.mixer.*", f"{theirs}.mixer.*", kind="mamba2"),
        Row(f"{ours}.norm.weight", f"{theirs}.mlp.linear_fc1.layer_norm_weight", kind="plain_mlp"),
        Row(f"{ours}.mixer.in_proj.weight", f"{theirs}.mlp.linear_fc1.weight", kind="plain_mlp"),
        Row(f"{ours}.mixer.out_proj.weight", f"{theirs}.mlp.linear_fc2.weight", kind="plain_mlp"),
    ]
    if attention is not None:
        norm, kind = f"{theirs}.self_attention.linear_qkv.layer_norm_weight", "attention"
        qkv = tuple(f"{ours}.mixer.{name}_proj.weight" for name in "qkv")
        fused, out = (
            f"{theirs}.self_attention.linear_qkv.weight",
            f"{theirs}.self_attention.linear_proj.weight",
        )
        found += [
            Row(f"{ours}.norm.weight", norm, kind=kind),
            Row(qkv, fused, groups_apart(attention.kv_heads), kind),
            Row(f"{ours}.mixer.out_proj.weight", out, kind=kind),
        ]
    return tuple(found)


MAMBA2_HYBRID = Family(
    "mamba2_hybrid",
    (
        Layout(
            "megatron",
            is_of_type("mamba2_hybrid"),
            Mamba2HybridOptions,
            rows,
            {"model_type": "mamba2_hybrid"},
            pickled=True,
            wrapped=True,
        ),
    ),
    {
        "mamba2-hybrid-8b": Size("nvidia/mamba2-hybrid-8b-3t-4k", 8_654_517_248, Mamba2HybridOptions()),
        "mamba2-8b": Size(
            "nvidia/mamba2-8b-3t-4k", 8_236_999_680, Mamba2HybridOptions(hybrid_override_pattern=56 * "M")
        ),
    },
)
