"""Measuring a model on its run's validation data and on the tests that the data names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from mambakit.data.config import DataConfig
from mambakit.data.loader import batches
from mambakit.data.samples import Samples
from mambakit.training.config import TrainConfig
from mambakit.training.device import autocast
from mambakit.training.task import Batch, TaskConfig

Through = Callable[[Iterable[Batch]], Iterable[Batch]]


def validate(
    model: nn.Module, config: TrainConfig, dataset: Samples, count: int | None = None, through: Through = iter
) -> dict[str, float]:
    """Measure on the validation data.

    Args:
        model: The model, on the device where it is to run.
        config: The run.
        dataset: From `config.data.validation()`.
        count: Batches to look at; None is all.
        through: What the batches pass through on their way, such as a check for Ctrl-C.

    Returns:
        `val_loss` and the task's other metrics, all with the prefix `val_`.
    """
    metrics = _measure(model, config, dataset, config.train.eval_batch_size, count, through)
    return {f"val_{key}": value for key, value in metrics.items()}


def score_tests(
    model: nn.Module, config: TrainConfig, training_length: int, through: Through = iter
) -> dict[str, float]:
    """Measure on every test that the data names.

    Args:
        model: The model, on the device where it is to run.
        config: The run.
        training_length: Positions of a training sample; longer tests run in smaller batches.
        through: As for `validate`.

    Returns:
        Metrics named `accuracy@length_512` and so on; empty where the data names no tests.
    """
    results = {}
    for name, dataset in config.data.evaluations().items():
        held = config.task.reading_length(length(config.task, dataset))
        rows = max(config.train.eval_batch_size * training_length // held, 1)
        metrics = _measure(model, config, dataset, rows, None, through)
        results |= {f"{key}@{name}": value for key, value in metrics.items()}
    return results


def evaluate(model: nn.Module, config: TrainConfig, data: DataConfig | None = None) -> dict[str, float]:
    """Measure a trained model the way its run did at its end.

    Args:
        model: The model, on the device where it is to run.
        config: The run.
        data: Other data of the same kind; None is the run's own.

    Returns:
        The metrics of `validate` and `score_tests` together.
    """
    config = config if data is None else dataclasses.replace(config, data=data)
    validation = config.data.validation()
    return validate(model, config, validation) | score_tests(model, config, length(config.task, validation))


def length(task: TaskConfig, dataset: Samples) -> int:
    """Positions of one sample."""
    return task.tokens(dataset.batch([0]))


def _measure(
    model: nn.Module, config: TrainConfig, dataset: Samples, rows: int, count: int | None, through: Through
) -> dict[str, float]:
    device = next(model.parameters()).device
    pinned = device.type == "cuda"

    def stream() -> Iterator[Batch]:
        yield from through(batches(dataset, rows, count=count, pin_memory=pinned))

    with autocast(device, config.train.precision), torch.no_grad():
        return config.task.evaluate(model, stream())
