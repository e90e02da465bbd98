"""Published checkpoints in and out: `load("folder or repository")` and `save(model, folder)`.

    model = mambakit.load("state-spaces/mamba-130m-hf", dtype=torch.bfloat16)
    mambakit.save(model, "out")  # transformers and `load` read it
    model = mambakit.load("out", quantize="int8")  # rounded while it is read, one tensor at a time

The family is recognised by the `config.json`; its file in `families/` says what is called what. The network
is built without memory, and every tensor is read once and put in its place; where type and device are those
of the file, the weights stay on the mapped file and nothing is copied. Models with rounded weights are saved
under this library's own names, which no other one reads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.checkpoints import CheckpointError, Source, Tensors, locate, open_tensors, read_config, sources
from mambakit.checkpoints.files import CONFIG, write_checkpoint
from mambakit.config import ConfigError, to_dict, unknown
from mambakit.families import FAMILIES, Family, Layout
from mambakit.families.family import check_same, resolved
from mambakit.layers.quantised import ROUNDED_FORMS, RoundedForm, form_of, quantise, round_weight, roundable
from mambakit.models.language import LanguageModel, LanguageModelConfig

_EMBEDDING, _HEAD = "embedding.weight", "lm_head.weight"
_ROUNDED, _METHOD = "quantization_config", "mambakit"


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    quantize: RoundedForm | None = None,
) -> LanguageModel:
    """Load a published language model.

    Args:
        name: A checkpoint folder, or a repository of the Hugging Face hub, such as
            `state-spaces/mamba-130m-hf`, which is downloaded once.
        dtype: Type of the weights; as stored by default. Scalars of recurrences are float32 or wider anyway.
        device: Where they go.
        revision: Branch, tag or commit of the repository.
        overrides: Keys of the `config.json` with values to take instead, such as
            `{"time_step_limit": (0.001, math.inf)}` for a model that was tuned with steps clamped so.
        quantize: Keep the weights of linear layers as `int8` (a scale per output channel) or `int4` (one per
            64 inputs of it), see `layers.quantised`. They are rounded as they are read: no more than one of
            them exists in its own precision at a time. A checkpoint with rounded weights needs no such word.

    Returns:
        The model in evaluation mode; its `published` is the file that described it.

    Raises:
        CheckpointError: Nothing there, an unknown family, a setting that no network of ours has, or a tensor
            that is missing, superfluous, damaged, or of another shape; one line that says which.
    """
    if quantize not in (None, *ROUNDED_FORMS):
        raise CheckpointError(f"quantize: {unknown('form', quantize, ROUNDED_FORMS)}")
    folder = locate(name, revision=revision)
    found = read_config(folder) | dict(overrides or {})
    _, layout = recognise(found, folder / CONFIG)
    config = _described(layout, found, folder / CONFIG)
    stored = _stored_form(found, folder / CONFIG)
    if stored is not None and quantize not in (None, stored):
        raise CheckpointError(f"{folder}: the weights are {stored} already, not to be made {quantize}")
    with open_tensors(folder) as tensors:
        embedding = _EMBEDDING if stored is not None else _theirs(layout, config, _EMBEDDING)
        config = _checked(config, embedding, tensors, folder)
        model = _build(config, dtype or tensors[embedding].dtype, folder / CONFIG)
        if stored is not None:
            weights = _read_rounded(quantise(model, stored), tensors, folder, device)
        elif quantize is not None:
            names = {f"{name}.weight": name for name, _ in roundable(model)}
            whole = _read(model, layout, tensors, folder, device, as_stored=names)
            weights = _rounded(whole, names, quantize)
            quantise(model, quantize)
        else:
            weights = dict(_read(model, layout, tensors, folder, device))
        if config.tie_embeddings:
            weights[_HEAD] = weights[_EMBEDDING]
        model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    model.published = found
    return model.eval()


def save(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model as its family's checkpoints are written.

    What the file that the model was loaded from says beside the network (token numbers, for example) is kept.

    Args:
        model: A model of a published family.
        folder: A new folder, or one without a checkpoint.
        layout: `transformers`, `mamba_ssm` or another that the family has; by default the one it was loaded
            from.
        dtype: Type to write; the embedding's by default.

    Returns:
        The folder.

    Raises:
        CheckpointError: A model of no published family, an unknown layout, a folder with a checkpoint, or a
            layout or type for rounded weights.
    """
    form = form_of(model)
    if form is not None and (layout, dtype) != (None, None):
        raise CheckpointError(f"a model of {form} weights is saved in its own types and layout only")
    folder, dtype = Path(folder), dtype or model.embedding.weight.dtype
    before = model.published or {}
    chosen, published = _describe(model.config, layout, before)
    kept = before if chosen.matches(before) else {}
    config = {**chosen.fixed, **kept, **to_dict(published)}
    config.pop(_ROUNDED, None)
    if chosen.name == "transformers":
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {
            "dtype": str(dtype).removeprefix("torch.")
        }
    if form is not None:
        config[_ROUNDED] = {"quant_method": _METHOD, "form": form}
        write_checkpoint(folder, config, _own_names(model))
    else:
        written = _written(model, chosen, dtype)
        write_checkpoint(folder, config, written, pickled=chosen.pickled, wrapped=chosen.wrapped)
    return folder


def recognise(found: Mapping[str, Any], where: Path) -> tuple[Family, Layout]:
    """Find the family and layout of a `config.json`.

    Raises:
        CheckpointError: It is of no family.
    """
    for family in FAMILIES.values():
        for layout in family.layouts:
            if layout.matches(found):
                return family, layout
    kind = found.get("model_type")
    if kind is None:
        raise CheckpointError(f"{where} names no model_type, and is not of mamba_ssm either")
    raise CheckpointError(f"{where}: {unknown('model_type', kind, FAMILIES)}")


def _described(layout: Layout, found: Mapping[str, Any], where: Path) -> LanguageModelConfig:
    try:
        return layout.published.from_dict(found, where=str(where)).ours()
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _describe(
    config: LanguageModelConfig, layout: str | None, before: Mapping[str, Any]
) -> tuple[Layout, Any]:
    """The layout to write a network in, and its keys: as it was loaded, else the first that describes it.

    Layouts of transformers come before others, which fewer programs read.
    """
    names = {one.name for family in FAMILIES.values() for one in family.layouts}
    if layout is not None and layout not in names:
        raise CheckpointError(unknown("layout", layout, names))
    choices = [one for family in FAMILIES.values() for one in family.layouts if layout in (None, one.name)]
    choices.sort(key=lambda one: (not one.matches(before), one.name != "transformers"))
    reasons, config = [], resolved(config)
    for choice in choices:
        try:
            published = choice.published.of(config)
            check_same(published.ours(), config)
            return choice, published
        except ValueError as error:
            reasons.append(f"{choice.fixed.get('model_type', choice.name)}: {error}")
    raise CheckpointError(f"no published family describes this network ({'; '.join(reasons)})")


def _checked(config: LanguageModelConfig, name: str, tensors: Tensors, folder: Path) -> LanguageModelConfig:
    """The config with the vocabulary that the file has, before anything of a size that it names is built."""
    if name not in tensors:
        raise CheckpointError(
            f"{folder}: {name} is missing; the file has {', '.join(list(tensors)[:3])}, ..."
        )
    shape = tensors.shape(name)
    if len(shape) != 2 or shape[1] != config.d_model or shape[0] < config.vocab_size:
        raise CheckpointError(
            f"{folder}: {name} has shape {shape}, expected ({config.vocab_size} or more, {config.d_model})"
        )
    if len(config.blocks) > len(tensors):
        raise CheckpointError(f"{folder}: {len(tensors)} tensors for {len(config.blocks)} blocks")
    return dataclasses.replace(config, vocab_size=shape[0])  # some are padded beyond what the config says


def _build(config: LanguageModelConfig, dtype: torch.dtype, where: Path) -> LanguageModel:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"{where.parent}: weights of {dtype}, expected float32, bfloat16, float16 or float64"
        )
    try:
        return LanguageModel(config, device="meta", dtype=dtype)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where} describes no network: {str(error).splitlines()[0]}") from None


def _theirs(layout: Layout, config: LanguageModelConfig, ours: str) -> str:
    return next(row.theirs for row in layout.rows_of(config) if row.ours == ours)


def _sources(model: LanguageModel, layout: Layout) -> dict[str, Source]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return sources(layout.rows_of(model.config), shapes, [block.tag for block in model.config.blocks])


def _read(
    model: LanguageModel,
    layout: Layout,
    tensors: Tensors,
    folder: Path,
    device: torch.device | str,
    as_stored: Container[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, read from the file; those of `as_stored` keep the type they have there."""
    empty, unused = model.state_dict(), set(tensors)
    for name, source in _sources(model, layout).items():
        tied = name == _HEAD and model.config.tie_embeddings
        if tied and source.names[0] not in tensors:
            continue
        for theirs in source.names:
            if theirs not in tensors:
                raise CheckpointError(f"{folder}: {theirs} is missing")
        unused -= set(source.names)
        tensor = _joined(name, source, tensors, tuple(empty[name].shape), folder)
        if tied:
            if not torch.equal(tensor, tensors[_theirs(layout, model.config, _EMBEDDING)]):
                raise CheckpointError(
                    f"{folder}: {source.names[0]} is not the embedding, though the config ties them"
                )
            continue
        yield name, tensor.to(device, None if name in as_stored else empty[name].dtype)
        del tensor  # before the next is made
    if unused:
        raise CheckpointError(
            f"{folder}: {min(unused)} belongs to no part of the network (of {len(unused)} such)"
        )


def _rounded(
    tensors: Iterator[tuple[str, Tensor]], layers: Mapping[str, str], form: RoundedForm
) -> dict[str, Tensor]:
    """Round the weights of some layers as they come, and forget them."""
    found = {}
    for name, tensor in tensors:
        if name in layers:
            parts = zip(("integers", "scales"), round_weight(tensor, form), strict=True)
            found |= {f"{layers[name]}.{part}": value for part, value in parts}
        else:
            found[name] = tensor
        del tensor
    return found


def _stored_form(found: Mapping[str, Any], where: Path) -> RoundedForm | None:
    """How a checkpoint says that its weights are rounded, if they are."""
    said = found.get(_ROUNDED)
    if said is None:
        return None
    method, form = (said.get(key) if isinstance(said, dict) else None for key in ("quant_method", "form"))
    if method != _METHOD:
        raise CheckpointError(f"{where}: {_ROUNDED} names the method {method!r}, expected {_METHOD!r}")
    if form not in ROUNDED_FORMS:
        raise CheckpointError(f"{where}: {_ROUNDED}: {unknown('form', form, ROUNDED_FORMS)}")
    return form


def _read_rounded(
    model: LanguageModel, tensors: Tensors, folder: Path, device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under this library's own names."""
    found, unused = {}, set(tensors)
    for name, like in model.state_dict().items():
        if name == _HEAD and model.config.tie_embeddings:
            continue
        if name not in tensors:
            raise CheckpointError(f"{folder}: {name} is missing")
        unused.discard(name)
        tensor, shape = tensors[name], tuple(like.shape)
        exact = not like.is_floating_point() or name.endswith(".scales")
        if tuple(tensor.shape) != shape or (exact and tensor.dtype != like.dtype):
            is_ = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"{folder}: {name} is {is_}, expected {shape} {like.dtype}")
        if not exact and not tensor.is_floating_point():
            raise CheckpointError(f"{folder}: {name} is of {tensor.dtype}, expected floating-point numbers")
        found[name] = tensor.to(device, like.dtype)
    if unused:
        raise CheckpointError(
            f"{folder}: {min(unused)} belongs to no part of the network (of {len(unused)} such)"
        )
    return found


def _own_names(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name != _HEAD or not model.config.tie_embeddings:
            yield name, tensor


def _joined(ours: str, source: Source, tensors: Tensors, expected: tuple[int, ...], folder: Path) -> Tensor:
    parts = [tensors[name] for name in source.names]
    for name, part in zip(source.names, parts, strict=True):
        if not part.is_floating_point() or part.is_sparse:
            raise CheckpointError(f"{folder}: {name} is of {part.dtype}, expected floating-point numbers")
    try:
        tensor = source.read(ours, parts)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: {', '.join(source.names)}: {reason}") from None
    if tuple(tensor.shape) != expected:
        shown = tuple(tensor.shape)
        raise CheckpointError(f"{folder}: {source.names[0]} has shape {shown}, expected {expected}")
    return tensor


def _written(model: LanguageModel, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, in order."""
    weights, tied = model.state_dict(), model.config.tie_embeddings
    for name, source in _sources(model, layout).items():
        if name != source.ours[0] or (name == _HEAD and tied and not layout.stores_tied_head):
            continue
        ours = {one: weights[one] if source.keeps_type else weights[one].to(dtype) for one in source.ours}
        if name == _HEAD and tied:
            ours[name] = ours[name].clone()  # two names may not share one memory in the file
        yield from zip(source.names, source.write(ours), strict=True)
