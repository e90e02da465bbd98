"""Which engine a generation uses, if any: the caller's wish, what the model allows, and what it costs."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mambakit.config import unknown
from mambakit.generation.engine import program
from mambakit.generation.engine.engine import DecodeEngine
from mambakit.generation.engine.weights import FORMS, Form
from mambakit.generation.recorded import RecordedDecoder
from mambakit.generation.recorded import choice as recorded
from mambakit.layers.quantised import RoundedExperts, form_of
from mambakit.ops.dispatch import is_forced

if TYPE_CHECKING:
    from mambakit.layers.mixer import State

CHOICES = ("auto", "off", "recorded", *FORMS)
"""What may be asked for by name."""

_WORTH_PACKING = 64  # tokens; packing takes as long as some dozen tokens of the ordinary forward
_engines: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, DecodeEngine]] = weakref.WeakKeyDictionary()
_said: set[str] = set()


def engine_for(
    model: nn.Module, wanted: DecodeEngine | RecordedDecoder | str, state: State, batch: int, max_tokens: int
) -> DecodeEngine | RecordedDecoder | None:
    """Find the engine that generates, or `None` for the model's ordinary forward.

    An engine asked for by name that cannot be had is said once, with the reason, as a warning. On a GPU
    `auto` records where the model allows it and more than a few tokens are to come. On a CPU it takes an
    engine where the model and this machine allow it, nothing is lost (float32, or bfloat16 for a model in
    bfloat16; none for rounded weights), no backend of the operators is forced, more than a few tokens are to
    come, and its weights leave half of the free memory. The last engine of a model is kept until its
    parameters change or the model is gone.

    Args:
        model: The model that generates.
        wanted: An engine, or one of `CHOICES`.
        state: The state that it is to continue.
        batch: Number of sequences.
        max_tokens: Tokens to come.

    Returns:
        The engine or `None`.

    Raises:
        ValueError: An unknown name, or a state that the given engine cannot continue.
    """
    if isinstance(wanted, (DecodeEngine, RecordedDecoder)):
        reason = wanted.unsupported_state(model, state, batch)
        if reason is not None:
            raise ValueError(f"the decode engine cannot continue this state: {reason}")
        return wanted
    if wanted not in CHOICES:
        raise ValueError(f"engine: {unknown('choice', wanted, CHOICES)}")
    if wanted == "off":
        return None
    if wanted == "auto" and (is_forced() or any(isinstance(m, RoundedExperts) for m in model.modules())):
        return None  # rounded experts are chosen on the host, which cannot be recorded
    if wanted == "recorded" or (wanted == "auto" and any(p.is_cuda for p in model.parameters())):
        reason = recorded.reason_against(model, state, batch)
        if reason is None and (wanted != "auto" or recorded.is_worth_it(model, max_tokens)):
            return recorded.decoder_for(model, state)
        if reason is not None and wanted != "auto":
            _say_once(f"generating without a recorded step: {reason}")
        return None
    if wanted == "auto" and form_of(model) is not None:
        return None  # its own form would round activations too, any other takes the memory that was saved
    reason = DecodeEngine.supports(model) or DecodeEngine.unsupported_state(model, state, batch)
    if reason is None and wanted != "auto":
        reason = DecodeEngine.unsupported_form(model, wanted)
    if reason is not None:
        if wanted != "auto":
            _say_once(f"generating without the {wanted} engine: {reason}")
        return None
    form = _native_form(model) if wanted == "auto" else wanted
    parameters = tuple(_fingerprint(parameter) for parameter in model.parameters())
    kept, engine = _engines.get(model, (None, None))
    if kept == (form, parameters):
        return engine
    if wanted == "auto" and (max_tokens < _WORTH_PACKING or program.size(model, form) > _free_memory() // 2):
        return None
    _engines.pop(model, None)  # before there are two
    engine = DecodeEngine(model, form)
    _engines[model] = ((form, parameters), engine)
    return engine


def _fingerprint(parameter: nn.Parameter) -> tuple[int, ...]:
    """What changes when a parameter does: its place, and the sum of its bits in words of 8 bytes.

    PyTorch's count of changes is not enough: fused optimisers write without raising it. The sum reads memory
    as fast as it comes, about as long as a token takes.
    """
    flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8 * 8
    return parameter.data_ptr(), int(flat[:words].view(torch.int64).sum()), int(flat[words:].sum())


def _native_form(model: nn.Module) -> Form:
    """The form that keeps a model's weights as they are."""
    types = {module.weight.dtype for module in model.modules() if type(module) is nn.Linear}
    return "bfloat16" if types == {torch.bfloat16} else "float32"


def _free_memory() -> float:
    """Bytes that a process may still take, as far as is known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return torch.inf
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else torch.inf


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=5)
