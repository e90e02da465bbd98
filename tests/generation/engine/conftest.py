"""Models of every kind that the engine takes, and memory in which a sanitizer sees each piece by itself."""

from __future__ import annotations

import os

import pytest
import torch

from mambakit.generation.engine import arena
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.models import LanguageModel, LanguageModelConfig
from mambakit.ops import native

if native.load().library is None:
    collect_ignore = ["test_scoring.py", "test_state.py", "test_step.py", "test_weights.py"]

# Name -> settings of a language model. Sizes beside and above every vector's, panel's and group's.
MODELS = {
    "mamba1": {"pattern": "2M", "mixers": {"M": Mamba1Config()}},
    "mamba1 odd": {
        "pattern": "M",
        "d_model": 37,
        "mixers": {"M": Mamba1Config(d_state=5, d_conv=3, expand=1)},
    },
    "mamba1 one": {
        "pattern": "M",
        "d_model": 3,
        "mixers": {"M": Mamba1Config(d_state=1, d_conv=1, dt_rank=2)},
    },
    "mamba1 biases": {
        "pattern": "M",
        "tie_embeddings": True,
        "mixers": {"M": Mamba1Config(d_state=64, conv_bias=False, bias=True, expand=1)},
    },
    "mamba1 states 32": {"pattern": "M", "mixers": {"M": Mamba1Config(d_state=32, expand=1)}},
    "mamba2": {"pattern": "2M", "mixers": {"M": Mamba2Config(d_state=16, headdim=8)}},
    "mamba2 groups": {
        "pattern": "M",
        "mixers": {"M": Mamba2Config(d_state=128, headdim=20, ngroups=2, norm_before_gate=True, bias=True)},
    },
    "mamba2 odd": {
        "pattern": "M",
        "d_model": 33,
        "mixers": {
            "M": Mamba2Config(
                d_state=7, headdim=11, d_conv=2, conv_bias=False, dt_limit=(0.01, 0.03), ngroups=3
            )
        },
    },
    "mamba2 one": {
        "pattern": "M",
        "d_model": 2,
        "mixers": {"M": Mamba2Config(d_state=1, headdim=1, d_conv=1)},
    },
    "attention": {"pattern": "M*", "mixers": {"M": Mamba1Config(), "*": AttentionConfig(n_heads=4)}},
    "all": {
        "pattern": "M-S*S+",
        "mixers": {
            "M": Mamba2Config(d_state=9, headdim=8),
            "S": Mamba1Config(d_state=17),
            "-": GatedMLPConfig(d_hidden=65, activation="gelu", bias=True),
            "*": GatedMLPConfig(d_hidden=64, activation="relu2"),
            "+": GatedMLPConfig(d_hidden=7),
        },
    },
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    """A model by name; nothing in it is zero or one, so that everything counts."""
    torch.manual_seed(0)
    settings = {"vocab_size": 71, "d_model": 40, "tie_embeddings": False, **MODELS[name], **changes}
    model = LanguageModel(LanguageModelConfig(**settings), dtype=dtype).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith(("bias", ".D", "norm.weight", "norm_f.weight")) and "dt_bias" not in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if key == "embedding.weight":
            parameter.mul_(50)  # of the size of what the blocks add
    return model


@pytest.fixture(params=[name for name in MODELS if name != "attention"])
def name(request) -> str:
    return request.param


@pytest.fixture
def make():
    """The function that builds a model by its name."""
    return build


@pytest.fixture(autouse=True)
def pieces_of_memory(monkeypatch):
    """Under a sanitizer every matrix lies in memory of its own, whose end it watches."""
    if os.sep not in os.environ.get(native.ENVIRONMENT, ""):
        return

    def take(self, size):
        self.pieces = [*getattr(self, "pieces", []), torch.zeros(size, dtype=torch.uint8)]
        self._taken += size
        return self.pieces[-1]

    monkeypatch.setattr(arena.Arena, "take", take)
