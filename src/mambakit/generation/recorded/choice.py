"""When a generation on a GPU records its steps."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from mambakit.generation.recorded.decoder import RecordedDecoder
from mambakit.layers.mixer import State

_WORTH_RECORDING = 16  # tokens; recording takes as long as some of the ordinary forward
_OWN = ("mambakit", "torch")  # packages whose layers decide nothing by what they compute
_decoders: dict[int, tuple[tuple[int, ...], RecordedDecoder]] = {}
"""Number of a state that is alive -> where the model's parameters lay, and what decodes it."""


def reason_against(model: nn.Module, state: State, batch: int) -> str | None:
    """Say why a generation could not be recorded, or `None`.

    Args:
        model: The model that generates.
        state: The state that it is to continue.
        batch: Number of sequences.

    Returns:
        The first reason.
    """
    return RecordedDecoder.supports(model) or RecordedDecoder.unsupported_state(model, state, batch)


def is_worth_it(model: nn.Module, max_tokens: int) -> bool:
    """Whether recording pays for so many tokens, and is safe without being asked for.

    A layer of somebody else's may look at its numbers and decide by them, which cannot be recorded; autocast
    would have to be on at every step again.

    Args:
        model: A model that can be recorded.
        max_tokens: Tokens to come.
    """
    foreign = {type(module).__module__.partition(".")[0] for module in model.modules()} - set(_OWN)
    return max_tokens >= _WORTH_RECORDING and not foreign and not torch.is_autocast_enabled("cuda")


def decoder_for(model: nn.Module, state: State) -> RecordedDecoder:
    """The decoder of a state, kept as long as that is alive: a conversation goes on with what was recorded.

    Args:
        model: A model that can be recorded.
        state: The state that it is to continue.

    Returns:
        A decoder of this model.
    """
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    kept, decoder = _decoders.get(id(state), (None, None))
    if kept == places:
        return decoder
    decoder = RecordedDecoder(model)
    if kept is None:
        weakref.finalize(state, _decoders.pop, id(state), None)
    _decoders[id(state)] = places, decoder
    return decoder
