"""Runs the cases of a suite: open, check, measure in turns, write one JSON line per variant and clock.

A case is a piece of work at one size; its variants are built one after the other, and each must show that it
computes the right thing before it is timed. What cannot be timed is a result too, and written down with its
reason: `missing` (a peer that is not installed), `declined` (would take too long or too much memory),
`failed` (raised an error), `wrong` (computes something else), `no time` (the budget was spent).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from mambakit.testing import timing
from mambakit.testing.checks import WrongResultError, check_backend
from mambakit.training import summary

RESULTS = Path(__file__).parent / "results"

# What a variant may raise without ending the suite: on a lent GPU one peer's fault must not cost the rest.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class DeclinedError(Exception):
    """A variant is not measured here, for a reason known before it starts."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A variant that has shown that it is right.

    Attributes:
        run: One call of the work.
        error: The largest relative error that its check found.
        moved: Bytes that one call has to move at least, where that differs from variant to variant.
        flops: Floating-point operations of one call, likewise.
        facts: What else is to be written down, such as bytes of state.
    """

    run: timing.Run
    error: float
    moved: float | None = None
    flops: float | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A case with its inputs.

    Attributes:
        variants: Name -> builds the variant and checks it; the first is what the others are compared with.
        moved: Bytes that one call has to move at least.
        flops: Floating-point operations of one call.
        tokens: Tokens that one call reads or writes.
    """

    variants: Mapping[str, Callable[[], Ready]]
    moved: float = 0.0
    flops: float = 0.0
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of work at one size.

    Attributes:
        name: Unique in its suite.
        open: Makes inputs and variants.
        dtype: Type of the activations.
        at: Sizes by name, the axes of plots.
        together: Whether variants are alive at once and take turns; otherwise one after the other, each with
            the device's memory for itself.
        clocks: Names of the clocks to use; all of the device by default.
    """

    name: str
    open: Callable[[], Opened]
    dtype: torch.dtype
    at: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    together: bool = True
    clocks: tuple[str, ...] | None = None


@dataclasses.dataclass
class Bench:
    """Settings of a run, and what it has found so far.

    Attributes:
        device: Where to measure.
        quick: Toy sizes and one or two turns: a test of the suites, not of the machine.
        seconds: For the turns of one variant under one clock.
        budget: Seconds after which no further case is started, and among which the cases share.
        only: Cases whose name contains one of these; all by default.
        profile: Add device times by kernel.
        commit: Of the code; asked of git by default.
    """

    device: torch.device
    quick: bool = False
    seconds: float = 2.0
    budget: float | None = None
    only: tuple[str, ...] = ()
    profile: bool = False
    commit: str | None = None
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Start the clock of the budget, and note once what stays the same."""
        self.begun = time.monotonic()
        self.turns = 2 if self.quick else 25
        if self.quick:
            self.seconds = min(self.seconds, 0.02)
        self._ceilings: dict[torch.dtype, timing.Ceilings] = {}
        self._errors: dict[tuple[str, str, torch.dtype], float] = {}
        self.environment = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit or summary.commit(),
            "quick": self.quick,
            **summary.hardware(self.device),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "versions": {**summary.versions(), **peers.versions()},
        }

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.begun)

    def ceilings(self, dtype: torch.dtype) -> timing.Ceilings:
        """The machine's limits for a type.

        A GPU is measured once; a CPU, which other programs may slow down, at every case, and its best counts.
        """
        known = self._ceilings.get(dtype)
        if known is None or (self.device.type == "cpu" and not self.quick):
            made = {"seconds": 0.02, "scale": 2**-6} if self.quick else {"seconds": 0.1 if known else 0.5}
            found = timing.Ceilings.measure(self.device, dtype, **made)
            self._ceilings[dtype] = found.or_better(known) if known else found
        return self._ceilings[dtype]

    def check(self, op: str, backend: str, dtype: torch.dtype) -> float:
        """Error of a backend against the float64 reference, computed once per run; see `check_backend`."""
        key = op, backend, dtype
        if key not in self._errors:
            self._errors[key] = check_backend(op, backend, dtype, self.device)
        return self._errors[key]

    def found(self, suite: str, variant: str, **at: Any) -> dict[str, Any] | None:
        """The first line of a variant at some size in this run."""
        for line in self.lines:
            if (line["suite"], line["variant"]) == (suite, variant) and at.items() <= line["at"].items():
                return line
        return None


def run_suite(
    bench: Bench, suite: str, cases: Iterable[Case], write: Callable[[dict[str, Any]], None]
) -> None:
    """Measure the cases of a suite.

    Args:
        bench: Settings; its `lines` grow.
        suite: The suite's name.
        cases: In the order of their importance.
        write: Takes each line.
    """
    chosen = [c for c in cases if not bench.only or any(word in c.name for word in bench.only)]
    for number, case in enumerate(chosen):

        def emit(variant: str, status: str, case: Case = case, **facts: Any) -> None:
            line = {
                "suite": suite,
                "name": case.name,
                "variant": variant,
                "status": status,
                "dtype": str(case.dtype).removeprefix("torch."),
                "at": dict(case.at),
                **facts,
                **bench.environment,
            }
            bench.lines.append(line)
            write(line)

        if bench.left <= 0:
            emit("", "no time", reason=f"the budget of {bench.budget:g} s was spent")
            continue
        share = bench.left / (len(chosen) - number)
        try:
            opened = case.open()
        except FAILURES as error:
            emit("", "failed", reason=_said(error))
        else:
            _measure(bench, case, opened, emit, share)
            del opened
        _release(bench.device)


def _measure(bench: Bench, case: Case, opened: Opened, emit: Callable[..., None], share: float) -> None:
    """Build the variants, together or one by one, and measure what could be built."""
    clocks = [c for c in timing.clocks(bench.device) if case.clocks is None or c.name in case.clocks]
    seconds = min(bench.seconds, share / 2 / len(opened.variants) / len(clocks))
    if case.together:
        ready = {name: r for name, build in opened.variants.items() if (r := _build(name, build, emit))}
        _take_turns(bench, case, opened, ready, clocks, seconds, emit)
        return
    for name, build in opened.variants.items():
        if (one := _build(name, build, emit)) is not None:
            facts = _peak_memory(one, bench.device)
            one = dataclasses.replace(one, facts={**one.facts, **facts})
            _take_turns(bench, case, opened, {name: one}, clocks, seconds, emit)
        one = None
        _release(bench.device)


def _build(name: str, build: Callable[[], Ready], emit: Callable[..., None]) -> Ready | None:
    try:
        return build()
    except peers.MissingError as error:
        emit(name, "missing", reason=str(error))
    except DeclinedError as error:
        emit(name, "declined", reason=str(error))
    except WrongResultError as error:
        emit(name, "wrong", reason=str(error))
    except FAILURES as error:
        emit(name, "failed", reason=_said(error))
    return None


def _take_turns(
    bench: Bench,
    case: Case,
    opened: Opened,
    ready: Mapping[str, Ready],
    clocks: Iterable[timing.Clock],
    seconds: float,
    emit: Callable[..., None],
) -> None:
    ceilings = bench.ceilings(case.dtype)
    for clock in clocks:
        found = timing.take_turns(
            {name: r.run for name, r in ready.items()},
            clock,
            seconds=seconds,
            turns=bench.turns,
            least=0.0 if bench.quick else 0.005,
            tolerate=FAILURES,
        )
        base = next((name for name, t in found.items() if isinstance(t, timing.Timing)), None)
        for name, timed in found.items():
            if isinstance(timed, Exception):
                emit(name, "failed", clock=clock.name, reason=_said(timed))
                continue
            facts = dict(ready[name].facts)
            if name != base:
                ratio = timed.over(found[base])
                facts["over"] = {"variant": base, **ratio._asdict()}
            if bench.profile:
                facts["kernels"] = _profile(ready[name].run, bench.device)
            own = ready[name]
            moved = opened.moved if own.moved is None else own.moved
            flops = opened.flops if own.flops is None else own.flops
            emit(
                name,
                "measured",
                clock=clock.name,
                **timed.seconds._asdict(),
                cpu_seconds=timed.cpu_seconds.median,
                runs=len(timed.samples),
                calls=timed.calls,
                error=own.error,
                bytes=moved,
                flops=flops,
                share=ceilings.floor(moved, flops) / timed.seconds.median,
                tokens=opened.tokens,
                ceilings=dataclasses.asdict(ceilings),
                **_condition(bench.device),
                **facts,
            )


def _profile(run: timing.Run, device: torch.device) -> dict[str, float]:
    found = timing.by_kernel(run, device)
    return {name[:120]: seconds for name, seconds in list(found.items())[:12]}


def _peak_memory(one: Ready, device: torch.device) -> dict[str, int]:
    """Most memory that tensors take during one call, everything of the variant included."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(*FAILURES):  # the measurement will say so
        one.run()
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _condition(device: torch.device) -> dict[str, float]:
    """How the machine is just now: processes that want a processor (a minute's mean), and the GPU's clock.

    A GPU that is hot or at its power limit lowers its clock: megahertz now and at most, watts, Celsius.
    """
    found = {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    if device.type == "cuda":
        card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        asked = "--query-gpu=clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            said = subprocess.check_output(
                ["nvidia-smi", card, asked, "--format=csv,noheader,nounits"], text=True, timeout=10
            )
            numbers = [float(word) for word in said.split(",")]
            found |= zip(("sm_mhz", "sm_mhz_max", "watts", "celsius"), numbers, strict=True)
    return found


def _said(error: Exception) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:300]}"


# ---------------------------------------------------------------------------------------------------------
# Files


def folder(bench: Bench, root: Path = RESULTS) -> Path:
    """Where a run's lines go: `DATE-DEVICE`."""
    date = bench.environment["date"][:10]
    return root / f"{date}-{'quick-' if bench.quick else ''}{bench.device.type}"


def writer(path: Path) -> Callable[[dict[str, Any]], None]:
    """A function that adds lines to a file at once, so that an interrupted run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(line: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(line)) + "\n")

    return write


def _rounded(value: Any) -> Any:
    """The same with numbers of five digits, which is more than they are worth."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value
