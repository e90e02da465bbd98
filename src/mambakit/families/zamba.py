"""Zamba: Mamba-1 in two heads, and one block of attention and MLP that every sixth layer hears.

The block's weights are shared by all its uses; its output joins the input of the Mamba of that layer
(`layers/shared.py`). Positions are none. A layer of theirs is one block of ours.

Source: Glorioso et al., "Zamba" (2405.16712). Keys and names: `ZambaConfig` and `ZambaForCausalLM` of
transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import CONCAT, PAIRS, heads
from mambakit.families.family import MOST_LAYERS, Family, Layout, Published, Size, give, is_of_type, whole
from mambakit.families.jamba import NETWORK
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mixer import MixerConfig
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.multihead_mamba1 import MultiHeadMamba1Config
from mambakit.layers.shared import SharedConfig
from mambakit.models.language import LanguageModelConfig

MIXER = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "dt_rank": "mamba_dt_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
    "n_heads": "n_mamba_heads",
}
ATTENTION = {
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "attention_head_dim",
}
PLAIN, HYBRID = "linear_attention", "hybrid"
KINDS = {"linear_attention": PLAIN, "mamba": PLAIN, "hybrid": HYBRID}
"""Kinds of layers, by their names in newer and older files."""


def kinds_of(layers: Sequence[str]) -> list[str]:
    """The kinds of layers, whatever they are called.

    Raises:
        ValueError: Too many or none, or a kind that there is not.
    """
    if not 1 <= len(layers) <= MOST_LAYERS or not set(layers) <= set(KINDS):
        raise ValueError(f"layers_block_type: {list(layers)[:9]}, expected kinds out of {', '.join(KINDS)}")
    return [KINDS[layer] for layer in layers]


def score_scale(head_dim: int) -> float:
    """Their factor on scores: a head has half as many channels for every channel of the model."""
    return (head_dim / 2) ** -0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZambaJSON(Published):
    """Keys of transformers' `ZambaConfig` that describe the network."""

    vocab_size: int = 32000
    tie_word_embeddings: bool = True
    hidden_size: int = 3712
    attention_hidden_size: int | None = None
    intermediate_size: int = 14848
    num_hidden_layers: int = 76
    num_attention_heads: int = 16
    attention_head_dim: int | None = None
    num_key_value_heads: int | None = 16
    n_mamba_heads: int = 2
    hidden_act: Literal["gelu"] = "gelu"
    hidden_mamba_act: Literal["silu", "swish"] = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    attn_layer_period: int = 6
    attn_layer_offset: int = 4
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: float = 2
    mamba_dt_rank: int | Literal["auto"] = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    layers_block_type: list[str] | None = None

    def layers(self) -> list[str]:
        """The kinds of their layers; without a list, the third is a hybrid and then one in a period."""
        if self.layers_block_type is not None:
            return kinds_of(self.layers_block_type)
        if self.attn_layer_period < 1 or not 1 <= self.num_hidden_layers <= MOST_LAYERS:
            raise ValueError(
                f"a period of {self.attn_layer_period} in {self.num_hidden_layers} layers, expected at least "
                f"1, in 1 to {MOST_LAYERS} layers"
            )
        later = range(self.num_hidden_layers - 3)
        is_hybrid = [n % self.attn_layer_period == self.attn_layer_offset for n in later]
        return [PLAIN, PLAIN, HYBRID, *(HYBRID if hybrid else PLAIN for hybrid in is_hybrid)]

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if self.attention_hidden_size not in (None, 2 * self.hidden_size):
            raise ValueError(
                f"attention_hidden_size is {self.attention_hidden_size}, expected twice hidden_size, "
                f"{2 * self.hidden_size}"
            )
        mamba = MultiHeadMamba1Config(**self.take(MIXER))
        attention = AttentionConfig(rope=None, **self.take(ATTENTION))
        head_dim = attention.headdim(2 * self.hidden_size)
        shared = SharedConfig(
            attention=dataclasses.replace(attention, head_dim=head_dim, scale=score_scale(head_dim)),
            mlp=GatedMLPConfig(d_hidden=self.intermediate_size, activation="gelu"),
            inner=mamba,
            norm_eps=self.rms_norm_eps,
        )
        return LanguageModelConfig(
            pattern="".join("S" if kind == HYBRID else "M" for kind in self.layers()),
            mixers={"M": mamba, "S": shared},
            residual_in_fp32=False,
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> ZambaJSON:
        """Describe a network of ours in their words."""
        mamba, shared = parts_of(config, MultiHeadMamba1Config)
        settings = give(config, NETWORK) | give(mamba, MIXER) | {"mamba_expand": whole(mamba.expand)}
        if shared is not None:
            settings |= give(shared.attention, ATTENTION) | {"intermediate_size": shared.mlp.d_hidden}
        return cls(
            num_hidden_layers=len(config.blocks),
            layers_block_type=[HYBRID if type(b) is SharedConfig else PLAIN for b in config.blocks],
            attention_hidden_size=2 * config.d_model,
            **settings,
        )


def parts_of(config: LanguageModelConfig, kind: type[MixerConfig]) -> tuple[MixerConfig, SharedConfig | None]:
    """The mixer that all blocks have, plain or shared, and the settings of the first use of a shared block.

    Raises:
        ValueError: Other mixers, or several settings.
    """
    inner = [block.inner if type(block) is SharedConfig else block for block in config.blocks]
    if any(type(mixer) is not kind or mixer != inner[0] for mixer in inner):
        raise ValueError(f"pattern {config.pattern!r}, expected blocks of one {kind.__name__} only")
    return inner[0], next((block for block in config.blocks if type(block) is SharedConfig), None)


MAMBA = (
    ("in_proj.*", "in_proj.*", PAIRS),
    ("conv1d.*", "conv1d.*", None),
    ("out_proj.*", "out_proj.*", None),
    ("ssm.x_proj.weight", "x_proj_weight", None),
    ("ssm.dt_proj.weight", "dt_proj_weight", None),
    ("ssm.dt_bias", "dt_proj_bias", heads),
    ("ssm.A_log", "A_log", heads),
    ("ssm.D", "D", heads),
)
"""A mixer's tensors: our name, theirs, and how they differ, for `heads` by the number of heads."""
OUTER = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("backbone.norm_f.weight", "model.final_layernorm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)


def hybrid(mixer: Callable[[str, str, str], Sequence[Row]], kind: str) -> tuple[Row, ...]:
    """The tensors of plain and hybrid layers beside those that are shared.

    Args:
        mixer: Our prefix, theirs and the kind of block -> the mixer's rows.
        kind: Tag of the blocks of plain layers.
    """
    ours, theirs, tag = "backbone.blocks.{i}", "model.layers.{i}", SharedConfig.tag
    return (
        Row(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight", kind=kind),
        Row(f"{ours}.mixer.norm.weight", f"{theirs}.mamba_decoder.input_layernorm.weight", kind=tag),
        Row(f"{ours}.mixer.linear.weight", f"{theirs}.linear.weight", kind=tag),
        *mixer(f"{ours}.mixer", f"{theirs}.mamba", kind),
        *mixer(f"{ours}.mixer.mixer", f"{theirs}.mamba_decoder.mamba", tag),
    )


def shared_attention(name: str, theirs: str) -> tuple[Row, ...]:
    """The tensors of a shared block's norms and attention.

    Args:
        name: Its name in our backbone.
        theirs: Their prefix: that of the first layer that uses it.
    """
    ours = f"backbone.shared.{name}"
    return (
        Row(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}.mlp_norm.weight", f"{theirs}.pre_ff_layernorm.weight"),
        *(
            Row(f"{ours}.attention.{mine}.weight", f"{theirs}.self_attn.{their}.weight")
            for mine, their in (
                *(("q_proj", "q_proj"), ("k_proj", "k_proj")),
                *(("v_proj", "v_proj"), ("out_proj", "o_proj")),
            )
        ),
    )


def rows(config: LanguageModelConfig) -> tuple[Row, ...]:
    """The tensors of a network; shared ones have the number of the first layer that uses them."""
    mamba, _ = parts_of(config, MultiHeadMamba1Config)

    def mixer(ours: str, theirs: str, kind: str) -> list[Row]:
        found = []
        for mine, their, how in MAMBA:
            how = heads(mamba.n_heads) if how is heads else how
            more = {} if how is None else {"transform": how}
            found.append(Row(f"{ours}.{mine}", f"{theirs}.{their}", kind=kind, **more))
        return found

    found = [*OUTER, *hybrid(mixer, MultiHeadMamba1Config.tag)]
    uses = [n for n, block in enumerate(config.blocks) if type(block) is SharedConfig]
    if uses:
        ours, theirs = (
            f"backbone.shared.{config.blocks[uses[0]].name}",
            f"model.layers.{uses[0]}.shared_transf",
        )
        gates = (f"{theirs}.feed_forward.up_proj.weight", f"{theirs}.feed_forward.gate_proj.weight")
        found += shared_attention(config.blocks[uses[0]].name, theirs)
        found += [
            Row(f"{ours}.mlp.in_proj.weight", gates, CONCAT),
            Row(f"{ours}.mlp.out_proj.weight", f"{theirs}.feed_forward.down_proj.weight"),
        ]
    return tuple(found)


ZAMBA = Family(
    "zamba",
    (
        Layout(
            "transformers",
            is_of_type("zamba"),
            ZambaJSON,
            rows,
            {"model_type": "zamba", "architectures": ["ZambaForCausalLM"], "hidden_act": "gelu"},
        ),
    ),
    {"zamba-7b": Size("Zyphra/Zamba-7B-v1", 7_232_490_496, ZambaJSON())},
)
