"""A toy of every family in float64, in which nothing is zero or one."""

from __future__ import annotations

import pytest
import torch

from mambakit import LanguageModel
from mambakit.testing.toys import TOYS


def make_toy(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A toy by its family's name."""
    torch.manual_seed(0)
    model = LanguageModel(TOYS[name].ours(), dtype=dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=TOYS)
def toy(request) -> LanguageModel:
    return make_toy(request.param)


@pytest.fixture(params=["mamba2", "granitemoehybrid"])
def some_toy(request) -> LanguageModel:
    """Of one family with and one without attention and positions."""
    return make_toy({"granitemoehybrid": "bamba"}.get(request.param, request.param))
