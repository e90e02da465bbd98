"""Training: one loop, tasks as objects, checkpoints that survive anything.

config.py      TrainConfig, the whole run as one frozen tree
trainer.py     run(config): the loop
task.py        loss, metrics and evaluation of each kind of learning
optim.py       AdamW with parameters sorted by rule
finetuning.py  where a run starts from, and what of it learns: all, adapters, the last layers
schedule.py    learning rates as pure functions of the step
ema.py         the average of the weights
guard.py       stops at the first number that is not finite, and says where
checkpoint.py  complete and intact, or not there
folder.py      the run folder: claiming it, loading from it
evaluation.py  validation data and named tests
interrupt.py   Ctrl-C as a request
log.py         JSONL, TensorBoard, progress bar;  curves.py draws, summary.py concludes
metrics.py     sums on the device;  device.py where and how precisely;  files.py durable writing
"""

from mambakit.training.checkpoint import Checkpoint, DamagedCheckpoint
from mambakit.training.config import FinetuneConfig, TrainConfig, TrainSettings
from mambakit.training.evaluation import evaluate
from mambakit.training.folder import load_run, load_tokenizer
from mambakit.training.guard import NonFiniteError
from mambakit.training.interrupt import Interrupted
from mambakit.training.optim import OptimizerConfig
from mambakit.training.schedule import ScheduleConfig
from mambakit.training.task import (
    LanguageModeling,
    SequenceClassification,
    TaskConfig,
    TextClassification,
)
from mambakit.training.trainer import run

__all__ = [
    "Checkpoint",
    "DamagedCheckpoint",
    "FinetuneConfig",
    "Interrupted",
    "LanguageModeling",
    "NonFiniteError",
    "OptimizerConfig",
    "ScheduleConfig",
    "SequenceClassification",
    "TaskConfig",
    "TextClassification",
    "TrainConfig",
    "TrainSettings",
    "evaluate",
    "load_run",
    "load_tokenizer",
    "run",
]
