"""Jamba: Mamba-1 with learned inner norms, attention in one layer of eight, experts in every other.

A layer of theirs is two blocks of ours: a mixer, then an MLP or a mixture of experts. There are no positions.

Source: Lieber et al., "Jamba" (2403.19887). Keys and names: `JambaConfig` and `JambaForCausalLM` of
transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import CONCAT, STACK, STACK_CONCAT
from mambakit.families.family import Family, Layout, Published, Size, give, is_of_type, one_of, whole
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.moe import MoEConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
MIXER = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "dt_rank": "mamba_dt_rank",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
    "inner_norm_eps": "rms_norm_eps",
}
ATTENTION = {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
EXPERTS = {
    "n_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "d_hidden": "intermediate_size",
    "balance_loss": "router_aux_loss_coef",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JambaJSON(Published):
    """Keys of transformers' `JambaConfig` that describe the network."""

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    router_aux_loss_coef: float = 0.001
    num_experts_per_tok: int = 2
    num_experts: int = 16
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: float = 2
    mamba_dt_rank: int | Literal["auto"] = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    tie_word_embeddings: bool = False

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        attends = _every(self.attn_layer_period, self.attn_layer_offset, self.num_hidden_layers)
        routes = _every(self.expert_layer_period, self.expert_layer_offset, self.num_hidden_layers)
        routes = routes if self.num_experts > 1 else set()
        pattern = "".join(
            ("*" if n in attends else "M") + ("E" if n in routes else "-")
            for n in range(self.num_hidden_layers)
        )
        mixers = {
            "M": Mamba1Config(inner_norm="learned", **self.take(MIXER)),
            "*": AttentionConfig(rope=None, **self.take(ATTENTION)),
            "-": GatedMLPConfig(d_hidden=self.intermediate_size),
        }
        if routes:
            mixers["E"] = MoEConfig(**self.take(EXPERTS))
        return LanguageModelConfig(
            pattern=pattern, mixers=mixers, residual_in_fp32=False, **self.take(NETWORK)
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> JambaJSON:
        """Describe a network of ours in their words."""
        blocks = config.blocks
        mamba, attention = one_of(blocks, Mamba1Config), one_of(blocks, AttentionConfig)
        mlp, experts = one_of(blocks, GatedMLPConfig), one_of(blocks, MoEConfig)
        if mamba is None or mlp is None or len(blocks) % 2:
            raise ValueError(
                f"pattern {config.pattern!r}, expected pairs of Mamba-1 or attention and an MLP or experts"
            )
        layers = len(blocks) // 2
        settings = give(config, NETWORK) | give(mamba, MIXER) | {"mamba_expand": whole(mamba.expand)}
        settings |= {"rms_norm_eps": config.norm_eps, "intermediate_size": mlp.d_hidden, "num_experts": 1}
        for name, found, kind, keys in (
            ("attn", attention, AttentionConfig, ATTENTION),
            ("expert", experts, MoEConfig, EXPERTS),
        ):
            where = [n // 2 for n, block in enumerate(blocks) if type(block) is kind]
            settings |= {f"{name}_layer_{k}": v for k, v in _period(where, layers).items()}
            settings |= {} if found is None else give(found, keys)
        return cls(num_hidden_layers=layers, **settings)


def _every(period: int, offset: int, layers: int) -> set[int]:
    """The layers whose number leaves `offset` when divided by `period`."""
    if period < 1 or not 1 <= layers <= 10_000:
        raise ValueError(
            f"a period of {period} in {layers} layers, expected at least 1, in 1 to 10000 layers"
        )
    return {n for n in range(layers) if n % period == offset}


def _period(where: Sequence[int], layers: int) -> dict[str, int]:
    """Period and offset of layers; a period that never comes for none."""
    if not where:
        return {"period": layers + 1, "offset": layers}
    return {"period": where[1] - where[0] if len(where) > 1 else layers, "offset": where[0]}


SKELETON = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("backbone.blocks.{2i}.norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("backbone.blocks.{2i+1}.norm.weight", "model.layers.{i}.pre_ff_layernorm.weight"),
    Row("backbone.norm_f.weight", "model.final_layernorm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)
SELF_ATTENTION = (
    Row("backbone.blocks.{2i}.mixer.q_proj.*", "model.layers.{i}.self_attn.q_proj.*", kind="attention"),
    Row("backbone.blocks.{2i}.mixer.k_proj.*", "model.layers.{i}.self_attn.k_proj.*", kind="attention"),
    Row("backbone.blocks.{2i}.mixer.v_proj.*", "model.layers.{i}.self_attn.v_proj.*", kind="attention"),
    Row("backbone.blocks.{2i}.mixer.out_proj.*", "model.layers.{i}.self_attn.o_proj.*", kind="attention"),
)
FEED_FORWARD = (
    Row(
        "backbone.blocks.{2i+1}.mixer.in_proj.*",
        ("model.layers.{i}.feed_forward.up_proj.*", "model.layers.{i}.feed_forward.gate_proj.*"),
        CONCAT,
        kind="mlp",
    ),
    Row("backbone.blocks.{2i+1}.mixer.out_proj.*", "model.layers.{i}.feed_forward.down_proj.*", kind="mlp"),
)
_MAMBA = (
    Row("backbone.blocks.{2i}.mixer.in_proj.*", "model.layers.{i}.mamba.in_proj.*", kind="mamba1"),
    Row("backbone.blocks.{2i}.mixer.conv1d.*", "model.layers.{i}.mamba.conv1d.*", kind="mamba1"),
    Row("backbone.blocks.{2i}.mixer.out_proj.*", "model.layers.{i}.mamba.out_proj.*", kind="mamba1"),
    *(
        Row(f"backbone.blocks.{{2i}}.mixer.ssm.{ours}", f"model.layers.{{i}}.mamba.{theirs}", kind="mamba1")
        for ours, theirs in (
            ("x_proj.weight", "x_proj.weight"),
            ("dt_proj.weight", "dt_proj.weight"),
            ("dt_bias", "dt_proj.bias"),
            ("A_log", "A_log"),
            ("D", "D"),
            ("dt_norm.weight", "dt_layernorm.weight"),
            ("B_norm.weight", "b_layernorm.weight"),
            ("C_norm.weight", "c_layernorm.weight"),
        )
    ),
)
_EXPERTS = (
    Row(
        "backbone.blocks.{2i+1}.mixer.router.weight",
        "model.layers.{i}.feed_forward.router.weight",
        kind="moe",
    ),
    Row(
        "backbone.blocks.{2i+1}.mixer.in_proj.weight",
        (
            "model.layers.{i}.feed_forward.experts.{e}.up_proj.weight",
            "model.layers.{i}.feed_forward.experts.{e}.gate_proj.weight",
        ),
        STACK_CONCAT,
        kind="moe",
    ),
    Row(
        "backbone.blocks.{2i+1}.mixer.out_proj.weight",
        "model.layers.{i}.feed_forward.experts.{e}.down_proj.weight",
        STACK,
        kind="moe",
    ),
)

JAMBA = Family(
    "jamba",
    (
        Layout(
            "transformers",
            is_of_type("jamba"),
            JambaJSON,
            (*SKELETON, *_MAMBA, *SELF_ATTENTION, *FEED_FORWARD, *_EXPERTS),
            {"model_type": "jamba", "architectures": ["JambaForCausalLM"], "hidden_act": "silu"},
        ),
    ),
    {
        "jamba-v0.1": Size("ai21labs/Jamba-v0.1", 51_570_323_328, JambaJSON(), active=12_110_311_296),
        "jamba-1.5-mini": Size(
            "ai21labs/AI21-Jamba-1.5-Mini", 51_570_323_328, JambaJSON(), active=12_110_311_296
        ),
        "jamba-1.5-large": Size(
            "ai21labs/AI21-Jamba-1.5-Large",
            398_555_145_696,
            JambaJSON(
                hidden_size=8192,
                intermediate_size=24576,
                num_hidden_layers=72,
                num_attention_heads=64,
            ),
            active=94_149_338_592,
        ),
    },
)
