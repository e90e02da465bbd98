"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions, plain MLPs and experts, one in a layer.

MLPs and experts square a ReLU and have no gate. A bias on the choice that is no part of the weights keeps the
load of experts even; experts may work on fewer channels than the model (`moe_latent_size`).

Steps of the recurrence are clamped to `time_step_limit`, as where the models were trained; transformers
clamps them to `time_step_min` instead, and in prefill only.

Source: Blakeman et al., "Nemotron-H" (2504.03624). Keys and names: `NemotronHConfig` and
`NemotronHForCausalLM` of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import STACK
from mambakit.families.family import MOST_LAYERS, Family, Layout, Published, Size, give, is_of_type, one_of
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import MLPConfig
from mambakit.layers.moe import MoEConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "norm_eps": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
MIXER = {
    "headdim": "mamba_head_dim",
    "d_state": "ssm_state_size",
    "d_conv": "conv_kernel",
    "ngroups": "n_groups",
    "dt_limit": "time_step_limit",
    "conv_bias": "use_conv_bias",
    "bias": "mamba_proj_bias",
    "norm_eps": "layer_norm_epsilon",
}
ATTENTION = {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
EXPERTS = {
    "n_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "d_hidden": "moe_intermediate_size",
    "d_shared": "moe_shared_expert_intermediate_size",
    "d_latent": "moe_latent_size",
    "normalise": "norm_topk_prob",
    "weight_scale": "routed_scaling_factor",
    "n_groups": "n_group",
    "top_groups": "topk_group",
}
LETTERS = {
    "linear_attention": "M",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
    "mamba": "M",
    "attention": "*",
}
"""Kinds of layers, the last two in the words of older files."""
STANDARD = ("linear_attention", "moe", "full_attention", "moe")
"""What a file without a list means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronHJSON(Published):
    """Keys of transformers' `NemotronHConfig` that describe the network."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    layers_block_type: list[str] | None = None
    hybrid_override_pattern: str | None = None
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    attention_bias: bool = False
    intermediate_size: int = 21504
    mlp_hidden_act: Literal["relu2"] = "relu2"
    mlp_bias: bool = False
    ssm_state_size: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    mamba_hidden_act: Literal["silu"] = "silu"
    n_groups: int = 8
    conv_kernel: int = 4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    use_conv_bias: bool = True
    mamba_proj_bias: bool = False
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def pattern(self) -> str:
        """The kinds of their layers in our letters, which are theirs."""
        if self.hybrid_override_pattern is not None and self.layers_block_type is None:
            letters: Sequence[str] = self.hybrid_override_pattern
        else:
            letters = [LETTERS.get(kind, kind) for kind in self.layers_block_type or STANDARD]
        if not 1 <= len(letters) <= MOST_LAYERS or not set(letters) <= set(LETTERS.values()):
            raise ValueError(f"layers_block_type: {letters}, expected kinds out of {', '.join(LETTERS)}")
        return "".join(letters)

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if self.n_shared_experts != 1:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts}, expected 1")
        expand = self.mamba_num_heads * self.mamba_head_dim / self.hidden_size
        mixers = {
            "M": Mamba2Config(expand=expand, **self.take(MIXER)),
            "*": AttentionConfig(
                rope=None,
                qkv_bias=self.attention_bias,
                out_bias=self.attention_bias,
                **self.take(ATTENTION),
            ),
            "-": MLPConfig(d_hidden=self.intermediate_size, activation="relu2", bias=self.mlp_bias),
        }
        if "E" in self.pattern():
            mixers["E"] = MoEConfig(
                activation="relu2", gated=False, score="sigmoid", balance="bias", **self.take(EXPERTS)
            )
        return LanguageModelConfig(pattern=self.pattern(), mixers=mixers, **self.take(NETWORK))

    @classmethod
    def of(cls, config: LanguageModelConfig) -> NemotronHJSON:
        """Describe a network of ours in their words."""
        blocks, names = config.blocks, {Mamba2Config: "linear_attention", AttentionConfig: "full_attention"}
        names |= {MLPConfig: "mlp", MoEConfig: "moe"}
        if strange := [block for block in blocks if type(block) not in names]:
            raise ValueError(
                f"a block of {type(strange[0]).__name__}, expected Mamba-2, attention, MLPs, experts"
            )
        settings = give(config, NETWORK)
        for kind, keys in ((Mamba2Config, MIXER), (AttentionConfig, ATTENTION), (MoEConfig, EXPERTS)):
            if (found := one_of(blocks, kind)) is not None:
                settings |= give(found, keys)
        if (mamba := one_of(blocks, Mamba2Config)) is not None:
            settings["mamba_num_heads"] = mamba.nheads(config.d_model)
        if (attention := one_of(blocks, AttentionConfig)) is not None:
            settings["attention_bias"] = attention.qkv_bias
        if (mlp := one_of(blocks, MLPConfig)) is not None:
            settings |= {"intermediate_size": mlp.d_hidden, "mlp_bias": mlp.bias}
        return cls(layers_block_type=[names[type(block)] for block in blocks], **settings)


ROWS = (
    Row("embedding.weight", "backbone.embeddings.weight"),
    Row("backbone.blocks.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
    Row("backbone.norm_f.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    Row("backbone.blocks.{i}.mixer.*", "backbone.layers.{i}.mixer.*", kind="mamba2"),
    *(
        Row(f"backbone.blocks.{{i}}.mixer.{ours}.*", f"backbone.layers.{{i}}.mixer.{theirs}.*", kind=kind)
        for kind, ours, theirs in (
            ("attention", "q_proj", "q_proj"),
            ("attention", "k_proj", "k_proj"),
            ("attention", "v_proj", "v_proj"),
            ("attention", "out_proj", "o_proj"),
            ("plain_mlp", "in_proj", "up_proj"),
            ("plain_mlp", "out_proj", "down_proj"),
            ("moe", "router", "gate"),
            ("moe", "to_latent", "fc1_latent_proj"),
            ("moe", "from_latent", "fc2_latent_proj"),
            ("moe", "shared.in_proj", "shared_experts.up_proj"),
            ("moe", "shared.out_proj", "shared_experts.down_proj"),
        )
    ),
    *(
        Row(
            f"backbone.blocks.{{i}}.mixer.{ours}.weight",
            f"backbone.layers.{{i}}.mixer.experts.{{e}}.{theirs}.weight",
            STACK,
            kind="moe",
        )
        for ours, theirs in (("in_proj", "up_proj"), ("out_proj", "down_proj"))
    ),
    Row(
        "backbone.blocks.{i}.mixer.choice_bias",
        "backbone.layers.{i}.mixer.gate.e_score_correction_bias",
        kind="moe",
        keeps_type=True,
    ),
)


def _plain(name: str, parameters: int, pattern: str, **settings: int) -> Size:
    return Size(f"nvidia/{name}", parameters, NemotronHJSON(hybrid_override_pattern=pattern, **settings))


NEMOTRON_H = Family(
    "nemotron_h",
    (
        Layout(
            "transformers",
            is_of_type("nemotron_h"),
            NemotronHJSON,
            ROWS,
            {
                "model_type": "nemotron_h",
                "architectures": ["NemotronHForCausalLM"],
                "mlp_hidden_act": "relu2",
            },
        ),
    ),
    {
        "nemotron-h-8b": _plain(
            "Nemotron-H-8B-Base-8K", 8_100_852_736, "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
        ),
        "nemotron-nano-9b-v2": _plain(
            "NVIDIA-Nemotron-Nano-9B-v2",
            8_888_227_328,
            "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            hidden_size=4480,
            intermediate_size=15680,
            num_attention_heads=40,
            mamba_head_dim=80,
        ),
        "nemotron-3-nano-30b-a3b": Size(
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            31_577_937_344,
            NemotronHJSON(
                hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
                hidden_size=2688,
                num_key_value_heads=2,
                mamba_num_heads=64,
                n_routed_experts=128,
                num_experts_per_tok=6,
                moe_intermediate_size=1856,
                moe_shared_expert_intermediate_size=3712,
                routed_scaling_factor=2.5,
            ),
            active=3_580_073_408,
        ),
    },
)
