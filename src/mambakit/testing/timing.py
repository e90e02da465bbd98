"""Measuring: variants of the same work take turns, beside what the machine itself can do.

A time alone says little: other programs use the machine, clocks change with its temperature, the first call
compiles. So variants are called in turns (A B A B ...) in one process after a warm-up, medians and quartiles
are taken over the turns, and two variants are compared turn by turn, which cancels what disturbs both. Beside
them `Ceilings` measures how fast this machine copies memory and multiplies matrices now; the time that the
work would take at those rates is its floor, and floor / time is its share of the roofline (Williams et al.,
"Roofline", 2009).

Three clocks: the host's for CPUs (wall time, and the processor time of all threads, which neighbours disturb
less); CUDA events around calls as a program makes them, launches included; and a replayed CUDA graph, the
kernels' own time, from memory and not from the level-2 cache, which is filled with other data before each
call as in Triton's `do_bench`. What a process holds in a CPU's caches from call to call is left there.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Run = Callable[[], Any]
"""One call of the work to be measured."""

MOST_CALLS = 10_000
"""Of a short variant within one turn."""
FLUSH = 2**28
"""Bytes written before a call that is to find nothing in the level-2 cache, more than any GPU's holds."""


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of some values; of a single one three times that.

        Raises:
            ValueError: There are no values.
        """
        if not values:
            raise ValueError("quartiles of no values, expected at least one")
        cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
        return cls(*cuts)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One turn of one variant.

    Attributes:
        seconds: Time of one call.
        cpu_seconds: Processor time of one call, over all threads of the process.
    """

    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of one variant.

    Attributes:
        samples: Turn number -> its sample. A slow variant misses the later turns.
        calls: Calls within each turn.
    """

    samples: Mapping[int, Sample]
    calls: int

    @property
    def seconds(self) -> Spread:
        """Time of one call."""
        return Spread.of([sample.seconds for sample in self.samples.values()])

    @property
    def cpu_seconds(self) -> Spread:
        """Processor time of one call, over all threads."""
        return Spread.of([sample.cpu_seconds for sample in self.samples.values()])

    def over(self, other: Timing) -> Spread:
        """How many times as long as `other`, turn by turn over the turns that both took."""
        shared = self.samples.keys() & other.samples.keys()
        return Spread.of([self.samples[t].seconds / other.samples[t].seconds for t in sorted(shared)])


# ---------------------------------------------------------------------------------------------------------
# Clocks


class Clock(Protocol):
    """Measures calls of some work on one device."""

    name: str

    def ready(self, run: Run, calls: int) -> Callable[[], Sample]:
        """Prepare `calls` calls; each call of what is returned makes them and gives the time of one."""


class HostClock:
    """Wall and processor time, for work that is done when the call returns."""

    name = "host"

    def ready(self, run: Run, calls: int) -> Callable[[], Sample]:
        """See `Clock.ready`."""

        def sample() -> Sample:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                run()
            return Sample((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)

        return sample


class EventClock:
    """Time between two CUDA events around all calls, launches included."""

    name = "events"

    def ready(self, run: Run, calls: int) -> Callable[[], Sample]:
        """See `Clock.ready`."""

        def several() -> None:
            for _ in range(calls):
                run()

        def sample() -> Sample:
            torch.cuda.synchronize()
            cpu = time.process_time()
            start, end = _around(several)
            torch.cuda.synchronize()
            return Sample(start.elapsed_time(end) / 1e3 / calls, (time.process_time() - cpu) / calls)

        return sample


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Work that replays a CUDA graph of its own, and so cannot be recorded in another."""

    run: Run

    def __call__(self) -> Any:
        """Do it."""
        return self.run()


class GraphClock:
    """Time of the kernels alone, out of a cold cache: each call is a CUDA graph between two events.

    Writing `FLUSH` bytes before takes the GPU longer than the host needs for the launch, so that the GPU
    never waits for it.
    """

    name = "graph"

    def ready(self, run: Run, calls: int) -> Callable[[], Sample]:
        """See `Clock.ready`; what `run` makes is kept for the life of what is returned."""
        replay = run if isinstance(run, Recorded) else _record(run).replay
        flushed = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

        def sample() -> Sample:
            torch.cuda.synchronize()
            cpu, pairs = time.process_time(), []
            for _ in range(calls):
                flushed.zero_()
                pairs.append(_around(replay))
            torch.cuda.synchronize()
            seconds = sum(start.elapsed_time(end) for start, end in pairs) / 1e3
            return Sample(seconds / calls, (time.process_time() - cpu) / calls)

        return sample


def _record(run: Run) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make what they keep before the recording
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a recording has memory of its own, which cannot use what was kept before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def _around(work: Callable[[], None]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    return start, end


def clocks(device: torch.device) -> tuple[Clock, ...]:
    """The clocks of a kind of device, the one that shows the device's own time first."""
    return (GraphClock(), EventClock()) if device.type == "cuda" else (HostClock(),)


# ---------------------------------------------------------------------------------------------------------
# Turns


def take_turns(
    variants: Mapping[str, Run],
    clock: Clock,
    *,
    seconds: float = 1.0,
    turns: int = 25,
    least: float = 0.005,
    tolerate: tuple[type[Exception], ...] = (),
) -> dict[str, Timing | Exception]:
    """Measure variants of the same work in turns: A B A B ...

    Every variant is called once to warm up, and then takes at least one turn.

    Args:
        variants: Name -> work.
        clock: Of the device that does it.
        seconds: A variant takes no further turn that would make its turns together longer than this.
        turns: Most turns of each.
        least: A turn is made this long, in seconds, by calling short work several times.
        tolerate: Errors that drop a variant instead of ending the measurement.

    Returns:
        Name -> what was measured, or the error that dropped it.

    Raises:
        Exception: What a variant raises and `tolerate` does not name.
    """
    found: dict[str, Timing | Exception] = {}
    ready: dict[str, Callable[[], Sample]] = {}
    calls: dict[str, int] = {}
    samples: dict[str, dict[int, Sample]] = {}
    for name, run in variants.items():
        try:
            calls[name] = _calls(run, clock, seconds, least)
            ready[name] = clock.ready(run, calls[name])
        except tolerate as error:
            found[name] = error.with_traceback(None)  # whose frames would keep their tensors
        samples[name] = {}
    for turn in range(turns):
        for name in list(ready):
            taken = [calls[name] * sample.seconds for sample in samples[name].values()]
            if taken and sum(taken) + taken[-1] > seconds:
                continue
            try:
                samples[name][turn] = ready[name]()
            except tolerate as error:
                found[name] = error.with_traceback(None)
                del ready[name]
    found |= {name: Timing(samples[name], calls[name]) for name in ready}
    return {name: found[name] for name in variants}


def _calls(run: Run, clock: Clock, seconds: float, least: float) -> int:
    """Warm up, and find how many calls fill a turn."""
    once = (EventClock() if isinstance(clock, GraphClock) else clock).ready(run, 1)
    if once().seconds >= seconds:  # too slow to be called once more than needed
        return 1
    return min(max(1, math.ceil(least / max(once().seconds, 1e-9))), MOST_CALLS)


# ---------------------------------------------------------------------------------------------------------
# The machine's own limits


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine can do.

    Attributes:
        copy: Bytes per second of copying a large tensor, read and written ones both counted.
        matmul: Floating-point operations per second of a large matrix product, a multiply-add as two.
    """

    copy: float
    matmul: float

    @classmethod
    def measure(
        cls, device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5, scale: float = 1.0
    ) -> Ceilings:
        """Measure them now.

        The fastest turn counts, not the median: a limit is what the machine reaches undisturbed. Data that
        stays in a cache is copied faster than this limit.

        Args:
            device: Where.
            dtype: Of the matrices.
            seconds: How long for each of the two.
            scale: Shrinks the tensors (tests).

        Returns:
            The limits.
        """
        on_gpu = device.type == "cuda"
        length, side = (2**30, 8192) if on_gpu else (2**28, 2048)
        length, side = int(length * scale), max(16, int(side * scale))
        source = torch.ones(length, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        product = torch.empty_like(matrix)
        work = {
            "copy": lambda: target.copy_(source),
            "matmul": lambda: torch.mm(matrix, matrix, out=product),
        }
        clock = EventClock() if on_gpu else HostClock()
        with torch.no_grad():
            found = take_turns(work, clock, seconds=seconds)
        best = {name: min(s.seconds for s in timing.samples.values()) for name, timing in found.items()}
        return cls(2 * length / best["copy"], 2 * side**3 / best["matmul"])

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher one of each of two measurements."""
        return Ceilings(max(self.copy, other.copy), max(self.matmul, other.matmul))

    def floor(self, moved: float, flops: float) -> float:
        """Least seconds for work that moves so many bytes and does so many operations.

        Args:
            moved: Bytes that have to be read or written at least once.
            flops: Floating-point operations.

        Returns:
            The longer of the two times, as if they overlapped perfectly.
        """
        return max(moved / self.copy, flops / self.matmul)


def by_kernel(run: Run, device: torch.device, calls: int = 3) -> dict[str, float]:
    """Time of one call by kernel, longest first, in seconds, by PyTorch's profiler.

    Args:
        run: The work.
        device: Where it is done; on a CPU the times are those of PyTorch's operators.
        calls: Calls to average over.

    Returns:
        Name of the kernel -> seconds.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = {event.key: getattr(event, time_of) / 1e6 / calls for event in profiler.key_averages()}
    return dict(sorted(((k, v) for k, v in found.items() if v > 0), key=lambda item: -item[1]))


# ---------------------------------------------------------------------------------------------------------
# Curves


def slope(lengths: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log time against log length: 1 is linear, 2 quadratic.

    Raises:
        ValueError: Fewer than two points.
    """
    if len(lengths) < 2:
        raise ValueError(f"the slope of {len(lengths)} points, expected at least 2")
    return statistics.linear_regression([math.log(x) for x in lengths], [math.log(y) for y in seconds]).slope


def crossover(lengths: Sequence[float], seconds: Sequence[float], others: Sequence[float]) -> float | None:
    """The length from which one curve stays below another.

    Args:
        lengths: Where both were measured, ascending.
        seconds: Of the one that is to become faster.
        others: Of the one to beat.

    Returns:
        The length, interpolated in logarithms; the first one measured if it is faster throughout; `None` if
        it is not faster at the last.
    """
    gaps = [math.log(a / b) for a, b in zip(seconds, others, strict=True)]  # negative: faster
    if not gaps or gaps[-1] >= 0:
        return None
    last_slower = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last_slower is None:
        return float(lengths[0])
    left, right = math.log(lengths[last_slower]), math.log(lengths[last_slower + 1])
    part = gaps[last_slower] / (gaps[last_slower] - gaps[last_slower + 1])
    return math.exp(left + part * (right - left))


def crossover_in_words(lengths: Sequence[float], seconds: Sequence[float], others: Sequence[float]) -> str:
    """`crossover` as the end of a sentence that begins with what is to become faster than attention."""
    length = crossover(lengths, seconds, others)
    if length is None:
        return f"slower than attention at {lengths[-1]:,} tokens, the longest measured"
    if length == lengths[0]:
        return f"faster than attention at every length measured, {lengths[0]:,} to {lengths[-1]:,} tokens"
    return f"faster than attention from about {length:,.0f} tokens on, slower below"
