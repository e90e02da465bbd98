"""The training loop.

    for each step:  the batch that starts at sample step * batch_size, a pure function of seed and number
                    loss and backward, in parts; clip, guard, AdamW at rate `schedule.factor(step)`, average
                    every so often: log, checkpoint, evaluate

What a run is after k steps is the model, AdamW's moments, the average, the generators' states and k. That is
what a checkpoint holds, so a run that is killed and resumed is the run that was not: bit for bit on a CPU.
The loop waits for a GPU only where it logs, evaluates or saves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from mambakit import files
from mambakit.config import ConfigError, to_dict
from mambakit.data.loader import batches
from mambakit.training import checkpoint, device, evaluation, finetuning, folder, optim, summary
from mambakit.training.config import TrainConfig, check_resumable
from mambakit.training.ema import Average
from mambakit.training.graph import StepGraph
from mambakit.training.guard import Guard, NonFiniteError, diagnose
from mambakit.training.interrupt import Interrupted, StopRequest
from mambakit.training.log import RunLog, default_console
from mambakit.training.metrics import Sums
from mambakit.training.schedule import factor
from mambakit.training.task import Batch

if TYPE_CHECKING:
    from rich.console import Console


def run(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Train, evaluate, and leave a run folder behind.

    Args:
        config: The run.
        console: Where to report; None reports to the terminal if there is one, and to nobody otherwise.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: Settings that do not work together, a run folder that is in use, settings changed since
            the run to be resumed, or checkpoints of which none is intact.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is saved.
        NonFiniteError: A loss or gradient was NaN or infinite; names the step and the tensor.
    """
    console = console or default_console()
    stop = StopRequest()
    device.keep_freed_memory()
    with device.numerics(config.train.matmul_precision, config.train.deterministic):
        trainer = Trainer(config, stop)
        with folder.claimed(config.folder, config.resume) as moved, stop:
            notes = [moved] if moved else []
            notes += trainer.restore() if config.resume else trainer.start()
            return trainer.train(notes, console)


class Trainer:
    """One run: builds everything, restores what was saved, and trains. `run` is the way to use it.

    Args:
        config: The run.
        stop: Looked at between steps.
    """

    def __init__(self, config: TrainConfig, stop: StopRequest) -> None:
        self.settings, self.task, self.stop = config.train, config.task, stop
        self.device = device.choose(config.device)
        torch.manual_seed(config.seed)
        if config.finetune is None:
            model = self.task.build_model(config.model, config.data)
        else:
            config, model = finetuning.start(config)
        self.config, self.model = config, model.to(self.device)
        self.resolved = {**to_dict(config), "model": to_dict(self.model.config)}
        self.average = Average(self.model, self.settings.ema) if self.settings.ema else None
        self.model.backbone.checkpoint_blocks = self.settings.activation_checkpointing
        if self.settings.compile:
            self.model.backbone.compile()
        self.groups = optim.groups(self.model, config.optimizer)
        self.parameters = [p for group in self.groups for p in group.parameters.values()]
        recorded = self.settings.cuda_graph and self.device.type == "cuda"
        self.optimizer = optim.build(self.groups, config.optimizer, capturable=recorded)
        forget = self.optimizer.zero_grad
        self.graph = StepGraph(self._update, forget) if recorded else None
        self.training_data, self.validation_data = config.data.train(config.seed), config.data.validation()
        self.guard, self.sums, self.norm = Guard(self.device), Sums(), torch.zeros(())
        self.step = self.tokens_seen = 0
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)  # of the step being done, from 1
        self.saved: int | None = None
        self.training_seconds = 0.0
        self.logged = (0, 0.0)  # tokens_seen and training_seconds at the last line of the log
        self.begun = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, in all its sessions."""
        return time.monotonic() - self.begun

    @property
    def result_model(self) -> nn.Module:
        """What is evaluated and left behind: the average, where there is one."""
        return self.average.module if self.average else self.model

    @property
    def hindsight(self) -> bool:
        """Whether bad steps are found later: looking makes a GPU wait, and fused AdamW skips by itself."""
        return self.device.type == "cuda" and bool(self.optimizer.defaults["fused"])

    def start(self) -> list[str]:
        """Start from nothing; what an unfinished attempt may have left in the folder goes."""
        for name in (folder.MODEL, folder.SUMMARY):
            (self.config.folder / name).unlink(missing_ok=True)
        return []

    def restore(self) -> list[str]:
        """Continue from the newest intact checkpoint, or start from nothing where there is none.

        Returns:
            What was found, in words.

        Raises:
            ConfigError: The checkpoint is of a run with other settings, or all checkpoints are damaged.
        """
        place = self.config.folder / folder.CHECKPOINTS
        checkpoint.sweep(place)
        found, refused = checkpoint.newest(place)
        if found is None and refused:
            raise ConfigError(f"no intact checkpoint to resume from: {'; '.join(refused)}")
        if found is None:
            return self.start()
        state = found.state
        check_resumable(self.resolved, state["config"], found.step)
        try:
            found.load_into("model", self.model)
            optim.unpack(self.optimizer, found.tensors("optimizer"))
            if self.average:
                found.load_into("ema", self.average.module)
                self.average.updates = state["averaged"]
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{found.path} does not fit this model: {error}") from None
        device.set_random_state(found.tensors("rng"), self.device)
        self.sums.restore(state["sums"], self.device)
        self.step = self.saved = found.step
        self.number.fill_(found.step)
        self.tokens_seen, self.training_seconds = state["tokens_seen"], state["training_seconds"]
        self.begun = time.monotonic() - state["seconds"]
        self.logged = tuple(state["logged"])
        self._restore_best(found)
        return [f"refused {line}" for line in refused] + [f"resumed at step {self.step}"]

    def _restore_best(self, found: checkpoint.Checkpoint) -> None:
        """Bring the model left behind back to what it was: a later one belongs to a future trained anew."""
        path = self.config.folder / folder.MODEL
        if note := found.state.get("best"):
            files.replace(path, lambda temporary: save_file(found.tensors("best"), temporary, note))
        elif self.settings.select == "best" or int(folder.model_note(path.parent).get("step", 0)) > self.step:
            path.unlink(missing_ok=True)

    def train(self, notes: list[str], console: Console | None) -> dict[str, Any]:
        """Do all remaining steps and conclude.

        Args:
            notes: Lines for the log.
            console: Where to report.

        Returns:
            The content of `summary.json`.
        """
        config, settings = self.config, self.settings
        folder.write_config(config.folder, self.resolved, config.data.tokenizer)
        with RunLog(
            config.folder, config.recipe, settings.steps, self.step, settings.tensorboard, console
        ) as self.log:
            for line in [*notes, *(group.describe() for group in self.groups)]:
                self.log.note(line)
            try:
                self._loop()
                metrics = self._conclude()
            except _Stopped:
                self._check()
                self._save()
                self.log.draw()
                raise Interrupted(self.step, config.folder, self.stop.requested) from None
            self.log.draw()
        result = self._summary(metrics)
        summary.write(config.folder / folder.SUMMARY, result)
        return result

    def _loop(self) -> None:
        settings = self.settings
        parts = batches(
            self.training_data,
            settings.batch_size // settings.accumulate,
            start=self.step * settings.batch_size,
            count=(settings.steps - self.step) * settings.accumulate,
            workers=settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.model.train()
        while True:
            # Evaluations come after the checkpoint of the same step, so a resumed run makes them again.
            if self._due(settings.eval_every) and (self.step < settings.steps or settings.select == "best"):
                self._validate()
            if self.step == settings.steps:
                return
            if self.stop.requested:
                raise _Stopped
            begun = time.monotonic()
            self._optimise([next(parts) for _ in range(settings.accumulate)])
            last = self.step == settings.steps
            log, save = self._due(settings.log_every), last or self._due(settings.checkpoint_every)
            if log or save or self._due(settings.eval_every):
                self._check()  # waits for the device, so that the clock below is right
            self.training_seconds += time.monotonic() - begun
            self.log.advance(self.step)
            if log:
                self._log_training()
            if save:
                self._save()

    def _optimise(self, parts: list[Batch]) -> None:
        """One optimiser step over the parts of its batch."""
        optim.set_rates(self.optimizer, factor(self.step, self.settings.steps, self.config.schedule))
        targets = self._targets(parts)
        moved = [device.move(self.task.prepare(part), self.device) for part in parts]
        if self.graph:
            found = self.graph(moved, targets)
        else:
            found = self._update(moved, targets)
            self.optimizer.zero_grad(set_to_none=True)
        for sums in found:
            self.sums.add(sums)
        if self.average:
            self.average.update(self.model)
        self.step += 1
        self.tokens_seen += sum(self.task.tokens(part) for part in parts)

    def _update(self, parts: list[Batch], targets: int) -> list[dict[str, Tensor]]:
        """Gradient, guard and optimiser: the part of a step that is all device work.

        Args:
            parts: The batch, on the device.
            targets: Labels of the whole step.

        Returns:
            The sums of each part.
        """
        total, found = torch.zeros((), device=self.device), []
        for part in parts:
            with device.autocast(self.device, self.settings.precision):
                loss, sums = self.task.loss(self.model, part, targets)
            loss.backward()
            total += loss.detach()
            found.append(sums)
        self.norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, self.norm)
        self.number += 1
        self.guard.watch(self.number, total, self.norm)
        if not self.hindsight:
            self._check()
        else:
            self.optimizer.found_inf = self.guard.tripped  # skips this and all later updates, without waiting
        self.optimizer.step()
        return found

    def _targets(self, parts: list[Batch]) -> int:
        targets = sum(self.task.targets(part) for part in parts)
        if not targets:
            raise ValueError(f"step {self.step + 1}: its batch has no label, expected at least one")
        return targets

    def _loss(self, part: Batch, targets: int) -> Tensor:
        """Loss of a part of a batch that comes from the host."""
        part = device.move(self.task.prepare(part), self.device)
        with device.autocast(self.device, self.settings.precision):
            return self.task.loss(self.model, part, targets)[0]

    def _check(self) -> None:
        """Raise if a step so far was not finite."""
        bad = self.guard.first()
        if bad is None:
            return
        settings = self.settings
        size, first = settings.batch_size // settings.accumulate, (bad - 1) * settings.batch_size
        parts = list(batches(self.training_data, size, start=first, count=settings.accumulate))
        tensor = diagnose(self.model, parts, lambda part: self._loss(part, self._targets(parts)))
        kept = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        raise NonFiniteError(
            bad, tensor, f"Nothing of it was saved: {kept}. A lower optimizer.lr often helps."
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step > 0 and self.step % every == 0

    def _log_training(self) -> None:
        metrics = self.task.summarise(self.sums.read())
        self.sums.clear()
        tokens, seconds = self.tokens_seen - self.logged[0], self.training_seconds - self.logged[1]
        self.logged = (self.tokens_seen, self.training_seconds)
        metrics |= {
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": float(self.norm),
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
        self.log.train(self.step, metrics)

    def _validate(self) -> None:
        self.log.activity("evaluating")
        metrics = evaluation.validate(
            self.result_model, self.config, self.validation_data, self.settings.eval_batches, self._stoppable
        )
        self.log.validation(self.step, metrics)
        loss = metrics["val_loss"]
        best = folder.model_note(self.config.folder).get("val_loss", "inf")
        if self.settings.select == "best" and loss < float(best):
            self._write_model({"step": str(self.step), "val_loss": repr(loss)})

    def _write_model(self, note: dict[str, str]) -> None:
        model = finetuning.finished(self.result_model)
        files.replace_module(self.config.folder / folder.MODEL, model, note)
        finetuning.write_adapter(self.result_model, self.config)

    def _stoppable(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        for batch in stream:
            if self.stop.requested:
                raise _Stopped
            yield batch

    def _save(self) -> None:
        if self.saved == self.step:
            return
        self.log.activity("saving")
        self.log.flush()
        parts = {
            "model": self.model,
            "optimizer": optim.pack(self.optimizer),
            "rng": device.random_state(self.device),
        }
        state = {
            "config": self.resolved,
            "samples": self.step * self.settings.batch_size,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "logged": self.logged,
            "sums": self.sums.read(),
            "versions": summary.versions(),
        }
        if self.average:
            parts["ema"] = self.average.module
            state["averaged"] = self.average.updates
        if self.settings.select == "best" and (note := folder.model_note(self.config.folder)):
            parts["best"] = load_file(self.config.folder / folder.MODEL)
            state["best"] = note
        place = self.config.folder / folder.CHECKPOINTS
        checkpoint.write(place, self.step, parts, state, self.settings.keep)
        self.saved = self.step

    def _conclude(self) -> dict[str, float]:
        """Settle which model is left behind, and measure it on everything."""
        model, path = self.result_model, self.config.folder / folder.MODEL
        if self.settings.select == "best" and path.exists():
            model = finetuning.finished(model)
            load_model(model, path)
        else:
            self._write_model({"step": str(self.step)})
        self.log.activity("final evaluation")
        length = evaluation.length(self.task, self.training_data)
        metrics = evaluation.validate(model, self.config, self.validation_data, through=self._stoppable)
        metrics |= evaluation.score_tests(model, self.config, length, through=self._stoppable)
        self.log.final(int(folder.model_note(self.config.folder)["step"]), metrics)
        return metrics

    def _summary(self, metrics: dict[str, float]) -> dict[str, Any]:
        data, training_seconds = self.config.data, self.training_seconds
        return {
            "recipe": self.config.recipe,
            "metrics": metrics,
            "steps": self.step,
            "model_step": int(folder.model_note(self.config.folder)["step"]),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.parameters),
            "parameter_groups": [group.row for group in self.groups],
            "samples_seen": self.step * self.settings.batch_size,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "training_seconds": training_seconds,
            "tokens_per_second": self.tokens_seen / training_seconds if training_seconds else None,
            "peak_memory_bytes": device.peak_memory(self.device),
            "chance": data.chance,
            "baseline": vars(data.baseline) if data.baseline else None,
            "hardware": summary.hardware(self.device),
            "versions": summary.versions(),
            "commit": summary.commit(),
            "config": self.resolved,
        }


class _Stopped(Exception):
    """A stop was requested; raised between steps and between evaluation batches."""
