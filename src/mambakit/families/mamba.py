"""Mamba: a stack of Mamba-1 blocks.

Source: Gu and Dao, "Mamba" (2312.00752). Keys and names: `MambaConfig` and `MambaForCausalLM` of
transformers, and checkpoints of state-spaces/mamba.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mambakit.checkpoints.mapping import Row
from mambakit.families import mamba_ssm
from mambakit.families.family import Family, Layout, Published, Size, give, is_of_type, only, repeated, whole
from mambakit.layers.mamba1 import Mamba1Config
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
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaJSON(Published):
    """Keys of transformers' `MambaConfig` that describe the network."""

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    expand: float = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["silu", "swish"] = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: Literal["random", "constant"] = "random"
    time_step_floor: float = 1e-4
    tie_word_embeddings: bool = True

    def mixer(self) -> Mamba1Config:
        """The settings of every block."""
        return Mamba1Config(**self.take(MIXER))

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        layers = repeated("M", self.num_hidden_layers)
        return LanguageModelConfig(pattern=layers, mixers={"M": self.mixer()}, **self.take(NETWORK))

    @classmethod
    def of(cls, config: LanguageModelConfig, **more: Any) -> MambaJSON:
        """Describe a network of ours in their words."""
        mixer = only(config, Mamba1Config)
        settings = give(config, NETWORK) | give(mixer, MIXER) | {"expand": whole(mixer.expand)} | more
        return cls(num_hidden_layers=len(config.blocks), **settings)


BLOCK = (
    Row("backbone.blocks.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
    Row("backbone.blocks.{i}.mixer.in_proj.*", "backbone.layers.{i}.mixer.in_proj.*"),
    Row("backbone.blocks.{i}.mixer.conv1d.*", "backbone.layers.{i}.mixer.conv1d.*"),
    Row("backbone.blocks.{i}.mixer.ssm.x_proj.weight", "backbone.layers.{i}.mixer.x_proj.weight"),
    Row("backbone.blocks.{i}.mixer.ssm.dt_proj.weight", "backbone.layers.{i}.mixer.dt_proj.weight"),
    Row("backbone.blocks.{i}.mixer.ssm.dt_bias", "backbone.layers.{i}.mixer.dt_proj.bias"),
    Row("backbone.blocks.{i}.mixer.ssm.A_log", "backbone.layers.{i}.mixer.A_log"),
    Row("backbone.blocks.{i}.mixer.ssm.D", "backbone.layers.{i}.mixer.D"),
    Row("backbone.blocks.{i}.mixer.out_proj.*", "backbone.layers.{i}.mixer.out_proj.*"),
    Row("backbone.norm_f.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)
ROWS = (Row("embedding.weight", "backbone.embeddings.weight"), *BLOCK)
TRANSFORMERS = Layout(
    "transformers",
    is_of_type("mamba"),
    MambaJSON,
    ROWS,
    {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_act": "silu"},
)
MAMBA_SSM = Layout(
    "mamba_ssm",
    mamba_ssm.has_layer("Mamba1"),
    mamba_ssm.Mamba1JSON,
    mamba_ssm.rows(BLOCK, Mamba1Config),
    {},
    stores_tied_head=True,
    pickled=True,
)


def _size(name: str, layers: int, width: int, parameters: int) -> Size:
    return Size(
        f"state-spaces/mamba-{name}-hf", parameters, MambaJSON(num_hidden_layers=layers, hidden_size=width)
    )


MAMBA = Family(
    "mamba",
    (TRANSFORMERS, MAMBA_SSM),
    {
        "mamba-130m": _size("130m", 24, 768, 129_135_360),
        "mamba-370m": _size("370m", 48, 1024, 371_516_416),
        "mamba-790m": _size("790m", 48, 1536, 793_204_224),
        "mamba-1.4b": _size("1.4b", 48, 2048, 1_372_178_432),
        "mamba-2.8b": _size("2.8b", 64, 2560, 2_768_345_600),
    },
)
