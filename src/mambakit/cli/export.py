"""`mambakit export MODEL --to FORMAT OUT`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from mambakit.cli.console import complain, count, out
from mambakit.cli.model import writer
from mambakit.cli.options import Model
from mambakit.config import ConfigError
from mambakit.data.tokenizers import Subwords, Tokenizer
from mambakit.export import export_gguf, export_onnx


class Format(str, enum.Enum):
    """What can be written."""

    onnx = "onnx"
    gguf = "gguf"


def export(
    model: Model,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder (onnx) or file (gguf).")],
    to: Annotated[Format, typer.Option(help="ONNX graphs, or a GGUF file for llama.cpp.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="GGUF: type of the matrices: f32, f16, bf16, q8_0, q4_0.", show_default="f32"),
    ] = None,
) -> None:
    """Write a model for other programs.

    mambakit export runs/shakespeare --to onnx shakespeare-onnx
    """
    if dtype is not None and to is Format.onnx:
        raise ConfigError(f"--dtype {dtype} is for gguf; ONNX graphs are written in float32")
    found = writer(model, needs_tokenizer=False)
    if to is Format.onnx:
        path = export_onnx(found.model, target)
    else:
        path = export_gguf(
            found.model,
            target,
            dtype=dtype or "f32",
            tokenizer=_definition(found.tokenizer),
            eos=next(iter(found.stop_tokens), None),
            name=Path(model).name,
        )
    written = [path] if path.is_file() else sorted(path.iterdir())
    for file in written:
        out.print(f"{file}  {count(file.stat().st_size, 'B')}", markup=False, highlight=False, soft_wrap=True)


def _definition(tokenizer: Tokenizer | None) -> str | None:
    """The `tokenizer.json` that llama.cpp can be told, if there is one."""
    if isinstance(tokenizer, Subwords):
        return tokenizer.definition
    has = "no tokeniser" if tokenizer is None else f"a tokeniser of {tokenizer.describe()['type']}"
    complain(f"the model has {has}: llama.cpp will read and write token numbers only", word="warning")
    return None
