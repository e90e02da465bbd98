"""`mambakit bench`: how fast this machine is, and where attention is faster.

A short version of the suites in `benchmarks/`: the operator of one layer at a few lengths, and three small
models of equal size reading, writing and learning. Everything is checked before it is timed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from mambakit.cli.console import count, duration, facts, out
from mambakit.config import ConfigError
from mambakit.files import replace_text
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.models import LanguageModel, LanguageModelConfig
from mambakit.testing import speakers, timing, workloads
from mambakit.testing.checks import check_backend
from mambakit.training import device as devices
from mambakit.training.summary import commit, hardware, versions

HEAD = 64
ATTENTION = "attention + MLP"
FULL_CHECK = 4096
"""Tokens up to which a result is compared at full size, which takes as long as a measurement."""
CALLS = 3
"""Least calls of a measurement with its check."""
OPERATORS, LANGUAGE = 0.5, 0.4
"""Shares of the time."""
LATE = 1.5
"""Times the given time, after which no further model is measured."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        width: Channels of the layer whose operator is measured.
        lengths: Tokens that it reads.
        d_model: Channels of the small models.
        layers: Mamba layers of the small models; attention has half as many, each with an MLP.
        prompt: Tokens to read.
        batch: Sequences of a training step.
        length: Tokens of each.
    """

    width: int = 512
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    d_model: int = 256
    layers: int = 4
    prompt: int = 1024
    batch: int = 4
    length: int = 128


PLAN = Plan()
MODELS = {ATTENTION: "{half}(*-)", "Mamba-2": "{n}M", "Mamba": "{n}S"}
"""What is compared with comes first, should the time run out."""
VERBS = ("read", "write", "learn")


def bench(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Take about this long.")] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured here, too.")
    ] = None,
) -> None:
    """Measure this machine: scans against attention, and small models."""
    if not seconds > 0:
        raise ConfigError(f"--seconds is {seconds:g}, expected a positive number")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no folder {json_file.parent}")
    run = Run(devices.choose(device), seconds)
    out.rule("this machine", align="left", style="dim")
    out.print(facts(run.machine()))
    out.rule("the operator of one layer, forward", align="left", style="dim")
    out.print(run.operators())
    out.rule("small models", align="left", style="dim")
    out.print(run.models())
    out.print(*run.verdicts(), sep="\n", highlight=False)
    if json_file is not None:
        replace_text(json_file, json.dumps(run.found, indent=2) + "\n")
        out.print(f"written to {json_file}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{duration(time.monotonic() - run.begun)} in all", style="dim", highlight=False)


class Run:
    """One measurement of everything.

    Args:
        device: Where.
        seconds: About how long.

    Attributes:
        found: What was measured, as it is written to a file.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self.begun = device, seconds, time.monotonic()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.clock = timing.clocks(device)[-1]  # with launches: what a program gets
        self.found: dict[str, Any] = {
            "hardware": hardware(device),
            "versions": versions(),
            "commit": commit(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "operators": [],
            "models": [],
        }

    def machine(self) -> dict[str, str]:
        """What it is, and its own limits."""
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        limits = timing.Ceilings.measure(self.device, self.dtype, seconds=self.seconds / 60)
        self.found["ceilings"] = dataclasses.asdict(limits)
        place = self.found["hardware"]
        rows = {
            "device": place.get("gpu") or f"{place['cpu']}, {place['threads']} threads",
            "copies": count(limits.copy, "B/s"),
            "multiplies": f"{count(limits.matmul, 'FLOP/s')} in {self.found['dtype']}",
        }
        if busy > place["cores"] / 2:
            rows["load"] = f"{busy:.1f} programs at work on {place['cores']} cores: idle, it would be faster"
        return rows

    def _take_turns(self, variants: Mapping[str, timing.Run], share: float) -> dict[str, timing.Timing]:
        """Measure within a share of the time; every variant has two calls at least."""
        allowed = share * self.seconds / len(variants)
        return timing.take_turns(variants, self.clock, seconds=allowed)

    @property
    def is_late(self) -> bool:
        """Whether the time is up, so that what is left has to be left out."""
        return time.monotonic() - self.begun > LATE * self.seconds

    def operators(self) -> Table:
        """A row per length, a column per operator; the fastest of a row stands out."""
        rows: dict[int, dict[str, timing.Timing]] = {}
        before: dict[str, float] = {}
        for length in PLAN.lengths:
            calls = self._calls(length, before)
            rows[length] = self._take_turns(calls, OPERATORS / len(PLAN.lengths)) if calls else {}
            before = {name: timed.seconds.median for name, timed in rows[length].items()}
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = _table("tokens", [name.replace(" ", "\n", 1) for name in columns])
        for length, row in rows.items():
            best = min(row, key=lambda name: row[name].seconds.median, default=None)
            cells = (
                _milliseconds(row[name].seconds.median, name == best) if name in row else "too long"
                for name in columns
            )
            table.add_row(f"{length:,}", *cells)
            self.found["operators"] += [
                {"length": length, "operator": name, **_written(timed)} for name, timed in row.items()
            ]
        return table

    def _calls(self, length: int, before: Mapping[str, float]) -> dict[str, Callable[[], Any]]:
        """Name -> a checked call of every operator, by the backend that it chooses, if there is time for it.

        Args:
            length: Tokens.
            before: Name -> seconds at the length before, where it was measured; empty at the first.
        """
        calls: dict[str, Callable[[], Any]] = {}
        longer = length / max((n for n in PLAN.lengths if n < length), default=length)
        for work in (
            workloads.selective_scan(1, length, 2 * PLAN.width),
            workloads.ssd(1, length, max(1, 2 * PLAN.width // HEAD)),
            workloads.attention(1, length, max(1, PLAN.width // HEAD)),
        ):
            inputs = work.inputs(self.dtype, self.device)
            backend = work.backends(inputs)[0]
            name = work.op if work.op == "attention" else f"{work.op} {backend}"
            expected = before.get(name, math.inf if before else 0.0)
            expected *= longer ** (2 if work.op == "attention" else 1)
            if CALLS * expected > OPERATORS * self.seconds / 3:
                continue
            for each in dict.fromkeys((workloads.PLAIN, backend)):  # the first is the yardstick of full size
                check_backend(work.op, each, self.dtype, self.device)
            call = work.call(inputs, backend)
            if length <= FULL_CHECK:
                work.check(f"{work.op}, backend {backend}", call, inputs, backward=False)
            calls[name] = call.run
        return calls

    def models(self) -> Table:
        """A row per model: its size, tokens per second, and what it has to remember."""
        titles = ["parameters", "reading\ntokens/s", "writing\ntokens/s", "learning\ntokens/s", "state"]
        table = _table("", titles)
        for name, pattern in MODELS.items():
            if self.is_late:
                continue
            row = self._model(pattern)
            self.found["models"].append({"model": name, **row})
            speeds = (count(row[verb]["tokens_per_second"]) for verb in VERBS)
            table.add_row(name, count(row["parameters"]), *speeds, count(row["state_bytes"], "B"))
        return table

    def _model(self, pattern: str) -> dict[str, Any]:
        torch.manual_seed(0)
        heads = AttentionConfig(n_heads=max(1, PLAN.d_model // HEAD))
        config = LanguageModelConfig(
            vocab_size=256,
            d_model=PLAN.d_model,
            pattern=pattern.format(n=PLAN.layers, half=PLAN.layers // 2),
            mixers={"S": Mamba1Config(), "*": heads},
        )
        model = LanguageModel(config, device=self.device).eval()
        speaker = speakers.Ours(model)
        for check in (speakers.check_reading, speakers.check_writing, speakers.check_learning):
            check(f"the model {config.pattern}", speaker, model)
        text = torch.randint(256, (PLAN.batch, max(PLAN.length, PLAN.prompt) + 1), device=self.device)
        prompt, piece = text[:1, : PLAN.prompt], text[:, : PLAN.length + 1]
        state = model.init_state(1, max_length=PLAN.prompt)
        # Each after the other: learning changes the weights.
        work = {
            "read": (speakers.reading(speaker, prompt), PLAN.prompt),
            "write": (speakers.writing(speaker.decoder(1, prompt), 1, self.device), 1),
            "learn": (
                speakers.learning(speaker, piece[:, :-1], piece[:, 1:], autocast=self.device.type == "cuda"),
                PLAN.batch * PLAN.length,
            ),
        }
        row: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "state_bytes": state.nbytes,
        }
        for verb, (call, tokens) in work.items():
            timed = self._take_turns({verb: call}, LANGUAGE / len(MODELS) / len(VERBS))[verb]
            row[verb] = {**_written(timed), "tokens_per_second": tokens / timed.seconds.median}
        return row

    def verdicts(self) -> list[str]:
        """In words: from which length on which scan is faster than attention, and which model when."""
        said = []
        curves: dict[str, dict[int, float]] = {}
        for line in self.found["operators"]:
            curves.setdefault(line["operator"], {})[line["length"]] = line["median"]
        rival = curves.pop("attention", {})
        for name, points in curves.items():
            if shared := [length for length in points if length in rival]:
                both = [points[n] for n in shared], [rival[n] for n in shared]
                said.append(f"{name}: {timing.crossover_in_words(shared, *both)}.")
        rows = {row["model"]: row for row in self.found["models"]}
        if attention := rows.pop(ATTENTION, None):
            said += [_compared(name, row, attention) for name, row in rows.items()]
            grows = attention["state_bytes"] / PLAN.prompt
            said.append(f"attention's state grows by {count(grows, 'B')} a token, the others' not at all.")
        if len(self.found["models"]) < len(MODELS) or not said:
            said.append("The time was up before everything was measured; --seconds gives more.")
        return said


def _compared(name: str, row: Mapping[str, Any], attention: Mapping[str, Any]) -> str:
    """One model against attention, verb by verb, slower ones said as such."""
    parts = []
    for verb, words in zip(VERBS, ("reads", "writes", "learns"), strict=True):
        ratio = row[verb]["tokens_per_second"] / attention[verb]["tokens_per_second"]
        parts.append(f"{words} {ratio:.2g} times as fast")
    return f"{name} {', '.join(parts)} as attention (below 1: attention wins)."


def _table(first: str, titles: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _milliseconds(seconds: float, is_best: bool) -> str:
    words = f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return f"[bold green]{words}[/]" if is_best else words


def _written(timed: timing.Timing) -> dict[str, Any]:
    return {**timed.seconds._asdict(), "cpu_seconds": timed.cpu_seconds.median, "runs": len(timed.samples)}
