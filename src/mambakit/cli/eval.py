"""`mambakit eval RUN [key=value ...]`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from mambakit.cli.console import duration, out, scores
from mambakit.cli.options import Backend, Run, Settings, forced
from mambakit.config import ConfigError, merge, parse_overrides, to_dict
from mambakit.files import replace_text
from mambakit.generation.engine import DecodedModel, DecodeEngine
from mambakit.training import TrainConfig, device, load_run
from mambakit.training.evaluation import evaluate as measure
from mambakit.training.summary import hardware, versions

_CHANGEABLE = ("data", "device", "task", "train")


def evaluate(
    run: Run,
    settings: Settings = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Read token by token, as the decode engine with weights in float32, bfloat16, int8 or int4.",
        ),
    ] = None,
    backend: Backend = None,
) -> None:
    """Measure a trained model on its validation data and tests.

    Writes eval.json into the run folder. Settings of data, task, train and device may be changed:

    mambakit eval runs/induction-heads data.evaluation_lengths=[8192] train.eval_batch_size=16
    """
    changes = parse_overrides(settings or [])
    for key in changes:
        if key not in _CHANGEABLE:
            raise ConfigError(
                f"{key}: the model is trained; an evaluation can change {', '.join(_CHANGEABLE)}"
            )
    model, trained, _ = load_run(run)
    config = TrainConfig.from_dict(merge(to_dict(trained), changes))
    config.task.complete(config.model, config.data)  # refuses data that the model does not fit
    place = device.choose(config.device)
    reader = model.to(place) if engine is None else _decoded(model, engine, place)
    begun = time.monotonic()
    with forced(backend):
        metrics = measure(reader, config)
    seconds = time.monotonic() - begun
    result = {
        "metrics": metrics,
        "changes": changes,
        "engine": engine,
        "seconds": seconds,
        "hardware": hardware(place),
        "versions": versions(),
    }
    path = Path(run, "eval.json")
    replace_text(path, json.dumps(result, indent=2) + "\n")
    out.print(scores(metrics))
    out.print(f"\n{duration(seconds)} on {place}; written to {path}", markup=False, highlight=False)


def _decoded(model: nn.Module, form: str, place: torch.device) -> DecodedModel:
    """The model as its decode engine computes it."""
    if place.type != "cpu":
        raise ConfigError(f"--engine: the decode engine runs on a CPU, not on {place}; add device=cpu")
    return DecodedModel(model, DecodeEngine(model, form))
