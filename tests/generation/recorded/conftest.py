"""Models of every kind that is recorded, and what a step of them should give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mixer import State
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.s4 import S4Config
from mambakit.layers.s4d import S4DConfig
from mambakit.layers.signed_mamba1 import SignedMamba1Config
from mambakit.models import LanguageModel, LanguageModelConfig

VOCAB = 71
# Name -> settings of a language model; sizes beside and at every vector's and warp's.
MODELS = {
    "mamba1": {"pattern": "2M", "mixers": {"M": Mamba1Config()}},
    "mamba1 odd": {
        "pattern": "2M",
        "d_model": 37,
        "mixers": {"M": Mamba1Config(d_state=5, d_conv=3, expand=1, conv_bias=False, bias=True)},
    },
    "mamba1 one": {
        "pattern": "M",
        "d_model": 3,
        "mixers": {"M": Mamba1Config(d_state=1, d_conv=1, dt_rank=2)},
    },
    "mamba1 wide": {
        "pattern": "M",
        "residual_in_fp32": False,
        "mixers": {"M": Mamba1Config(d_state=256, d_conv=8, dt_rank=264, expand=1)},
    },
    "mamba2": {"pattern": "2M", "mixers": {"M": Mamba2Config(d_state=16, headdim=8)}},
    "mamba2 groups": {
        "pattern": "M",
        "mixers": {"M": Mamba2Config(d_state=136, headdim=20, ngroups=2, norm_before_gate=True, bias=True)},
    },
    "mamba2 odd": {
        "pattern": "2M",
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
        "residual_in_fp32": False,
        "mixers": {"M": Mamba2Config(d_state=1, headdim=1, d_conv=1)},
    },
    "hybrid": {
        "pattern": "M-SDFN",
        "mixers": {
            "M": Mamba2Config(d_state=9, headdim=8),
            "-": GatedMLPConfig(d_hidden=24, activation="gelu", bias=True),
            "S": Mamba1Config(d_state=17),
            "D": S4DConfig(d_state=8),
            "F": S4Config(d_state=8),
            "N": SignedMamba1Config(d_state=4),
        },
    },
    "attention": {"pattern": "-*", "mixers": {"*": AttentionConfig(n_heads=4, window=8)}},
}


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes) -> LanguageModel:
    """A model by name; nothing in it is zero or one, so that everything counts."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "d_model": 40, "tie_embeddings": False, **MODELS[name], **changes}
    model = LanguageModel(LanguageModelConfig(**settings), dtype=dtype).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith(("bias", ".D", "norm.weight", "norm_f.weight")) and "dt_bias" not in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if key == "embedding.weight":
            parameter.mul_(50)  # of the size of what the blocks add
    return model.to(device)


def exact(model: LanguageModel) -> LanguageModel:
    """The same model in float64."""
    return copy.deepcopy(model).double()


def tokens(batch: int, length: int, seed: int = 0, device: str = "cpu") -> Tensor:
    found = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    return found.to(device)


def double(state: State) -> State:
    return state.to(torch.float64)


def holds(found: Tensor, own: Tensor, wanted: Tensor, what: str, dtype: torch.dtype) -> None:
    """Hold `found` to twice the error of the forward, `own`, and two roundings of the model's type."""
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    # Fast exponentials of a GPU lose two or three of float32's last bits.
    floor = (2 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps) * scale
    error, allowed = ((t.double() - wanted).abs().max().item() if t.numel() else 0.0 for t in (found, own))
    assert error <= 2 * allowed + floor, f"{what}: {error} against {allowed} + {floor}"


@pytest.fixture
def make():
    """The function that builds a model by its name."""
    return build
