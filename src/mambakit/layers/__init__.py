"""Layers: modules that own parameters, built on the operators.

Importing this package registers every mixer under its `type`.
"""

from mambakit.layers.attention import Attention, AttentionConfig
from mambakit.layers.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from mambakit.layers.mamba1 import Mamba1, Mamba1Config
from mambakit.layers.mamba2 import Mamba2, Mamba2Config
from mambakit.layers.mamba3 import Mamba3, Mamba3Config
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State
from mambakit.layers.mlp import MLP, GatedMLP, GatedMLPConfig, MLPConfig
from mambakit.layers.moe import MoE, MoEConfig
from mambakit.layers.multihead_mamba1 import MultiHeadMamba1, MultiHeadMamba1Config
from mambakit.layers.parallel import Parallel, ParallelConfig
from mambakit.layers.quantised import RoundedExperts, RoundedLinear, quantise
from mambakit.layers.s4 import S4, S4Config
from mambakit.layers.s4d import S4D, S4DConfig
from mambakit.layers.selective_ssm import SelectiveSSM
from mambakit.layers.shared import Shared, SharedConfig
from mambakit.layers.signed_mamba1 import SignedMamba1, SignedMamba1Config

__all__ = [
    "MLP",
    "S4",
    "S4D",
    "Attention",
    "AttentionConfig",
    "Context",
    "GatedMLP",
    "GatedMLPConfig",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "MLPConfig",
    "Mamba1",
    "Mamba1Config",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "Mixer",
    "MixerConfig",
    "MoE",
    "MoEConfig",
    "MultiHeadMamba1",
    "MultiHeadMamba1Config",
    "Parallel",
    "ParallelConfig",
    "RoundedExperts",
    "RoundedLinear",
    "S4Config",
    "S4DConfig",
    "SelectiveSSM",
    "Shared",
    "SharedConfig",
    "SignedMamba1",
    "SignedMamba1Config",
    "State",
    "quantise",
]
