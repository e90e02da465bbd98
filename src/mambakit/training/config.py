"""The configuration of a training run: one frozen tree, from a recipe, a command line or Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mambakit.config import Config, ConfigError, unknown
from mambakit.data.config import DataConfig
from mambakit.layers.lora import LoRAConfig
from mambakit.training.optim import OptimizerConfig
from mambakit.training.schedule import ScheduleConfig, same_so_far
from mambakit.training.task import TaskConfig

Precision = Literal["auto", "float32", "bf16"]
MatmulPrecision = Literal["highest", "high", "medium"]
Select = Literal["last", "best"]
Mode = Literal["full", "lora", "last-layers"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Config):
    """How a run goes about its work.

    Args:
        steps: Optimiser steps in all.
        batch_size: Samples of one optimiser step.
        accumulate: Parts in which a step's samples are computed, to save memory; the gradient is the same.
        clip: Largest norm of the whole gradient; None does not clip.
        eval_every: Steps between evaluations on the validation data; None evaluates at the end only.
        eval_batches: Batches of each of these evaluations; None takes all. The final one always takes all.
        eval_batch_size: Sequences of the training length per evaluation batch; longer ones come in
            proportionally smaller batches.
        checkpoint_every: Steps between checkpoints; None saves at the end and on Ctrl-C only.
        keep: Checkpoints kept.
        log_every: Steps between lines of the log.
        ema: Decay of an exponential moving average of the weights, in (0, 1); evaluations and the final model
            then use the average. None keeps none.
        select: The model left behind: the `last`, or the `best` by validation loss.
        activation_checkpointing: Recompute each block in the backward pass instead of storing it.
        compile: Compile the model's blocks with `torch.compile`.
        cuda_graph: Record a whole training step and replay it; pays where a model is so small that launching
            its kernels takes longer than running them. Needs batches of one shape. Does nothing on a CPU.
        precision: `float32`, or `bf16`: matrix products in bfloat16, parameters and recurrences in float32;
            `auto` takes `bf16` where the machine multiplies it faster.
        matmul_precision: Of float32 matrix products on a GPU: `highest`, `high` (TF32) or `medium`.
        workers: Processes that prepare batches ahead of time; 0 prepares them in between.
        deterministic: Refuse operations that may give other bits from run to run on a GPU.
        tensorboard: Also write TensorBoard events.

    Raises:
        ValueError: A number out of range, or settings that exclude each other.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    clip: float | None = 1.0
    eval_every: int | None = 100
    eval_batches: int | None = None
    eval_batch_size: int = 64
    checkpoint_every: int | None = 100
    keep: int = 2
    log_every: int = 10
    ema: float | None = None
    select: Select = "last"
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    precision: Precision = "float32"
    matmul_precision: MatmulPrecision = "highest"
    workers: int = 0
    deterministic: bool = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range and settings that exclude each other."""
        for key in ("steps", "batch_size", "accumulate", "eval_batch_size", "keep", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected at least 1")
        for key in ("eval_every", "eval_batches", "checkpoint_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}, expected at least 1 or null")
        for key, valid in (
            ("precision", Precision),
            ("matmul_precision", MatmulPrecision),
            ("select", Select),
        ):
            if getattr(self, key) not in get_args(valid):
                raise ValueError(unknown(key, getattr(self, key), get_args(valid)))
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of accumulate={self.accumulate}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a positive number or null")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}, expected a decay between 0 and 1, or null")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected at least 0")
        if self.compile and self.cuda_graph:
            raise ValueError("compile and cuda_graph exclude each other; set one of them")
        if self.select == "best" and self.eval_every is None:
            raise ValueError("select=best needs evaluations to choose by; set eval_every")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """Where a run starts from, and what of it learns.

    Args:
        source: A run folder, a checkpoint folder, or a repository of the hub.
        mode: `full`, `lora` (adapters in the mixers) or `last-layers`.
        lora: Settings of the adapters.
        last_layers: Blocks that learn in the mode `last-layers`.

    Raises:
        ValueError: An unknown mode, or no layer.
    """

    source: str
    mode: Mode = "full"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    last_layers: int = 2

    def __post_init__(self) -> None:
        """Refuse modes and numbers that mean nothing."""
        if self.mode not in get_args(Mode):
            raise ValueError(unknown("mode", self.mode, get_args(Mode)))
        if self.last_layers < 1:
            raise ValueError(f"last_layers is {self.last_layers}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A training run.

    Args:
        task: What is learned.
        data: From what.
        model: By which model: settings of `LanguageModelConfig` or `SequenceClassifierConfig`, without the
            sizes that the data decides. In a fine-tuning run only what differs from the source.
        finetune: What to start from, and how; None starts from nothing.
        recipe: Name of the recipe this came from.
        optimizer: AdamW's settings.
        schedule: The learning rate over the run.
        train: Length, batches, evaluation, saving.
        out: The run folder; None means `runs/` and the recipe's name.
        resume: Continue from the newest intact checkpoint in the run folder, if there is one.
        seed: Decides the initial weights, the order of the data and dropout.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises:
        ValueError: seed is negative.
    """

    task: TaskConfig
    data: DataConfig
    model: Mapping[str, Any] = field(default_factory=dict)
    finetune: FinetuneConfig | None = None
    recipe: str = "custom"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    out: str | None = None
    resume: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a seed that the generators cannot take."""
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected an integer in [0, 2**63)")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path("runs", self.recipe) if self.out is None else Path(self.out)


# What may differ between a run and its resumption without making the sum of both a third run.
_FREE = frozenset(
    {"recipe", "out", "resume", "device"}
    | {
        f"train.{key}"
        for key in (
            "eval_every",
            "eval_batches",
            "eval_batch_size",
            "checkpoint_every",
            "keep",
            "log_every",
            "workers",
            "activation_checkpointing",
            "compile",
            "cuda_graph",
            "tensorboard",
        )
    }
)


def check_resumable(config: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> None:
    """Refuse to continue a run under settings that would have made its past different.

    Logging, saving and placement may change. So may the length and the schedule, as long as every step
    already done would have had the same learning rate: a constant or not yet decaying wsd run can be
    lengthened, a cosine run cannot.

    Args:
        config: The settings now, as plain data.
        saved: The settings then.
        step: Optimiser steps already done.

    Raises:
        ConfigError: Names the settings that differ, with both values.
    """
    now, then = dict(_leaves(json.loads(json.dumps(config)))), dict(_leaves(saved))
    differing = [
        key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key) and key not in _FREE
    ]
    timing = [key for key in differing if key == "train.steps" or key.startswith("schedule.")]
    if timing:
        runs = [(c["train"]["steps"], ScheduleConfig.from_dict(c["schedule"])) for c in (saved, config)]
        if runs[1][0] >= step and same_so_far(step, *runs):
            differing = [key for key in differing if key not in timing]
    if differing:
        listed = ", ".join(f"{key}={now.get(key)!r} (was {then.get(key)!r})" for key in differing)
        raise ConfigError(
            f"the run cannot be resumed at step {step} with other settings: {listed}; "
            "restore them, or choose another out="
        )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in nested mappings."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
