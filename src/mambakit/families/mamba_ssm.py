"""The `config.json` of state-spaces/mamba (mamba_ssm), shared by its Mamba-1, 2 and 3 checkpoints.

`ssm_cfg` holds arguments of the layer, and `attn_cfg` those of attention, which stands in the layers of
`attn_layer_idx` instead; a gated MLP follows every layer where `d_intermediate` is not 0; the vocabulary is
rounded up to `pad_vocab_size_multiple`. Options that change the network and have no counterpart
here are refused, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import ROWS_APART
from mambakit.config import unknown
from mambakit.families.family import MOST_LAYERS, Published, give, one_of
from mambakit.layers.attention import AttentionConfig
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
ATTENTION = {
    "n_heads": "num_heads",
    "n_kv_heads": "num_heads_kv",
    "head_dim": "head_dim",
    "scale": "softmax_scale",
    "causal": "causal",
    "rope_interleaved": "rotary_emb_interleaved",
    "qkv_bias": "qkv_proj_bias",
    "out_bias": "out_proj_bias",
}
ATTENTION_DEFAULTS: dict[str, Any] = {
    **{"num_heads": None, "num_heads_kv": None, "head_dim": None, "softmax_scale": None, "causal": False},
    **{"rotary_emb_interleaved": False, "qkv_proj_bias": True, "out_proj_bias": True, "d_conv": 0},
    **{"rotary_emb_dim": 0, "rotary_emb_base": 10000.0, "mlp_dim": 0},
}
"""Arguments of their attention, with their defaults."""


def rows(block: Iterable[Row], kind: type[MixerConfig]) -> Callable[[LanguageModelConfig], tuple[Row, ...]]:
    """The tensors of a checkpoint.

    Args:
        block: Rows of a stack of mixers, whose blocks are `{i}`.
        kind: The mixer.

    Returns:
        The rows of a network, with its MLPs and attention.
    """
    mixers = [row for row in block if ".mixer." in row.ours]

    def of(config: LanguageModelConfig) -> tuple[Row, ...]:
        has_mlp = any(type(block) is GatedMLPConfig for block in config.blocks)
        mixer, mlp = (f"backbone.blocks.{{{n}}}" for n in (("2i", "2i+1") if has_mlp else ("i", "i")))
        layer, mha = "backbone.layers.{i}", AttentionConfig.tag
        found = [
            Row("embedding.weight", "backbone.embedding.weight"),
            Row("backbone.norm_f.*", "backbone.norm_f.*"),
            Row("lm_head.weight", "lm_head.weight"),
            Row(f"{mixer}.norm.*", f"{layer}.norm.*"),
            *(
                dataclasses.replace(row, ours=row.ours.replace("backbone.blocks.{i}", mixer), kind=kind.tag)
                for row in mixers
            ),
            *(
                Row(
                    tuple(f"{mixer}.mixer.{q}_proj.{p}" for q in "qkv"),
                    f"{layer}.mixer.in_proj.{p}",
                    ROWS_APART,
                    mha,
                )
                for p in ("weight", "bias")
            ),
            *(Row(f"{mixer}.mixer.{p}.*", f"{layer}.mixer.{p}.*", kind=mha) for p in ("conv1d", "out_proj")),
        ]
        if has_mlp:
            found += [
                Row(f"{mlp}.norm.*", f"{layer}.norm2.*"),
                Row(f"{mlp}.mixer.in_proj.weight", f"{layer}.mlp.fc1.weight", kind=GatedMLPConfig.tag),
                Row(f"{mlp}.mixer.out_proj.weight", f"{layer}.mlp.fc2.weight", kind=GatedMLPConfig.tag),
            ]
        return tuple(found)

    return of


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
    attn_cfg: dict[str, Any] | None = None
    rms_norm: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if self.pad_vocab_size_multiple < 1:
            raise ValueError(
                f"pad_vocab_size_multiple is {self.pad_vocab_size_multiple}, expected at least 1"
            )
        if not 1 <= self.n_layer <= MOST_LAYERS:
            raise ValueError(f"{self.n_layer} layers, expected 1 to {MOST_LAYERS}")
        attends = set(self.attn_layer_idx or ())
        if strange := sorted(attends - set(range(self.n_layer))):
            raise ValueError(f"attn_layer_idx: {strange[0]}, expected layers 0 to {self.n_layer - 1}")
        padded = -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple
        mixers: dict[str, MixerConfig] = {"M": self.kind.from_dict(self._arguments(), where="ssm_cfg")}
        if attends:
            mixers["*"] = self._attention()
        if self.d_intermediate:
            mixers["-"] = GatedMLPConfig(d_hidden=-(-self.d_intermediate // _MLP_MULTIPLE) * _MLP_MULTIPLE)
        layers = ("*" if n in attends else "M" for n in range(self.n_layer))
        return LanguageModelConfig(
            vocab_size=padded,
            pattern="".join(layer + ("-" if self.d_intermediate else "") for layer in layers),
            mixers=mixers,
            norm="rms" if self.rms_norm else "layer",
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> MambaSSMJSON:
        """Describe a network of ours in their words."""
        mixer, mlp = one_of(config.blocks, cls.kind), one_of(config.blocks, GatedMLPConfig)
        layers = [block for block in config.blocks if type(block) is not GatedMLPConfig]
        attention = one_of(layers, AttentionConfig)
        if not layers or (mixer is None and attention is None):
            raise ValueError(f"pattern {config.pattern!r}, expected blocks of a {cls.kind.__name__}")
        return cls(
            n_layer=len(layers),
            d_intermediate=0 if mlp is None else mlp.hidden(config.d_model),
            vocab_size=config.vocab_size,
            pad_vocab_size_multiple=1,
            ssm_cfg={
                "layer": cls.__name__.removesuffix("JSON"),
                **({} if mixer is None else cls._changed(mixer)),
            },
            attn_layer_idx=[n for n, block in enumerate(layers) if type(block) is AttentionConfig],
            attn_cfg={} if attention is None else _their_attention(attention, config.d_model),
            rms_norm=config.norm == "rms",
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

    def _attention(self) -> AttentionConfig:
        """Settings of our attention."""
        for key in self.attn_cfg or {}:
            if key not in ATTENTION_DEFAULTS:
                raise ValueError(f"attn_cfg: {unknown('argument', key, ATTENTION_DEFAULTS)}")
        settings = ATTENTION_DEFAULTS | (self.attn_cfg or {})
        heads, turned = settings["num_heads"], settings["rotary_emb_dim"]
        if not isinstance(heads, int) or not isinstance(turned, int) or heads < 1:
            raise ValueError(f"attn_cfg: num_heads is {heads!r}, rotary_emb_dim {turned!r}, expected numbers")
        if settings["mlp_dim"]:
            raise ValueError(
                f"attn_cfg: mlp_dim is {settings['mlp_dim']}, expected 0: no published model has it"
            )
        found = {ours: settings[theirs] for ours, theirs in ATTENTION.items()}
        if found["head_dim"] is None:
            found["head_dim"] = self.d_model // heads
        if turned:
            found |= {
                "rope": settings["rotary_emb_base"],
                "rope_fraction": turned / max(found["head_dim"], 1),
            }
        else:
            found["rope"] = None
        return AttentionConfig.from_dict({**found, "d_conv": settings["d_conv"] or None}, where="attn_cfg")


def _their_attention(attention: AttentionConfig, d_model: int) -> dict[str, Any]:
    """Arguments of their attention."""
    settings = give(attention, ATTENTION) | {"head_dim": attention.headdim(d_model)}
    settings["d_conv"] = attention.d_conv or 0
    if attention.rope is not None:
        settings |= {"rotary_emb_dim": attention.rotary_dims(d_model), "rotary_emb_base": attention.rope}
    return settings


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
