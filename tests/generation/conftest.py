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


@pytest.fixture
def named_toy():
    """The function that makes a toy by its family's name."""
    return make_toy


@pytest.fixture(params=TOYS)
def toy(request) -> LanguageModel:
    return make_toy(request.param)


@pytest.fixture(params=["mamba2", "bamba"])
def some_toy(request) -> LanguageModel:
    """Of a family without and of one with attention and positions."""
    return make_toy(request.param)
