"""The `config.json` of state-spaces/mamba (mamba_ssm), shared by its Mamba-1, 2 and 3 checkpoints.

`ssm_cfg` holds arguments of the layer; a gated MLP follows every layer where `d_intermediate` is not 0; the
vocabulary is rounded up to `pad_vocab_size_multiple`. Options that change the network and have no counterpart
here are refused, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from mambakit.checkpoints.mapping import Row
from mambakit.config import unknown
from mambakit.families.family import Published, give, one_of, repeated
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mamba3 import Mamba3Config
from mambakit.layers.mixer import MixerConfig
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {"d_model": "d_model", "residual_in_fp32": "residual_in_fp32", "tie_embeddings": "tie_embeddings"}
SPEED_ONLY = frozenset(
    {"layer", "use_fast_path", "chunk_size", "use_mem_eff_path", "fuse_pregate_headwise_norm"}
)
"""Keys of `ssm_cfg` that choose an implementation, not a network."""
_MLP_MULTIPLE = 128
"""Hidden channels of their MLP are rounded up to a multiple of this."""
_MLP = (
    Row("backbone.blocks.{n}.norm.weight", "backbone.layers.{i}.norm2.weight", kind="mlp"),
    Row("backbone.blocks.{n}.mixer.in_proj.weight", "backbone.layers.{i}.mlp.fc1.weight", kind="mlp"),
    Row("backbone.blocks.{n}.mixer.out_proj.weight", "backbone.layers.{i}.mlp.fc2.weight", kind="mlp"),
)


def rows(block: Iterable[Row], kind: type[MixerConfig]) -> tuple[Row, ...]:
    """The tensors of a checkpoint, from rows of a stack of mixers without MLPs, whose blocks are `{i}`."""
    mixers = (
        dataclasses.replace(row, ours=row.ours.replace("{i}", "{n}"), kind=kind.tag)
        if "{i}" in row.ours
        else row
        for row in block
    )
    return (Row("embedding.weight", "backbone.embedding.weight"), *mixers, *_MLP)


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
            ("attn_layer_idx", list(self.attn_layer_idx or []), []),
        ):
            if value != only_value:
                raise ValueError(f"{key} is {value}, expected {only_value}: no other is supported yet")
        if self.pad_vocab_size_multiple < 1:
            raise ValueError(
                f"pad_vocab_size_multiple is {self.pad_vocab_size_multiple}, expected at least 1"
            )
        padded = -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple
        mixers = {"M": self.kind.from_dict(self._arguments(), where="ssm_cfg")}
        if self.d_intermediate:
            mixers["-"] = GatedMLPConfig(d_hidden=-(-self.d_intermediate // _MLP_MULTIPLE) * _MLP_MULTIPLE)
        return LanguageModelConfig(
            vocab_size=padded,
            pattern=repeated("".join(mixers), self.n_layer),
            mixers=mixers,
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> MambaSSMJSON:
        """Describe a network of ours in their words."""
        mixer, mlp = one_of(config.blocks, cls.kind), one_of(config.blocks, GatedMLPConfig)
        if mixer is None:
            raise ValueError(f"pattern {config.pattern!r}, expected blocks of a {cls.kind.__name__}")
        return cls(
            n_layer=sum(type(block) is cls.kind for block in config.blocks),
            d_intermediate=0 if mlp is None else mlp.hidden(config.d_model),
            vocab_size=config.vocab_size,
            pad_vocab_size_multiple=1,
            ssm_cfg={"layer": cls.__name__.removesuffix("JSON"), **cls._changed(mixer)},
            attn_layer_idx=[],
            **give(config, NETWORK),
        )

    @classmethod
    def _changed(cls, mixer: MixerConfig) -> dict[str, Any]:
        """Arguments of the layer that differ from its defaults."""
        given = {name: getattr(mixer, name) for name in sorted(cls.arguments) if hasattr(mixer, name)}
        return {name: value for name, value in given.items() if value != getattr(cls.kind(), name)}

    def _arguments(self) -> dict[str, Any]:
        """Settings of our mixer."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba3JSON(MambaSSMJSON):
    """A stack of mamba_ssm's `Mamba3`.

    `a_activation` is a key of ours: theirs is a constant of the code, which changed from softplus to the
    heavy tail in June 2026, and no file says which it was trained with. Without the key it is softplus.
    """

    kind = Mamba3Config
    arguments = frozenset(
        {"d_state", "expand", "headdim", "ngroups", "rope_fraction", "A_floor", "dt_min", "dt_max"}
        | {"dt_init_floor", "is_outproj_norm", "is_mimo", "mimo_rank", "a_activation"}
    )

    @classmethod
    def _changed(cls, mixer: MixerConfig) -> dict[str, Any]:
        changed = super()._changed(mixer)
        # Their kernels hold chunk times rank rows in a GPU's shared memory.
        return changed | ({"is_mimo": True, "chunk_size": 64 // mixer.rank} if "mimo_rank" in changed else {})

    def _arguments(self) -> dict[str, Any]:
        settings = {"is_mimo": False, "mimo_rank": 4} | super()._arguments()
        if not isinstance(settings["is_mimo"], bool):
            raise ValueError(f"ssm_cfg: is_mimo is {settings['is_mimo']!r}, expected true or false")
        return settings if settings.pop("is_mimo") else settings | {"mimo_rank": None}
