"""How much work a model is: operations and bytes, for its share of the roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambakit import LanguageModel
from mambakit.layers.attention import Attention
from mambakit.layers.mamba1 import Mamba1
from mambakit.layers.mamba2 import Mamba2
from mambakit.ops.dispatch import registry


def block_flops(model: nn.Module, tokens: int, length: int) -> int:
    """Floating-point operations of a forward pass below the head: linear layers, convolutions and scans.

    Args:
        model: A language model or mixer.
        tokens: Tokens read, over all rows.
        length: Tokens of a row, which attention multiplies.

    Returns:
        Operations, a multiply-add as two.
    """
    return sum(_own_flops(module, tokens, length) for module in _below_head(model))


def _below_head(model: nn.Module) -> Iterator[nn.Module]:
    head = getattr(model, "lm_head", None)
    return (module for module in model.modules() if module is not head)


def _own_flops(module: nn.Module, tokens: int, length: int) -> int:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel() * tokens
    if isinstance(module, Mamba1):
        d, n = module.out_proj.in_features, module.config.d_state
        scan = registry["selective_scan"].flops(meta(tokens, d), meta(tokens, d), meta(d, n))
        return scan + 2 * module.config.d_conv * d * tokens
    if isinstance(module, Mamba2):
        d, n = module.out_proj.in_features, module.config.d_state
        scan = registry["ssd"].flops(meta(tokens, d), None, None, meta(tokens, n))
        return scan + 2 * module.config.d_conv * module.split[1] * tokens
    if isinstance(module, Attention):
        return math.ceil(4 * tokens * length * module.out_proj.in_features / 2)
    return 0


def head_flops(model: LanguageModel, tokens: int) -> int:
    """Operations of the head on so many tokens."""
    return 2 * model.lm_head.weight.numel() * tokens


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for p in model.parameters())
