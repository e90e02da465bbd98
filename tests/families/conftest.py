"""Tiny models of every published family, made by the library that published it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def in_float64(monkeypatch):
    """Run transformers in float64: it casts norms, decay rates, softmax and logits to float32 by hand."""

    def widened(function):
        def wide(tensor, *args, **kwargs):
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return function(tensor, *args, **kwargs)

        return wide

    def run(call):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.Tensor, "to", widened(torch.Tensor.to))
            patch.setattr(torch.Tensor, "type", widened(torch.Tensor.type))
            patch.setattr(torch.nn.functional, "softmax", widened(torch.nn.functional.softmax))
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return call()

    return run
