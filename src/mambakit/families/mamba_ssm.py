"""The `config.json` of state-spaces/mamba (mamba_ssm), shared by its Mamba-1 and Mamba-2 checkpoints.

`ssm_cfg` holds arguments of the layer; the vocabulary is rounded up to `pad_vocab_size_multiple`. Options
that change the network and have no counterpart here are refused, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mambakit.config import unknown
from mambakit.families.family import Published, give, only, repeated
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mixer import MixerConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {"d_model": "d_model", "residual_in_fp32": "residual_in_fp32", "tie_embeddings": "tie_embeddings"}
SPEED_ONLY = frozenset({"layer", "use_fast_path", "chunk_size", "use_mem_eff_path"})
"""Keys of `ssm_cfg` that choose an implementation, not a network."""


def has_layer(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """A test for a mamba_ssm configuration with this kind of layer; a missing kind is Mamba-1."""

    def matches(found: Mapping[str, Any]) -> bool:
        settings = found.get("ssm_cfg") or {}
        layer = settings.get("layer", "Mamba1") if isinstance(settings, Mapping) else "Mamba1"
        return "model_type" not in found and "d_model" in found and "n_layer" in found and layer == name

    return matches


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaSSMJSON(Published):
    """Keys of mamba_ssm's `MambaConfig`."""

    kind: ClassVar[type[MixerConfig]]
    arguments: ClassVar[frozenset[str]]  # of the layer; their names are ours

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] | None = None
    attn_layer_idx: list[int] | None = None
    rms_norm: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        for key, value, only_value in (
            ("rms_norm", self.rms_norm, True),
            ("d_intermediate", self.d_intermediate, 0),
            ("attn_layer_idx", list(self.attn_layer_idx or []), []),
        ):
            if value != only_value:
                raise ValueError(f"{key} is {value}, expected {only_value}: no other is supported yet")
        if self.pad_vocab_size_multiple < 1:
            raise ValueError(
                f"pad_vocab_size_multiple is {self.pad_vocab_size_multiple}, expected at least 1"
            )
        padded = -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple
        return LanguageModelConfig(
            vocab_size=padded,
            pattern=repeated("M", self.n_layer),
            mixers={"M": self.kind.from_dict(self._arguments(), where="ssm_cfg")},
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> MambaSSMJSON:
        """Describe a network of ours in their words."""
        mixer, standard = only(config, cls.kind), cls.kind()
        changed = {
            field.name: getattr(mixer, field.name)
            for field in dataclasses.fields(mixer)
            if field.name in cls.arguments and getattr(mixer, field.name) != getattr(standard, field.name)
        }
        return cls(
            n_layer=len(config.blocks),
            vocab_size=config.vocab_size,
            pad_vocab_size_multiple=1,
            ssm_cfg={"layer": cls.__name__.removesuffix("JSON"), **changed},
            attn_layer_idx=[],
            **give(config, NETWORK),
        )

    def _arguments(self) -> dict[str, Any]:
        settings = {k: v for k, v in (self.ssm_cfg or {}).items() if k not in SPEED_ONLY}
        for key in settings:
            if key not in self.arguments:
                raise ValueError(f"ssm_cfg: {unknown('argument', key, self.arguments)}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


_COMMON = frozenset({"d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "conv_bias", "bias"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1JSON(MambaSSMJSON):
    """A stack of mamba_ssm's `Mamba`."""

    kind = Mamba1Config
    arguments = _COMMON | {"dt_rank", "dt_init", "dt_scale"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2JSON(MambaSSMJSON):
    """A stack of mamba_ssm's `Mamba2`."""

    kind = Mamba2Config
    arguments = _COMMON | {"headdim", "ngroups", "A_init_range", "norm_before_gate", "dt_limit"}
