"""Zamba2: Mamba-2, and one or two shared blocks in turn, which every use adapts with low-rank maps.

Differs from Zamba in the mixer, in the adapters, in positions (rotary in two of three sizes), and in the
number of shared blocks.

Steps of the recurrence are not clamped, as where the models were trained. transformers clamps them to
`time_step_min` in prefill only; `overrides={"time_step_limit": (0.001, math.inf)}` does so always.

Source: Glorioso et al., "The Zamba2 suite" (2411.15242). Keys and names: `Zamba2Config` and
`Zamba2ForCausalLM` of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import SWAP_HALVES
from mambakit.families.family import Family, Layout, Published, Size, give, is_of_type, rope_theta, whole
from mambakit.families.jamba import NETWORK
from mambakit.families.zamba import (
    HYBRID,
    OUTER,
    PLAIN,
    hybrid,
    kinds_of,
    parts_of,
    score_scale,
    shared_attention,
)
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.shared import ADAPTED, SharedConfig
from mambakit.models.language import LanguageModelConfig

MIXER = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "ngroups": "mamba_ngroups",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
    "bias": "add_bias_linear",
}
ATTENTION = {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
NAMES = "abcdefgh"
"""Names of shared blocks in our backbone; their uses have the capital letters."""


def layers(count: int, hybrids: Collection[int]) -> list[str]:
    """The kinds of layers, from the numbers of those that use a shared block."""
    return [HYBRID if n in hybrids else PLAIN for n in range(count)]


STANDARD = tuple(layers(54, {*range(6, 43, 6), 47, 51}))
"""What a file without a list means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zamba2JSON(Published):
    """Keys of transformers' `Zamba2Config` that describe the network, and

    Attributes:
        time_step_limit: A key that only we read: the range that steps are clamped to.
    """

    vocab_size: int = 32000
    hidden_size: int = 2560
    num_hidden_layers: int = 54
    layers_block_type: list[str] | None = None
    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: float = 2
    mamba_ngroups: int = 1
    n_mamba_heads: int = 8
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    add_bias_linear: bool = False
    intermediate_size: int | None = None
    hidden_act: Literal["gelu"] = "gelu"
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    num_mem_blocks: int = 1
    use_shared_attention_adapter: bool = False
    adapter_rank: int = 128
    use_mem_rope: bool = False
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def mamba(self) -> Mamba2Config:
        """Their Mamba-2 mixer, whose convolution always has a bias and whose norm always the same `eps`."""
        inner = int(self.mamba_expand * self.hidden_size)
        if self.n_mamba_heads < 1 or inner % self.n_mamba_heads:
            raise ValueError(f"n_mamba_heads={self.n_mamba_heads}, expected a divisor of {inner}")
        return Mamba2Config(headdim=inner // self.n_mamba_heads, **self.take(MIXER))

    def shared(self, name: str) -> SharedConfig:
        """A use of one of their shared blocks."""
        if self.num_attention_heads < 1 or 2 * self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}, expected a divisor of "
                f"{2 * self.hidden_size}, twice hidden_size"
            )
        head_dim = 2 * self.hidden_size // self.num_attention_heads
        attention = AttentionConfig(
            head_dim=head_dim,
            rope=rope_theta(self.rope_parameters, self.rope_theta) if self.use_mem_rope else None,
            scale=score_scale(head_dim),
            **self.take(ATTENTION),
        )
        mlp = GatedMLPConfig(
            d_hidden=self.intermediate_size or 4 * self.hidden_size,
            activation="gelu",
            bias=self.add_bias_linear,
        )
        return SharedConfig(
            name=name,
            attention=attention,
            mlp=mlp,
            inner=self.mamba(),
            adapted=ADAPTED if self.use_shared_attention_adapter else ("in_proj",),
            rank=self.adapter_rank,
            norm_eps=self.rms_norm_eps,
        )

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if not 1 <= self.num_mem_blocks <= len(NAMES):
            raise ValueError(f"num_mem_blocks is {self.num_mem_blocks}, expected 1 to {len(NAMES)}")
        names, uses, pattern = NAMES[: self.num_mem_blocks], 0, ""
        for kind in kinds_of(STANDARD if self.layers_block_type is None else self.layers_block_type):
            pattern += names[uses % len(names)].upper() if kind == HYBRID else "M"
            uses += kind == HYBRID
        letters = {name.upper(): self.shared(name) for name in names}
        return LanguageModelConfig(
            pattern=pattern,
            mixers={"M": self.mamba(), **letters},
            residual_in_fp32=False,
            **self.take(NETWORK),
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Zamba2JSON:
        """Describe a network of ours in their words."""
        mamba, shared = parts_of(config, Mamba2Config)
        settings = give(config, NETWORK) | give(mamba, MIXER) | {"mamba_expand": whole(mamba.expand)}
        if shared is None:
            raise ValueError(f"pattern {config.pattern!r}, expected uses of a shared block")
        theta = shared.attention.rope or 10000.0
        return cls(
            num_hidden_layers=len(config.blocks),
            layers_block_type=[HYBRID if type(b) is SharedConfig else PLAIN for b in config.blocks],
            n_mamba_heads=mamba.nheads(config.d_model),
            intermediate_size=shared.mlp.d_hidden,
            num_mem_blocks=len({b.name for b in config.blocks if type(b) is SharedConfig}),
            use_shared_attention_adapter="q_proj" in shared.adapted,
            adapter_rank=shared.rank,
            use_mem_rope=shared.attention.rope is not None,
            rope_theta=theta,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
            **settings,
            **give(shared.attention, ATTENTION),
        )


def _mixer(ours: str, theirs: str, kind: str) -> Sequence[Row]:
    return [Row(f"{ours}.{part}", f"{theirs}.{part}", kind=kind) for part in _PARTS]


_PARTS = ("A_log", "D", "dt_bias", "in_proj.*", "conv1d.*", "norm.weight", "out_proj.*")
_ADAPTERS = {
    "q_proj": "self_attn.linear_q_adapter_list",
    "k_proj": "self_attn.linear_k_adapter_list",
    "v_proj": "self_attn.linear_v_adapter_list",
    "in_proj": "feed_forward.gate_up_proj_adapter_list",
}


def rows(config: LanguageModelConfig) -> tuple[Row, ...]:
    """The tensors of a network.

    A shared block, with the adapters of all its uses, has the number of the first layer that uses it;
    adapters are counted over all uses of all blocks.
    """
    found, first = [*OUTER, *hybrid(_mixer, Mamba2Config.tag)], {}
    uses = [n for n, block in enumerate(config.blocks) if type(block) is SharedConfig]
    for use, block in enumerate(uses):
        shared = config.blocks[block]
        theirs = first.setdefault(shared.name, f"model.layers.{block}.shared_transformer")
        for name in shared.adapted:
            ours, list_of_theirs = (
                f"backbone.blocks.{block}.mixer.adapters.{name}",
                f"{theirs}.{_ADAPTERS[name]}",
            )
            swap = {"transform": SWAP_HALVES} if name == "in_proj" else {}
            found += [
                Row(f"{ours}.down.weight", f"{list_of_theirs}.{use}.0.weight"),
                Row(f"{ours}.up.weight", f"{list_of_theirs}.{use}.1.weight", **swap),
            ]
    for name, theirs in first.items():
        found += [
            *shared_attention(name, theirs),
            Row(
                f"backbone.shared.{name}.mlp.in_proj.*", f"{theirs}.feed_forward.gate_up_proj.*", SWAP_HALVES
            ),
            Row(f"backbone.shared.{name}.mlp.out_proj.*", f"{theirs}.feed_forward.down_proj.*"),
        ]
    return tuple(found)


ZAMBA2 = Family(
    "zamba2",
    (
        Layout(
            "transformers",
            is_of_type("zamba2"),
            Zamba2JSON,
            rows,
            {"model_type": "zamba2", "architectures": ["Zamba2ForCausalLM"], "hidden_act": "gelu"},
        ),
    ),
    {
        "zamba2-1.2b": Size(
            "Zyphra/Zamba2-1.2B",
            1_215_064_704,
            Zamba2JSON(
                hidden_size=2048,
                num_hidden_layers=38,
                layers_block_type=layers(38, range(5, 38, 6)),
                mamba_d_state=128,
                n_mamba_heads=64,
                use_shared_attention_adapter=True,
                use_mem_rope=True,
            ),
        ),
        "zamba2-2.7b": Size(
            "Zyphra/Zamba2-2.7B", 2_662_214_560, Zamba2JSON(n_mamba_heads=80, num_mem_blocks=2)
        ),
        "zamba2-7b": Size(
            "Zyphra/Zamba2-7B",
            7_356_749_648,
            Zamba2JSON(
                hidden_size=3584,
                num_hidden_layers=81,
                layers_block_type=layers(81, {6, *range(11, 78, 6)}),
                mamba_ngroups=2,
                n_mamba_heads=112,
                num_mem_blocks=2,
                use_mem_rope=True,
            ),
        ),
    },
)
