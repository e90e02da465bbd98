"""Bamba: Mamba-2, a few layers of attention with positions on half of each head, and an MLP in every layer.

A layer of theirs is two blocks of ours. Keys and names: `BambaConfig` and `BambaForCausalLM` of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from mambakit.checkpoints.mapping import Row
from mambakit.families.family import (
    Family,
    Layout,
    Published,
    Size,
    give,
    is_of_type,
    one_of,
    rope_theta,
    whole,
)
from mambakit.families.jamba import ATTENTION, FEED_FORWARD, NETWORK, SELF_ATTENTION, SKELETON
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.models.language import LanguageModelConfig

MIXER = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "ngroups": "mamba_n_groups",
    "dt_limit": "time_step_limit",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
}
ROTATED = 0.5
"""Share of a head's channels that turn: fixed in their code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2HybridJSON(Published):
    """Keys that transformers' hybrids of Mamba-2 and attention share, and how they describe the mixers."""

    vocab_size: int = 128000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    mamba_n_heads: int = 128
    mamba_d_head: int | Literal["auto"] = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_expand: float = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None

    def mamba(self) -> Mamba2Config:
        """Their Mamba-2 mixer."""
        inner = int(self.mamba_expand * self.hidden_size)
        headdim = inner // self.mamba_n_heads if self.mamba_d_head == "auto" else self.mamba_d_head
        if self.mamba_n_heads * headdim != inner:
            raise ValueError(
                f"mamba_n_heads={self.mamba_n_heads} of {headdim} channels, expected mamba_expand times "
                f"hidden_size, {inner}, in all"
            )
        return Mamba2Config(headdim=headdim, norm_eps=self.rms_norm_eps, **self.take(MIXER))

    def attention(self, **more: Any) -> AttentionConfig:
        """Their attention."""
        return AttentionConfig(
            qkv_bias=self.attention_bias, out_bias=self.attention_bias, **{**self.take(ATTENTION), **more}
        )

    @property
    def theta(self) -> float:
        """Base of the rotary embedding."""
        return rope_theta(self.rope_parameters, self.rope_theta)

    @staticmethod
    def shared(config: LanguageModelConfig) -> dict[str, Any]:
        """Their keys for what all of these hybrids have."""
        mamba = one_of(config.blocks, Mamba2Config)
        if mamba is None:
            raise ValueError(f"pattern {config.pattern!r}, expected Mamba-2 blocks")
        settings = give(config, NETWORK) | give(mamba, MIXER) | {"mamba_expand": whole(mamba.expand)}
        settings |= {"mamba_d_head": mamba.headdim, "mamba_n_heads": mamba.nheads(config.d_model)}
        attention = one_of(config.blocks, AttentionConfig)
        if attention is not None:
            settings |= give(attention, ATTENTION) | {"attention_bias": attention.qkv_bias}
            theta = attention.rope or 10000.0
            settings |= {
                "rope_theta": theta,
                "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            }
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class BambaJSON(Mamba2HybridJSON):
    """Keys of transformers' `BambaConfig` that describe the network."""

    attn_layer_indices: list[int] | None = None
    mlp_bias: bool = False

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if not 1 <= self.num_hidden_layers <= 10_000:
            raise ValueError(f"{self.num_hidden_layers} layers, expected 1 to 10000")
        attends = set(self.attn_layer_indices or ())
        return LanguageModelConfig(
            pattern="".join("*-" if n in attends else "M-" for n in range(self.num_hidden_layers)),
            mixers={
                "M": self.mamba(),
                "*": self.attention(rope=self.theta, rope_fraction=ROTATED),
                "-": GatedMLPConfig(d_hidden=self.intermediate_size, bias=self.mlp_bias),
            },
            residual_in_fp32=False,
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> BambaJSON:
        """Describe a network of ours in their words."""
        blocks, mlp = config.blocks, one_of(config.blocks, GatedMLPConfig)
        if mlp is None or len(blocks) % 2:
            raise ValueError(f"pattern {config.pattern!r}, expected pairs of a mixer and an MLP")
        return cls(
            num_hidden_layers=len(blocks) // 2,
            attn_layer_indices=[n // 2 for n, block in enumerate(blocks) if type(block) is AttentionConfig],
            intermediate_size=mlp.d_hidden,
            mlp_bias=mlp.bias,
            **cls.shared(config),
        )


MAMBA2 = Row("backbone.blocks.{2i}.mixer.*", "model.layers.{i}.mamba.*", kind="mamba2")

BAMBA = Family(
    "bamba",
    (
        Layout(
            "transformers",
            is_of_type("bamba"),
            BambaJSON,
            (*SKELETON, MAMBA2, *SELF_ATTENTION, *FEED_FORWARD),
            {"model_type": "bamba", "architectures": ["BambaForCausalLM"], "hidden_act": "silu"},
        ),
    ),
    {
        "bamba-9b": Size(
            "ibm-ai-platform/Bamba-9B-v2",
            9_780_235_392,
            BambaJSON(attn_layer_indices=[9, 18, 27], mamba_d_state=128, vocab_size=128256),
        ),
    },
)
