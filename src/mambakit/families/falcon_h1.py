"""Falcon-H1: Mamba-2 and attention side by side in every layer, then an MLP, with factors everywhere.

The factors come from training at several widths (maximal update parametrisation). A layer of theirs is two
blocks of ours.

Source: Falcon-LLM team, "Falcon-H1" (2507.22448). Keys and names: `FalconH1Config` and `FalconH1ForCausalLM`
of transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mambakit.checkpoints.mapping import Row
from mambakit.families.bamba import MIXER, Mamba2HybridJSON
from mambakit.families.family import Family, Layout, Size, give, is_of_type, one_of, repeated
from mambakit.families.jamba import ATTENTION, FEED_FORWARD, NETWORK, SKELETON
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.parallel import ParallelConfig
from mambakit.models.language import LanguageModelConfig

SCALES = {"embedding_scale": "embedding_multiplier", "logits_scale": "lm_head_multiplier"}
_ONES = (1.0, 1.0, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconH1JSON(Mamba2HybridJSON):
    """Keys of transformers' `FalconH1Config` that describe the network."""

    mamba_d_ssm: int | None = 1024
    mamba_norm_before_gate: bool = True
    mamba_rms_norm: bool = False
    mlp_bias: bool = False
    projectors_bias: bool = False
    lm_head_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    mlp_multipliers: tuple[float, float] | None = None
    key_multiplier: float | None = None
    attention_in_multiplier: float | None = None
    attention_out_multiplier: float | None = None
    ssm_in_multiplier: float | None = None
    ssm_out_multiplier: float | None = None
    ssm_multipliers: tuple[float, float, float, float, float] | None = None

    def mamba(self) -> Mamba2Config:
        """Their Mamba-2 mixer, whose width is a setting of its own."""
        inner = self.mamba_d_ssm or int(self.mamba_expand * self.hidden_size)
        headdim = inner // self.mamba_n_heads if self.mamba_d_head == "auto" else self.mamba_d_head
        if headdim * self.mamba_n_heads != inner:
            raise ValueError(
                f"mamba_n_heads={self.mamba_n_heads} of {headdim} channels, expected {inner} in all"
            )
        settings = {**self.take(MIXER), "expand": inner / self.hidden_size}
        return Mamba2Config(
            headdim=headdim,
            norm_eps=self.rms_norm_eps,
            norm_before_gate=self.mamba_norm_before_gate,
            gated_norm=self.mamba_rms_norm,
            in_scales=None if self.ssm_multipliers in (None, _ONES) else self.ssm_multipliers,
            **settings,
        )

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        gate, down = self.mlp_multipliers or (1.0, 1.0)
        key = 1.0 if self.key_multiplier is None else self.key_multiplier
        ins = {"mamba": self.ssm_in_multiplier, "self_attn": self.attention_in_multiplier}
        outs = {"mamba": self.ssm_out_multiplier, "self_attn": self.attention_out_multiplier}
        parallel = ParallelConfig(
            branches={
                "mamba": self.mamba(),
                "self_attn": self.attention(rope=self.theta, key_scale=key),
            },
            in_scales={name: scale for name, scale in ins.items() if scale not in (None, 1.0)},
            out_scales={name: scale for name, scale in outs.items() if scale not in (None, 1.0)},
        )
        mlp = GatedMLPConfig(
            d_hidden=self.intermediate_size, bias=self.mlp_bias, gate_scale=gate, out_scale=down
        )
        return LanguageModelConfig(
            pattern=repeated("P-", self.num_hidden_layers),
            mixers={"P": parallel, "-": mlp},
            residual_in_fp32=False,
            **self.take(NETWORK),
            **self.take(SCALES),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> FalconH1JSON:
        """Describe a network of ours in their words."""
        parallel, mlp = one_of(config.blocks, ParallelConfig), one_of(config.blocks, GatedMLPConfig)
        if parallel is None or mlp is None or set(parallel.branches) != {"mamba", "self_attn"}:
            raise ValueError(f"pattern {config.pattern!r}, expected Mamba-2 beside attention, and MLPs")
        mamba, attention = parallel.branches["mamba"], parallel.branches["self_attn"]
        if not isinstance(mamba, Mamba2Config) or not isinstance(attention, AttentionConfig):
            raise ValueError("expected Mamba-2 beside attention")
        settings: dict[str, Any] = give(config, NETWORK) | give(config, SCALES) | give(mamba, MIXER)
        settings |= give(attention, ATTENTION) | {"mlp_bias": mlp.bias, "intermediate_size": mlp.d_hidden}
        theta = attention.rope or 10000.0
        return cls(
            **{**settings, "mamba_expand": 2},
            num_hidden_layers=len(config.blocks) // 2,
            mamba_d_ssm=mamba.d_inner(config.d_model),
            mamba_d_head=mamba.headdim,
            mamba_n_heads=mamba.nheads(config.d_model),
            mamba_norm_before_gate=mamba.norm_before_gate,
            mamba_rms_norm=mamba.gated_norm,
            attention_bias=attention.qkv_bias,
            rope_theta=theta,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
            mlp_multipliers=(mlp.gate_scale, mlp.out_scale),
            key_multiplier=attention.key_scale,
            ssm_multipliers=mamba.in_scales or _ONES,
            ssm_in_multiplier=parallel.in_scales.get("mamba", 1.0),
            ssm_out_multiplier=parallel.out_scales.get("mamba", 1.0),
            attention_in_multiplier=parallel.in_scales.get("self_attn", 1.0),
            attention_out_multiplier=parallel.out_scales.get("self_attn", 1.0),
        )


_OURS, _THEIRS = "backbone.blocks.{2i}.mixer.branches", "model.layers.{i}"
ROWS = (
    *SKELETON,
    *FEED_FORWARD,
    Row(f"{_OURS}.mamba.*", f"{_THEIRS}.mamba.*"),
    *(
        Row(f"{_OURS}.self_attn.{ours}.*", f"{_THEIRS}.self_attn.{theirs}.*")
        for ours, theirs in (
            *(("q_proj", "q_proj"), ("k_proj", "k_proj")),
            *(("v_proj", "v_proj"), ("out_proj", "o_proj")),
        )
    ),
)


def _size(name: str, parameters: int, **settings: Any) -> Size:
    """A size; the factors of its training, which change no number of parameters, are in its file only."""
    config = FalconH1JSON(num_key_value_heads=2, rope_theta=1e11, **settings)
    return Size(f"tiiuae/Falcon-H1-{name}-Base", parameters, config)


FALCON_H1 = Family(
    "falcon_h1",
    (
        Layout(
            "transformers",
            is_of_type("falcon_h1"),
            FalconH1JSON,
            ROWS,
            {"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"], "hidden_act": "silu"},
        ),
    ),
    {
        "falcon-h1-0.5b": _size(
            "0.5B",
            521_411_104,
            vocab_size=32784,
            hidden_size=1024,
            num_hidden_layers=36,
            intermediate_size=2048,
            num_attention_heads=8,
            head_dim=64,
            mamba_d_ssm=1536,
            mamba_n_heads=24,
            mamba_d_state=128,
        ),
        "falcon-h1-7b": _size(
            "7B",
            7_585_513_568,
            vocab_size=130048,
            hidden_size=3072,
            num_hidden_layers=44,
            intermediate_size=12288,
            num_attention_heads=12,
            head_dim=128,
            mamba_d_ssm=3072,
            mamba_n_heads=24,
        ),
    },
)
