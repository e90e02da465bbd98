"""Which settings of a model the decoders follow that compute its blocks by themselves.

What they do not know must have its default, so that a setting which is added later is refused, not ignored.
"""

from __future__ import annotations

import dataclasses

from mambakit.config import Config
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.models.language import LanguageModelConfig

_START = frozenset({"dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "A_init_range"})
KNOWN: dict[type[Config], frozenset[str]] = {
    LanguageModelConfig: frozenset(
        {"vocab_size", "d_model", "pattern", "mixers", "norm_eps", "residual_in_fp32", "dropout"}
        | {"tie_embeddings", "initializer_range"}
    ),
    Mamba1Config: _START | {"d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"},
    Mamba2Config: _START
    | {"d_state", "d_conv", "expand", "headdim", "ngroups", "dt_limit", "norm_eps", "norm_before_gate"}
    | {"conv_bias", "bias"},
    GatedMLPConfig: frozenset({"expand", "multiple_of", "d_hidden", "activation", "bias"}),
}
"""Settings that are followed, or that do not matter for decoding."""


def unknown_setting(config: Config) -> str | None:
    """Name a setting that asks for something these decoders do not compute.

    Args:
        config: Of a language model or a mixer.

    Returns:
        `name=value`, or `None`.
    """
    known = KNOWN.get(type(config), frozenset())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != field.default:
            return f"{field.name}={value}"
    return None
