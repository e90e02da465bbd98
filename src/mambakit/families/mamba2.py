"""Mamba-2 and Codestral Mamba: a stack of Mamba-2 blocks.

Source: Dao and Gu, "Transformers are SSMs" (2405.21060). Keys and names: `Mamba2Config` and
`Mamba2ForCausalLM` of transformers, and checkpoints of state-spaces/mamba.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from mambakit.checkpoints.mapping import Row
from mambakit.families import mamba_ssm
from mambakit.families.family import Family, Layout, Published, Size, give, is_of_type, only, repeated, whole
from mambakit.families.mamba import NETWORK
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models.language import LanguageModelConfig

MIXER = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
    "norm_eps": "layer_norm_epsilon",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2JSON(Published):
    """Keys of transformers' `Mamba2Config` that describe the network."""

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    expand: float = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["silu", "swish"] = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    tie_word_embeddings: bool = False

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if self.num_heads * self.head_dim != int(self.expand * self.hidden_size):
            raise ValueError(
                f"num_heads={self.num_heads} times head_dim={self.head_dim}, expected "
                f"expand={self.expand} times hidden_size={self.hidden_size}"
            )
        layers, mixer = repeated("M", self.num_hidden_layers), Mamba2Config(**self.take(MIXER))
        return LanguageModelConfig(pattern=layers, mixers={"M": mixer}, **self.take(NETWORK))

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Mamba2JSON:
        """Describe a network of ours in their words."""
        mixer = only(config, Mamba2Config)
        numbers = {"num_heads": mixer.nheads(config.d_model), "expand": whole(mixer.expand)}
        settings = give(config, NETWORK) | give(mixer, MIXER) | numbers
        return cls(num_hidden_layers=len(config.blocks), **settings)


BLOCK = (
    Row("backbone.blocks.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
    Row("backbone.blocks.{i}.mixer.*", "backbone.layers.{i}.mixer.*"),
    Row("backbone.norm_f.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)
TRANSFORMERS = Layout(
    "transformers",
    is_of_type("mamba2"),
    Mamba2JSON,
    (Row("embedding.weight", "backbone.embeddings.weight"), *BLOCK),
    {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_act": "silu"},
)
MAMBA_SSM = Layout(
    "mamba_ssm",
    mamba_ssm.has_layer("Mamba2"),
    mamba_ssm.Mamba2JSON,
    mamba_ssm.rows(BLOCK, Mamba2Config),
    {},
    stores_tied_head=True,
    pickled=True,
)


def _size(name: str, layers: int, width: int, parameters: int) -> Size:
    config = Mamba2JSON(
        num_hidden_layers=layers,
        hidden_size=width,
        num_heads=2 * width // 64,
        n_groups=1,
        vocab_size=50288,
        tie_word_embeddings=True,
    )
    return Size(f"state-spaces/mamba2-{name}", parameters, config)


MAMBA2 = Family(
    "mamba2",
    (TRANSFORMERS, MAMBA_SSM),
    {
        "mamba2-130m": _size("130m", 24, 768, 128_989_632),
        "mamba2-370m": _size("370m", 48, 1024, 368_346_624),
        "mamba2-780m": _size("780m", 48, 1536, 780_161_280),
        "mamba2-1.3b": _size("1.3b", 48, 2048, 1_343_757_312),
        "mamba2-2.7b": _size("2.7b", 64, 2560, 2_702_599_680),
        "mamba2attn-2.7b": Size(
            "state-spaces/mamba2attn-2.7b",
            2_697_590_880,
            mamba_ssm.Mamba2JSON(
                d_model=2560,
                n_layer=64,
                ssm_cfg={"layer": "Mamba2"},
                attn_layer_idx=[9, 18, 27, 36, 45, 56],
                attn_cfg={
                    **{"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False},
                    **{"qkv_proj_bias": False, "rotary_emb_dim": 64},
                },
                pad_vocab_size_multiple=16,
            ),
        ),
        "codestral-mamba-7b": Size("mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648, Mamba2JSON()),
    },
)
