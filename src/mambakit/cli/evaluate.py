"""`mambakit evaluate MODEL --task TASK`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mambakit.cli.console import duration, facts, number, out
from mambakit.cli.model import DTYPES
from mambakit.cli.options import Backend, Model, forced
from mambakit.config import ConfigError, unknown
from mambakit.data.documents import read_documents
from mambakit.data.fetch import find
from mambakit.evaluation import (
    Perplexity,
    Reader,
    exact_perplexity,
    lambada,
    length_curve,
    multiple_choice,
    read,
    strided_perplexity,
)
from mambakit.evaluation import lengths as curves
from mambakit.evaluation.results import write
from mambakit.evaluation.tasks import read_passages, read_questions

TASKS = {
    "perplexity": "text/wikitext2_test.txt",
    "lambada": "evals/lambada_test.jsonl",
    "choice": None,
    "lengths": "text/wikitext2_test.txt",
}
"""Task -> the file that it reads where none is given."""


def evaluate_model(
    model: Model,
    task: Annotated[str, typer.Option(help=f"{', '.join(TASKS)}.")],
    file: Annotated[
        str | None,
        typer.Option(help="The text or test; also looked for in the folder that MAMBAKIT_DATA names."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window, or of a passage of the curve.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Perplexity in windows this many tokens apart.", show_default="exact, with carried state"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tokens or questions.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16.", show_default="as stored")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Where the result goes.", show_default="TASK.json"),
    ] = None,
    backend: Backend = None,
) -> None:
    """Measure a language model: perplexity, LAMBADA, multiple choice, loss by length.

    mambakit evaluate runs/shakespeare --task perplexity --file play.txt --length 512 --stride 256
    """
    if task not in TASKS:
        raise ConfigError(unknown("task", task, TASKS))
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    name = file or TASKS[task]
    if name is None:
        raise ConfigError(f"--task {task} needs a --file with the questions")
    path = find(name)
    reader = read(model, dtype=None if dtype is None else DTYPES[dtype], device=device)
    settings = {"file": str(path), "limit": limit}
    begun = time.monotonic()
    with forced(backend):
        metrics = _measure(task, reader, path, length, stride, limit, settings)
    target = json_file or _place(model, task)
    seconds = time.monotonic() - begun
    write(target, task, reader, settings, metrics, seconds)
    _show(metrics)
    if task == "lengths":
        picture = target.with_suffix(".png")
        curves.draw(metrics["curve"], picture, reader.name)
        out.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)
    where = f"{duration(seconds)} on {reader.device}; written to {target}"
    out.print(where, markup=False, highlight=False, soft_wrap=True)


def _measure(
    task: str,
    reader: Reader,
    path: Path,
    length: int,
    stride: int | None,
    limit: int | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Run a task; notes in `settings` how."""
    if task == "lambada":
        return lambada(reader, read_passages(path)[:limit])
    if task == "choice":
        return multiple_choice(reader, read_questions(path)[:limit])
    ids, size = _ids(reader, path, limit)
    settings |= {"tokens": len(ids)}
    if task == "lengths":
        settings |= {"length": length}
        return {"curve": length_curve(reader.model, ids, length)}
    settings |= {"method": "exact, state carried"} if stride is None else {"length": length, "stride": stride}
    found: Perplexity
    if stride is None:
        found = exact_perplexity(reader.model, ids, size=size)
    else:
        found = strided_perplexity(reader.model, ids, length=length, stride=stride, size=size)
    return found.metrics()


def _ids(reader: Reader, path: Path, limit: int | None) -> tuple[torch.Tensor, int | None]:
    """The tokens of a text file, an end token before the first where there is one; and its bytes."""
    text = "\n".join(document for document in read_documents(path) if isinstance(document, str))
    ids = torch.from_numpy(reader.tokenizer.encode(text))
    whole = limit is None or limit >= len(ids)
    ids = ids[:limit]
    if reader.end is not None:
        return torch.cat([torch.tensor([reader.end]), ids]), len(text.encode()) if whole else None
    return ids, None  # the first token is read and not judged, so the bytes are not those of the text


def _place(model: str, task: str) -> Path:
    """Beside the model where that is a folder here, else in this folder."""
    return (Path(model) if Path(model).is_dir() else Path()) / f"{task}.json"


def _show(metrics: dict[str, Any]) -> None:
    if "curve" not in metrics:
        out.print(facts({key: _written(key, value) for key, value in metrics.items()}))
        return
    for row in metrics["curve"]:
        position = f"positions {row['from']:>7,} to {row['to'] - 1:>7,}"
        out.print(f"{position}  perplexity {row['perplexity']:.4g}", highlight=False)


def _written(key: str, value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number("accuracy" if "acc" in key else key, value)
