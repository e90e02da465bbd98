"""Bringing the tensors of a call to what a kernel takes: one type of activations, float32 for the rest."""

from __future__ import annotations

import torch
from torch import Tensor


def common_type(*tensors: Tensor | None) -> torch.dtype:
    """The narrowest type that holds all activations; absent ones do not count."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    common = given[0]
    for dtype in given[1:]:
        common = torch.promote_types(common, dtype)
    return common


def rows(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Activations in a type, their last axis contiguous; a slice of a larger tensor stays one."""
    if tensor is None:
        return None
    tensor = tensor if tensor.dtype is dtype else tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def scalars(tensor: Tensor | None) -> Tensor | None:
    """A parameter or a recurrent state as contiguous float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()
