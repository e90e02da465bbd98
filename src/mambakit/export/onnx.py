"""ONNX: a language model as two graphs, one that reads a text and one that writes a token.

    manifest.json  what is what: inputs, outputs, states with their shapes, sizes of the model
    prefill.onnx   tokens (batch, length), states -> logits (batch, vocab), states
    step.onnx      tokens (batch,), states -> logits (batch, vocab), states
    weights.bin    the weights of both, once

States are inputs and outputs by name, so the caller keeps them; all zeros is the empty state. Batch and
length are open. `prefill` may be called again to go on reading: with states, a text in pieces is the text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit import files, ops
from mambakit.config import ConfigError
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mixer import MixerConfig, State
from mambakit.layers.mlp import GatedMLPConfig, MLPConfig
from mambakit.models.language import LanguageModel
from mambakit.ops.dispatch import extended

MANIFEST, PREFILL, STEP, WEIGHTS = "manifest.json", "prefill.onnx", "step.onnx", "weights.bin"
OPSET = 18
MIXERS: tuple[type[MixerConfig], ...] = (Mamba1Config, Mamba2Config, GatedMLPConfig, MLPConfig)
"""Mixers that have a form in ONNX."""
_EXAMPLE = (2, 3)
"""Batch and length that graphs are traced for; neither shows in them."""
_SMALL = 256
"""Tensors of fewer bytes stay in the graphs."""


def export_onnx(model: LanguageModel, folder: str | os.PathLike[str]) -> Path:
    """Write a language model as two ONNX graphs with common weights, in float32.

    Args:
        model: A model of Mamba-1, Mamba-2 and MLP blocks; it is not changed.
        folder: Made if needed; must not hold an export.

    Returns:
        The folder.

    Raises:
        ConfigError: A block that has no form in ONNX, a folder with an export, or a missing package.
    """
    folder = Path(folder)
    _check(model, folder)
    model = _copy(model)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(tensor.shape[1:]) for name, tensor in model.init_state(1).tensors()}
    prefill, step = (_trace(model, writes) for writes in (False, True))
    _save(prefill, step, folder)
    described = {
        "format": "mambakit-onnx-1",
        "opset": OPSET,
        "vocab_size": model.config.vocab_size,
        "dtype": "float32",
        "graphs": {
            name: {"file": file, "tokens": tokens, "logits": ["batch", model.config.vocab_size]}
            for name, file, tokens in (
                ("prefill", PREFILL, ["batch", "length"]),
                ("step", STEP, ["batch"]),
            )
        },
        "weights": WEIGHTS,
        "states": [
            {"input": name, "output": _after(name), "shape": ["batch", *shape]}
            for name, shape in shapes.items()
        ],
        "blocks": [block.tag for block in model.config.blocks],
    }
    files.replace_text(folder / MANIFEST, json.dumps(described, indent=2) + "\n")
    return folder


def _check(model: LanguageModel, folder: Path) -> None:
    """Refuse what cannot be exported before anything is traced."""
    for number, block in enumerate(model.backbone.blocks):
        config = block.mixer.config
        if type(config) not in MIXERS:
            known = ", ".join(kind.tag for kind in MIXERS)
            raise ConfigError(
                f"block {number} is of type {config.tag!r}, which has no ONNX form; these have: {known}"
            )
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise ConfigError(f"exporting to ONNX needs: pip install 'mambakit[export]' ({error})") from None
    assert onnx and onnxscript
    if any((folder / name).exists() for name in (MANIFEST, PREFILL, STEP, WEIGHTS)):
        raise ConfigError(f"{folder} already holds an export, expected a new folder")


def _copy(model: LanguageModel) -> LanguageModel:
    """The model in float32 on the CPU, its parameters shared where they are that already."""
    copy = LanguageModel(model.config, device="meta", dtype=torch.float32)
    weights = {name: t.detach().to("cpu", torch.float32) for name, t in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    if model.config.tie_embeddings:
        copy.lm_head.weight = copy.embedding.weight
    return copy.eval().requires_grad_(False)


def _after(name: str) -> str:
    """What a state is called when it comes out."""
    return f"{name}.after"


class _Graph(nn.Module):
    """A model as a function of tokens and states.

    Args:
        model: The model.
        names: The dotted names of its states' tensors, in order.
        writes: Whether it takes one token for each sequence instead of a text.
    """

    def __init__(self, model: LanguageModel, names: list[str], writes: bool) -> None:
        super().__init__()
        self.model, self.names, self.writes = model, names, writes

    def forward(self, tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Read tokens `(b, l)`, or write after tokens `(b,)`.

        Args:
            tokens: Token numbers.
            states: The states' tensors, in the order of the names.

        Returns:
            Logits `(b, v)` after the last token, and the states after it.
        """
        tree = _tree({name: tensor.clone() for name, tensor in zip(self.names, states, strict=True)})
        x = self.model.features(tokens.unsqueeze(1) if self.writes else tokens, tree)
        after = dict(tree.tensors())
        return self.model.lm_head(x[:, -1]), *(after[name] for name in self.names)


def _tree(flat: Mapping[str, Tensor]) -> State:
    """A state from dotted names."""
    tree = State()
    for name, tensor in flat.items():
        *branches, leaf = name.split(".")
        node = tree
        for branch in branches:
            if branch not in node:
                node[branch] = State()
            node = node[branch]
        node[leaf] = tensor
    return tree


def _trace(model: LanguageModel, writes: bool) -> Any:
    """One of the graphs, as `torch.onnx.ONNXProgram`."""
    from mambakit.export import onnx_operators as forms

    batch, length = _EXAMPLE
    state = dict(model.init_state(batch).tensors())
    # Neither zeros nor one number twice: nothing may be taken for a constant.
    tokens = torch.arange(batch * length).remainder(model.config.vocab_size).view(batch, length)
    row = torch.export.Dim("batch")
    axes = {0: row} if writes else {0: row, 1: torch.export.Dim("length")}
    graph = _Graph(model, list(state), writes).eval()
    forms_of = dict.fromkeys(("selective_scan", "ssd", "causal_conv1d"), forms)
    with torch.no_grad(), ops.backend("reference"), extended("onnx", **forms_of), _quiet():
        program = torch.export.export(
            graph,
            (tokens[:, 0] if writes else tokens, list(state.values())),
            dynamic_shapes=(axes, [{0: row}] * len(state)),
        )
        return torch.onnx.export(
            program,
            input_names=["tokens", *state],
            output_names=["logits", *map(_after, state)],
            custom_translation_table=dict(forms.TRANSLATIONS),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says of itself: deprecations inside it, packages that it could use."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name: ")
            yield
    finally:
        logger.setLevel(level)


def _save(prefill: Any, step: Any, folder: Path) -> None:
    """Write both graphs, each tensor of weights once."""
    import onnx_ir as ir

    ir.save(prefill.model, folder / PREFILL, external_data=WEIGHTS, size_threshold_bytes=_SMALL)
    written = {}
    for value in ir.load(folder / PREFILL).graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            written[_content(value.const_value)] = value.const_value
    for value in step.model.graph.initializers.values():
        value.const_value = written.get(_content(value.const_value), value.const_value)
    ir.save(step.model, folder / STEP)


def _content(tensor: Any) -> tuple[Any, ...]:
    """What tells tensors apart; names do not, as the exporter gives them to whatever it folds."""
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(tensor.tobytes()).digest()
