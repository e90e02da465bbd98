"""BlackMamba: Mamba-1 and mixtures of eight experts in turn, one expert for a token.

The router scores experts with a sigmoid and the best one runs; in training Sinkhorn's iteration chooses, so
that all are used. Experts gate with GELU. The last norm is a layer norm with a bias, the others RMS norms.

Source: Anthony et al., "BlackMamba" (2402.01771). Keys and names: the checkpoints and the inference code of
Zyphra/BlackMamba. transformers has no such model.
"""

from __future__ import annotations

import dataclasses

from mambakit.checkpoints.mapping import Row
from mambakit.checkpoints.transforms import STACK, SWAP_HALVES, Transform
from mambakit.families.family import MOST_LAYERS, Family, Layout, Published, Size, give, one_of, whole
from mambakit.families.mamba import BLOCK
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mixer import MixerConfig
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.moe import MoEConfig
from mambakit.models.language import LanguageModelConfig

NETWORK = {"vocab_size": "vocab_size", "d_model": "hidden_size"}
MIXER = {"d_state": "state_size", "d_conv": "conv_dimension", "expand": "expansion_factor"}
MAMBA, MLP = "r", "1"
"""Codes of layers; any other digit is a mixture of so many experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlackMambaJSON(Published):
    """Keys of a BlackMamba checkpoint's `config.json`."""

    num_layers: int = 36
    hidden_size: int = 1472
    state_size: int = 16
    conv_dimension: int = 4
    vocab_size: int = 50304
    expansion_factor: float = 2
    mamba_moe_layers: list[str] = dataclasses.field(default_factory=lambda: 18 * ["r", "8"])
    ffn_hidden_size: int = 3872
    add_bias_linear: bool = False
    swiglu: bool = True

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words."""
        if self.add_bias_linear or not self.swiglu:
            raise ValueError(
                f"add_bias_linear is {self.add_bias_linear} and swiglu {self.swiglu}, expected false and "
                "true, as in every published model"
            )
        if not 1 <= self.num_layers <= MOST_LAYERS or len(self.mamba_moe_layers) != self.num_layers:
            raise ValueError(
                f"mamba_moe_layers: {len(self.mamba_moe_layers)} codes for {self.num_layers} layers"
            )
        mixers = {code: self._mixer(code) for code in set(self.mamba_moe_layers)}
        letters = {code: _letter(code) for code in mixers}
        return LanguageModelConfig(
            pattern="".join(letters[code] for code in self.mamba_moe_layers),
            mixers={letters[code]: mixer for code, mixer in mixers.items()},
            final_norm="layer",
            **self.take(NETWORK),
        )

    def _mixer(self, code: str) -> MixerConfig:
        if code == MAMBA:
            return Mamba1Config(**self.take(MIXER))
        if code == MLP:
            return GatedMLPConfig(d_hidden=self.ffn_hidden_size, activation="gelu")
        if code not in set("23456789"):
            raise ValueError(
                f"mamba_moe_layers: code {code!r}, expected 'r', or the number of experts, 1 to 9"
            )
        return MoEConfig(
            n_experts=int(code),
            top_k=1,
            d_hidden=self.ffn_hidden_size,
            activation="gelu",
            score="sigmoid",
            router_bias=True,
            balance="sinkhorn",
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> BlackMambaJSON:
        """Describe a network of ours in their words."""
        codes, hidden = [], 0
        for block in config.blocks:
            if type(block) is Mamba1Config:
                codes.append(MAMBA)
            elif type(block) is GatedMLPConfig:
                codes.append(MLP)
                hidden = block.d_hidden
            elif type(block) is MoEConfig and block.n_experts <= 9:
                codes.append(str(block.n_experts))
                hidden = block.d_hidden
            else:
                raise ValueError(
                    f"a block of {type(block).__name__}, expected Mamba-1, MLPs, up to 9 experts"
                )
        mamba = one_of(config.blocks, Mamba1Config)
        settings = {} if mamba is None else give(mamba, MIXER) | {"expansion_factor": whole(mamba.expand)}
        return cls(
            num_layers=len(codes),
            mamba_moe_layers=codes,
            ffn_hidden_size=hidden or 4 * config.d_model,
            **give(config, NETWORK),
            **settings,
        )


def _letter(code: str) -> str:
    """The letter of a block: B for two experts, C for three, ..."""
    return {MAMBA: "M", MLP: "-"}.get(code) or "BCDEFGHI"[int(code) - 2]


STACK_SWAP = Transform(
    lambda theirs: SWAP_HALVES.join([STACK.join(theirs)]),
    lambda ours, count: STACK.split(SWAP_HALVES.split(ours, 1)[0], count),
)
"""Experts that they keep apart, gate before value."""
_THEIRS = "decoder.layers.{i}"
ROWS = (
    Row("embedding.weight", "embedding.word_embeddings.weight"),
    Row("lm_head.weight", "output_layer.weight"),
    Row("backbone.norm_f.*", "decoder.final_layernorm.*"),
    *(
        dataclasses.replace(row, theirs=row.theirs.replace("backbone.", "decoder."), kind=kind)
        for row in BLOCK
        if "{i}" in row.ours
        for kind in ([None] if ".norm." in row.ours else [Mamba1Config.tag])
    ),
    Row("backbone.blocks.{i}.mixer.in_proj.weight", f"{_THEIRS}.mixer.linear_fc1.weight", SWAP_HALVES, "mlp"),
    Row("backbone.blocks.{i}.mixer.out_proj.weight", f"{_THEIRS}.mixer.linear_fc2.weight", kind="mlp"),
    Row("backbone.blocks.{i}.mixer.router.*", f"{_THEIRS}.mixer.router.*", kind="moe"),
    Row(
        "backbone.blocks.{i}.mixer.in_proj.weight",
        f"{_THEIRS}.mixer.local_experts.{{e}}.linear_fc1.weight",
        STACK_SWAP,
        "moe",
    ),
    Row(
        "backbone.blocks.{i}.mixer.out_proj.weight",
        f"{_THEIRS}.mixer.local_experts.{{e}}.linear_fc2.weight",
        STACK,
        "moe",
    ),
)

BLACKMAMBA = Family(
    "blackmamba",
    (
        Layout(
            "blackmamba",
            lambda found: "mamba_moe_layers" in found and "model_type" not in found,
            BlackMambaJSON,
            ROWS,
            {"max_sequence_length": 2048},  # which their reader asks for
            pickled=True,
            wrapped=True,
        ),
    ),
    {
        "blackmamba-1.5b": Size(
            "Zyphra/BlackMamba-1.5B",
            1_458_462_072,
            BlackMambaJSON(
                num_layers=30, hidden_size=1152, mamba_moe_layers=15 * ["r", "8"], ffn_hidden_size=3072
            ),
            active=343_694_712,
        ),
        "blackmamba-2.8b": Size(
            "Zyphra/BlackMamba-2.8B", 2_783_213_584, BlackMambaJSON(), active=628_770_832
        ),
    },
)
