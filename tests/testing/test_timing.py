"""Turns, ratios, limits and curves, held to arithmetic by clocks that tell what they are told to."""

from __future__ import annotations

import math
import time

import pytest
import torch

from mambakit.testing import timing
from mambakit.testing.timing import Ceilings, HostClock, Sample, Spread, Timing, take_turns

CPU = torch.device("cpu")


class FakeClock:
    """Every call takes as long as the variant returns, and is written down."""

    name = "fake"

    def __init__(self):
        self.log = []

    def ready(self, run, calls):
        def sample():
            seconds = [run() for _ in range(calls)]
            self.log.append((run.__name__, calls))
            return Sample(sum(seconds) / calls, 0.0)

        return sample


def takes(name, seconds):
    def run():
        return seconds

    run.__name__ = name
    return run


def turns_of(clock, *names):
    """The variants in the order of their turns, their two calls of warming up left out."""
    order = [name for name, _ in clock.log]
    for name in names:
        for _ in range(2):
            order.remove(name)
    return order


def test_variants_take_turns():
    clock = FakeClock()
    found = take_turns({n: takes(n, 0.25) for n in "abc"}, clock, seconds=1.0, turns=3)
    assert turns_of(clock, *"abc") == list("abcabcabc")
    assert all(sorted(timed.samples) == [0, 1, 2] for timed in found.values())


def test_a_turn_is_filled_with_calls_of_short_work():
    clock = FakeClock()
    found = take_turns({"a": takes("a", 0.001), "b": takes("b", 1.0)}, clock, seconds=9.0, least=0.0125)
    assert {name: timed.calls for name, timed in found.items()} == {"a": 13, "b": 1}
    assert found["a"].seconds.median == pytest.approx(0.001)


def test_slow_work_misses_later_turns_and_is_called_twice_at_least():
    clock = FakeClock()
    found = take_turns({"slow": takes("slow", 3.0), "b": takes("b", 0.4)}, clock, seconds=1.0, turns=9)
    assert [name for name, _ in clock.log].count("slow") == 2
    assert sorted(found["slow"].samples) == [0]
    assert sorted(found["b"].samples) == [0, 1]


def test_an_error_that_is_tolerated_drops_its_variant_only():
    def broken():
        raise RuntimeError("no kernel")

    def later():
        later.calls += 1
        if later.calls > 4:
            raise RuntimeError("no memory")
        return 0.2

    later.calls = 0
    variants = {"broken": broken, "later": later, "a": takes("a", 0.2)}
    found = take_turns(variants, FakeClock(), turns=4, tolerate=(RuntimeError,))
    assert list(found) == ["broken", "later", "a"]
    assert str(found["broken"]) == "no kernel"
    assert str(found["later"]) == "no memory"
    assert sorted(found["a"].samples) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="no kernel"):
        take_turns(variants, FakeClock(), tolerate=(ValueError,))


def test_the_hosts_clock_tells_waiting_from_working():
    def work():
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    found = take_turns({"wait": lambda: time.sleep(0.02), "work": work}, HostClock(), turns=3, seconds=5.0)
    assert found["wait"].seconds.lower >= 0.02
    assert found["wait"].cpu_seconds.median < 0.01
    assert 0.0099 < found["work"].cpu_seconds.median < 0.015


def test_a_ratio_is_taken_within_a_turn():
    """What slows all variants down in some turns does not show in it."""
    disturbed = [1.0, 1.0, 7.0, 1.0, 30.0]
    a = Timing({t: Sample(0.5 * d, 0.0) for t, d in enumerate(disturbed)}, 1)
    b = Timing({t: Sample(1.5 * d, 0.0) for t, d in enumerate(disturbed) if t != 1}, 1)
    assert b.over(a) == pytest.approx((3.0, 3.0, 3.0))
    assert b.seconds.median == pytest.approx(6.0)  # of 1.5, 1.5, 10.5, 45
    assert a.seconds.median == 0.5


def test_quartiles():
    assert Spread.of([4.0]) == (4.0, 4.0, 4.0)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_the_floor_is_the_longer_of_memory_and_arithmetic():
    limits = Ceilings(copy=10.0, matmul=100.0)
    assert limits.floor(moved=20.0, flops=50.0) == 2.0
    assert limits.floor(moved=1.0, flops=1000.0) == 10.0
    assert limits.or_better(Ceilings(copy=20.0, matmul=50.0)) == Ceilings(copy=20.0, matmul=100.0)


def test_limits_are_the_fastest_turns_of_a_copy_and_a_product(monkeypatch):
    def recorded(variants, clock, *, seconds):
        for run in variants.values():
            run()
        samples = {"copy": [0.5, 0.25, 4.0], "matmul": [0.125, 1.0]}
        return {k: Timing({i: Sample(s, s) for i, s in enumerate(v)}, 1) for k, v in samples.items()}

    monkeypatch.setattr(timing, "take_turns", recorded)
    limits = Ceilings.measure(CPU, torch.float32, scale=2**-6)
    assert limits.copy == 2 * 2**22 / 0.25  # as many bytes written as read
    assert limits.matmul == 2 * 32**3 / 0.125


def test_time_by_kernel_names_the_product():
    a = torch.randn(128, 128)
    found = timing.by_kernel(lambda: a @ a, CPU)
    assert next(iter(found)) == "aten::mm"
    assert all(seconds > 0 for seconds in found.values())


def test_the_slope_is_the_exponent():
    lengths = [2**k for k in range(4, 12)]
    for power in (0, 1, 2):
        assert timing.slope(lengths, [3e-6 * n**power for n in lengths]) == pytest.approx(power)
    with pytest.raises(ValueError, match="1 points"):
        timing.slope([1], [1.0])


def test_the_crossover_is_where_two_power_laws_meet():
    lengths = [256, 512, 1024, 2048]
    linear, quadratic = [700.0 * n for n in lengths], [float(n) ** 2 for n in lengths]
    assert timing.crossover(lengths, linear, quadratic) == pytest.approx(700)
    assert timing.crossover(lengths, quadratic, linear) is None
    assert timing.crossover(lengths, [1.0] * 4, quadratic) == 256
    assert "from about 700 tokens on, slower below" in timing.crossover_in_words(lengths, linear, quadratic)
    assert "slower than attention at 2,048 tokens" in timing.crossover_in_words(lengths, quadratic, linear)


def test_the_last_crossing_counts():
    """Faster, slower, faster again: only from the last crossing on is it faster throughout."""
    lengths, ones = [1, 2, 4, 8], [1.0] * 4
    length = timing.crossover(lengths, [0.5, 2.0, 2.0, 0.5], ones)
    assert length == pytest.approx(4 * math.sqrt(2))


@pytest.mark.gpu
def test_a_graph_hides_launches():
    x = torch.zeros(64, device="cuda")

    def adds():
        for _ in range(50):
            x.add_(1)

    graph, events = timing.clocks(torch.device("cuda"))
    found = take_turns({"adds": adds, "recorded": timing.Recorded(timing._record(adds).replay)}, graph)
    launched = take_turns({"adds": adds}, events)["adds"].seconds.median
    assert 0 < found["adds"].seconds.median < launched / 1.5
    assert found["recorded"].over(found["adds"]).median == pytest.approx(1, rel=0.2)


@pytest.mark.gpu
def test_a_graph_is_timed_without_what_clears_the_cache():
    """Copying 1 GiB, which no cache holds, takes both clocks equally long."""
    x = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    found = [take_turns({"copy": lambda: y.copy_(x)}, c)["copy"] for c in timing.clocks(x.device)]
    assert found[0].seconds.median == pytest.approx(found[1].seconds.median, rel=0.1)
