"""What a run says while it runs: a line per measurement in a file, TensorBoard, and a progress bar.

`metrics.jsonl` is the record; the others are views of it. rich, TensorBoard and matplotlib are used where
they are installed, and a run without them only says once that they are missing.

    {"kind": "train", "step": 10, "loss": 2.1, "accuracy": 0.4, "lr": 0.001, "grad_norm": 0.8, ...}
    {"kind": "validation", "step": 100, "val_loss": 1.9, ...}
    {"kind": "final", "step": 500, "val_loss": 1.5, "accuracy@length_512": 0.99, ...}
    {"kind": "note", "step": 100, "text": "resumed at step 100"}
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambakit import files
from mambakit.training import curves

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

_PICTURE_EVERY = 60.0  # seconds between drawings during a run; one takes about half a second


class RunLog:
    """The voices of one run; use as a context manager.

    Args:
        folder: The run folder.
        title: Name of the run.
        steps: Optimiser steps of the whole run.
        step: Optimiser steps done before; later lines of an existing record are dropped.
        tensorboard: Whether to write TensorBoard events.
        console: Where to talk; None talks to nobody.
    """

    def __init__(
        self, folder: Path, title: str, steps: int, step: int, tensorboard: bool, console: Console | None
    ) -> None:
        self.folder, self.title, self.step = folder, title, step
        self.path = folder / "metrics.jsonl"
        truncate(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._console = console
        self._drawn = time.monotonic()
        self._can_draw = True
        self._last_validation = ""
        self._bar: tuple[Progress, TaskID] | None = None
        if console is not None and console.is_terminal:
            self._bar = _progress(console, steps, step)
            self._bar[0].start()
        self._board = self._open_board() if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar[0].stop()
        if self._board:
            self._board.close()
        self._file.close()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar:
            self._bar[0].update(self._bar[1], completed=step, activity="")

    def train(self, step: int, values: dict[str, float]) -> None:
        """Record training metrics: at least loss, lr and tokens_per_second."""
        self._record("train", step, values)
        if self._bar:
            speed = f"{_short(values['tokens_per_second'])} tokens/s"
            numbers = f"loss {values['loss']:.4f}{self._last_validation}  {speed}"
            self._bar[0].update(self._bar[1], completed=step, numbers=numbers, activity="")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Record an evaluation, and redraw the curves now and then."""
        self._record("validation", step, values)
        self._last_validation = f"  val {values['val_loss']:.4f}"
        self._say(f"step {step}: {_listed(values)}")
        if time.monotonic() - self._drawn > _PICTURE_EVERY:
            self.draw()

    def final(self, step: int, values: dict[str, float]) -> None:
        """Record the evaluation of the model that the run leaves behind, which may be of an earlier step."""
        self._record("final", step, values)
        self.activity("")
        tests = dict.fromkeys(key.partition("@")[2] for key in values)
        for test in tests:
            own = {
                key.partition("@")[0]: value for key, value in values.items() if key.partition("@")[2] == test
            }
            self._say(f"model of step {step}{', ' if test else ''}{test}: {_listed(own)}")

    def note(self, text: str) -> None:
        """Record and say something that is not a measurement."""
        self._write({"kind": "note", "step": self.step, "text": text})
        self._say(text)

    def activity(self, text: str) -> None:
        """Show on the progress bar what the run is doing besides training; nothing, if the text is empty."""
        if self._bar:
            self._bar[0].update(self._bar[1], activity=text)

    def flush(self) -> None:
        """Bring the record down to the disk, as a checkpoint does with everything else."""
        self._file.flush()
        files.flush(self.path)

    def draw(self) -> None:
        """Draw the curves into `curves.png`."""
        if self._can_draw:
            try:
                files.replace(
                    self.folder / "curves.png", lambda path: curves.draw(self.path, path, self.title)
                )
            except ImportError:
                self._can_draw = False
                self.note("matplotlib is not installed: no curves.png; metrics.jsonl has the numbers")
        self._drawn = time.monotonic()

    def _record(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.step = step
        self._write({"kind": kind, "step": step, **values})
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _open_board(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.note("tensorboard is not installed: no events are written; metrics.jsonl has the numbers")
            return None
        purge = self.step + 1 if self.step else None
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)


def truncate(path: Path, step: int) -> None:
    """Drop from a record what came after a checkpoint at `step`.

    Evaluations at `step` go too: a checkpoint is written before them, and the resumed run makes them again.
    """
    last = {"train": step, "note": step, "validation": step - 1, "final": -1}
    kept = [line for line in curves.read(path) if step and line["step"] <= last[line["kind"]]]
    if path.exists():
        files.replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def default_console() -> Console | None:
    """The terminal, if standard output is one and rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal else None


def _progress(console: Console, steps: int, step: int) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("{task.fields[activity]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )
    return progress, progress.add_task("", total=steps, completed=step, numbers="", activity="starting")


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())


def _short(number: float) -> str:
    """12345 as 12.3k."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
