"""Words that several verbs understand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from mambakit import ops


def _run_folder(word: str) -> str:
    """A run folder; its name alone is enough for one in `runs/`."""
    inside = Path("runs", word)
    return str(inside) if inside.is_dir() and not Path(word).is_dir() else word


Run = Annotated[
    str, typer.Argument(parser=_run_folder, metavar="RUN", help="A run, such as runs/shakespeare.")
]
Model = Annotated[
    str,
    typer.Argument(
        parser=_run_folder,
        metavar="MODEL",
        help="A run, such as runs/shakespeare; a checkpoint's folder; or a hub name, such as a/b.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as train.steps=60.")
]
Backend = Annotated[str | None, typer.Option(metavar="NAME", help="Force a backend of the operators.")]


def forced(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """The operators run on the backend of this name, or choose for themselves."""
    return contextlib.nullcontext() if backend is None else ops.backend(backend)
