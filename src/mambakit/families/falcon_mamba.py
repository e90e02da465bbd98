"""Falcon Mamba: Mamba-1 blocks that normalise dt, B and C, without weights.

Its tensors have Mamba's names. Source: Zuo et al., "Falcon Mamba" (2410.05355).
"""

from __future__ import annotations

import dataclasses

from mambakit.families.family import Family, Layout, Size, is_of_type, only
from mambakit.families.mamba import ROWS, MambaJSON
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.models.language import LanguageModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconMambaJSON(MambaJSON):
    """Keys of transformers' `FalconMambaConfig`: Mamba's and the inner norms' `eps`."""

    mixer_rms_eps: float = 1e-6

    def mixer(self) -> Mamba1Config:
        """The settings of every block."""
        return dataclasses.replace(super().mixer(), inner_norm="plain", inner_norm_eps=self.mixer_rms_eps)

    @classmethod
    def of(cls, config: LanguageModelConfig) -> FalconMambaJSON:
        """Describe a network of ours in their words."""
        return super().of(config, mixer_rms_eps=only(config, Mamba1Config).inner_norm_eps)


FALCON_MAMBA = Family(
    "falcon_mamba",
    (
        Layout(
            "transformers",
            is_of_type("falcon_mamba"),
            FalconMambaJSON,
            ROWS,
            {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"], "hidden_act": "silu"},
        ),
    ),
    {
        "falcon-mamba-7b": Size(
            "tiiuae/falcon-mamba-7b",
            7_272_665_088,
            FalconMambaJSON(
                vocab_size=65024,
                hidden_size=4096,
                num_hidden_layers=64,
                time_step_rank=256,
                tie_word_embeddings=False,
            ),
        ),
    },
)
