"""Which model is this? A short name for a network and its weights.

What a model remembers of a text means nothing to another one, and no error would say so: numbers of the right
shape go in, nonsense comes out. So a saved state carries the fingerprint of its model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 1024  # numbers of a tensor that are looked at, evenly spread


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Name a model.

    Of every tensor its name, shape, type and 1,024 of its numbers count, so that a model of any size is named
    in a moment: enough to tell trained models apart, not to prove that two are the same.

    Args:
        model: A language model.

    Returns:
        `settings`, a hash of what its config asks for beyond the defaults; `types`, of the names, shapes and
        types of its tensors; `weights`, of their numbers.
    """
    types, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        types.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        weights.update(_sample(tensor))
    settings = hashlib.sha256(repr(_settings(model.config)).encode())
    return {
        "settings": settings.hexdigest(),
        "types": types.hexdigest(),
        "weights": weights.hexdigest(),
    }


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    flat = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def _settings(value: Any) -> Any:
    """What a config says, without what it says by default: a field that is added later changes nothing."""
    if dataclasses.is_dataclass(value):
        fields = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
        said = [(name, _settings(one)) for name, one, default in fields if one != default]
        return type(value).__name__, said
    if isinstance(value, Mapping):
        return sorted((key, _settings(one)) for key, one in value.items())
    return value
