"""Granite 4 hybrids: Mamba-2 or attention, then experts beside an MLP for every token; all branches scaled.

Without experts (`num_local_experts` is 0) the shared MLP remains. A layer of theirs is two blocks of ours.

Keys and names: `GraniteMoeHybridConfig` and `GraniteMoeHybridForCausalLM` of transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import SWAP_HALVES
from mambakit.families.bamba import MAMBA2, Mamba2HybridJSON
from mambakit.families.family import Family, Layout, Size, give, is_of_type, one_of
from mambakit.families.jamba import NETWORK, SELF_ATTENTION
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.moe import MoEConfig
from mambakit.models.language import LanguageModelConfig

SCALES = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
EXPERTS = {
    "n_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "d_hidden": "intermediate_size",
    "d_shared": "shared_intermediate_size",
    "balance_loss": "router_aux_loss_coef",
}
_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteJSON(Mamba2HybridJSON):
    """Keys of transformers' `GraniteMoeHybridConfig` that describe the network."""

    vocab_size: int = 32000
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    shared_intermediate_size: int = 1024
    position_embedding_type: Literal["rope", "nope"] | None = None
    layer_types: list[str] | None = None

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if not 1 <= self.num_hidden_layers <= 10_000:
            raise ValueError(f"{self.num_hidden_layers} layers, expected 1 to 10000")
        layers = self.layer_types or ["linear_attention"] * self.num_hidden_layers
        if len(layers) != self.num_hidden_layers or not set(layers) <= set(_KINDS):
            raise ValueError(
                f"layer_types: {layers}, expected {self.num_hidden_layers} of {', '.join(_KINDS)}"
            )
        feed = "E" if self.num_local_experts else "-"
        return LanguageModelConfig(
            pattern="".join(_KINDS[layer] + feed for layer in layers),
            mixers={
                "M": self.mamba(),
                "*": self.attention(
                    rope=self.theta if self.position_embedding_type == "rope" else None,
                    scale=self.attention_multiplier,
                ),
                feed: MoEConfig(normalise=True, **self.take(EXPERTS))
                if self.num_local_experts
                else GatedMLPConfig(d_hidden=self.shared_intermediate_size),
            },
            residual_in_fp32=False,
            logits_scale=1 / self.logits_scaling,
            **self.take(NETWORK),
            **self.take(SCALES),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> GraniteJSON:
        """Describe a network of ours in their words."""
        blocks = config.blocks
        mlp, experts = one_of(blocks, GatedMLPConfig), one_of(blocks, MoEConfig)
        if (mlp is None) == (experts is None) or len(blocks) % 2:
            raise ValueError(f"pattern {config.pattern!r}, expected pairs of a mixer and experts, or an MLP")
        settings: dict[str, Any] = cls.shared(config) | give(config, SCALES)
        if experts is not None:
            settings |= give(experts, EXPERTS)
        else:
            settings |= {"num_local_experts": 0, "shared_intermediate_size": mlp.d_hidden}
        attention = one_of(blocks, AttentionConfig)
        if attention is not None:
            settings["attention_multiplier"] = attention.scale
            settings["position_embedding_type"] = "rope" if attention.rope is not None else None
        kinds = ["full_attention" if type(b) is AttentionConfig else "linear_attention" for b in blocks[::2]]
        return cls(
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            logits_scaling=1 / config.logits_scale,
            **settings,
        )


_MOE, _OURS = "model.layers.{i}.block_sparse_moe", "backbone.blocks.{2i+1}.mixer"
ROWS = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("backbone.blocks.{2i}.norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("backbone.blocks.{2i+1}.norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("backbone.norm_f.weight", "model.norm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    MAMBA2,
    *SELF_ATTENTION,
    Row(f"{_OURS}.router.weight", f"{_MOE}.router.layer.weight", kind="moe"),
    Row(
        "backbone.blocks.{2i+1}.mixer.in_proj.weight", f"{_MOE}.input_linear.weight", SWAP_HALVES, kind="moe"
    ),
    Row(f"{_OURS}.out_proj.weight", f"{_MOE}.output_linear.weight", kind="moe"),
    *(
        row
        for prefix, kind in (("shared.", "moe"), ("", "mlp"))
        for row in (
            Row(
                f"{_OURS}.{prefix}in_proj.weight",
                "model.layers.{i}.shared_mlp.input_linear.weight",
                SWAP_HALVES,
                kind=kind,
            ),
            Row(
                f"{_OURS}.{prefix}out_proj.weight",
                "model.layers.{i}.shared_mlp.output_linear.weight",
                kind=kind,
            ),
        )
    ),
)

ATTENDS = (5, 15, 25, 35)
"""Layers of attention in all published hybrids."""


def _size(name: str, parameters: int, active: int | None = None, **settings: Any) -> Size:
    layers = ["full_attention" if n in ATTENDS else "linear_attention" for n in range(40)]
    config = GraniteJSON(
        vocab_size=100352,
        num_hidden_layers=40,
        layer_types=layers,
        mamba_d_head=64,
        mamba_d_state=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        **settings,
    )
    return Size(f"ibm-granite/granite-4.0-h-{name}", parameters, config, active)


GRANITE = Family(
    "granitemoehybrid",
    (
        Layout(
            "transformers",
            is_of_type("granitemoehybrid"),
            GraniteJSON,
            ROWS,
            {
                "model_type": "granitemoehybrid",
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "hidden_act": "silu",
            },
        ),
    ),
    {
        "granite-4.0-h-micro": _size(
            "micro",
            3_191_396_096,
            hidden_size=2048,
            num_attention_heads=32,
            num_key_value_heads=8,
            mamba_n_heads=64,
            num_local_experts=0,
            shared_intermediate_size=8192,
            attention_multiplier=0.015625,
            logits_scaling=8.0,
        ),
        "granite-4.0-h-tiny": _size(
            "tiny",
            6_939_037_248,
            1_465_470_528,
            hidden_size=1536,
            num_attention_heads=12,
            num_key_value_heads=4,
            mamba_n_heads=48,
            num_local_experts=64,
            num_experts_per_tok=6,
            intermediate_size=512,
            shared_intermediate_size=1024,
            attention_multiplier=0.0078125,
            logits_scaling=6.0,
        ),
        "granite-4.0-h-small": _size(
            "small",
            32_207_337_984,
            8_803_121_664,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            mamba_n_heads=128,
            num_local_experts=72,
            num_experts_per_tok=10,
            intermediate_size=768,
            shared_intermediate_size=1536,
            attention_multiplier=0.0078125,
            logits_scaling=16.0,
        ),
    },
)
