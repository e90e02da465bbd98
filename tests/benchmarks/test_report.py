"""The page that is made of recorded lines says what they say."""

from __future__ import annotations

import json

import pytest

from benchmarks import plots, report
from benchmarks.lines import newest

ENVIRONMENT = {
    "date": "2026-01-02T10:00:00+00:00",
    "commit": "0123456789abcdef",
    "quick": False,
    "device": "cpu",
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "versions": {
        "mambakit": "0.1.0",
        "python": "3.11",
        "torch": "2.13",
        "mambapy": None,
        "transformers": "5.1",
    },
}
LIMITS = {"copy": 2e10, "matmul": 1.5e11}


def measured(suite, name, variant, median, **facts):
    return {
        "suite": suite,
        "name": name,
        "variant": variant,
        "status": "measured",
        "dtype": "float32",
        "at": {},
        "clock": "host",
        "lower": 0.9 * median,
        "median": median,
        "upper": 1.2 * median,
        "cpu_seconds": 1.7 * median,
        "runs": 5,
        "calls": 1,
        "error": 3e-7,
        "bytes": 5e6,
        "flops": 1e6,
        "share": 0.125,
        "tokens": 1000,
        "ceilings": LIMITS,
        "load": 0.5,
        **ENVIRONMENT,
        **facts,
    }


def written(folder, lines):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.render(folder).read_text()


def test_a_table_has_medians_ratios_and_what_is_missing(tmp_path):
    missing = {
        **measured("operators", "scan", "mambapy", 1.0),
        "status": "missing",
        "reason": "not installed",
    }
    page = written(
        tmp_path,
        [
            measured("operators", "scan", "mambakit cpu", 0.002),
            # Measured while something else slowed the machine down: the better limits count for all.
            measured(
                "operators",
                "scan",
                "transformers",
                0.11,
                ceilings={"copy": 1e10, "matmul": 1e11},
                over={"variant": "mambakit cpu", "lower": 50.0, "median": 55.0, "upper": 61.5},
            ),
            missing,
        ],
    )
    assert "# Benchmarks of 2026-01-02 on a processor" in page
    assert "a processor, 2 cores, 2 threads" in page
    assert "0123456789ab" in page
    assert "copies 20 GB/s, multiplies 0.15 TFLOP/s" in page
    assert "| scan | mambakit cpu | 2 ms (1.8 ms to 2.4 ms) | 3.4 ms | 500 k | 1 | 12% | 3e-07 |" in page
    ratios = "187 ms (55.00x) | 9.09 k | 55.00 (50.00 to 61.50) | 0.2% |"
    assert f"| transformers | 110 ms (99 ms to 132 ms) | {ratios}" in page
    assert "| mambapy | not installed: not compared with |" in page
    assert "| missing | mambapy | not installed | scan |" in page
    assert "other programs" not in page


def test_the_newest_run_of_the_same_work_counts(tmp_path):
    old = measured("operators", "scan", "mambakit cpu", 0.5)
    new = {**measured("operators", "scan", "mambakit cpu", 0.25), "date": "2026-01-03T00:00:00+00:00"}
    failed = {**old, "status": "failed", "reason": "no memory", "variant": "other"}
    mended = {**new, "variant": "other", "median": 0.125}
    page = written(tmp_path, [new, old, failed, mended])
    assert "500 ms" not in page
    assert "250 ms" in page
    assert "no memory" not in page
    assert "125 ms" in page


def test_a_graph_is_shown_before_launches(tmp_path):
    gpu = {"gpu": "a card", "device": "cuda"}
    lines = [
        measured("operators", "scan", "mambakit cuda", 0.003, clock="events", **gpu),
        measured("operators", "scan", "mambakit cuda", 0.001, clock="graph", **gpu),
    ]
    page = written(tmp_path, lines)
    assert "| scan | mambakit cuda | 1 ms (900 us to 1.2 ms) | 3 ms |" in page
    assert "with launches" in page
    assert "# Benchmarks of 2026-01-02 on a card" in page


def test_a_busy_machine_and_toy_sizes_are_said(tmp_path):
    page = written(tmp_path, [measured("operators", "scan", "mambakit", 1.0, load=9.0, quick=True)])
    assert "other programs wanted the same cores" in page
    assert "Toy sizes" in page


@pytest.fixture
def scaling():
    """A linear scan and quadratic attention that meet at 6,000 tokens."""
    lines = []
    for k in range(10, 16):
        n = 2**k
        for variant, seconds in (("ssd chunked", 6e-3 * n), ("attention chunked", 1e-6 * n * n)):
            at = {"length": n, "backward": False, "width": 64}
            name = f"forward length {n}"
            lines.append(measured("scaling", name, f"mambakit {variant}", seconds, at=at))
        for kind, state in (("mamba2", 4096), ("attention", 512 * n)):
            name = f"decode after {n}"
            at = {"context": n, "width": 128, "layers": 2}
            lines.append(measured("scaling", name, f"mambakit {kind}", 1e-3, at=at, state_bytes=state))
    return lines


def test_scaling_has_slopes_the_crossover_and_memory(tmp_path, scaling):
    page = written(tmp_path, scaling)
    assert "one layer of 64 channels" in page
    assert "Models of 2 layers of 128 channels" in page
    assert "| ssd chunked | 1.00 | 1.00 | 1.00 |" in page
    assert "| attention | 2.00 | 2.00 | 2.00 |" in page
    assert "- ssd chunked: faster than attention from about 6,000 tokens on, slower below" in page
    assert "| 4,096 | 24.6 s | 16.8 s |" in page
    assert "| 32,768 | 4 KiB | 16 MiB |" in page
    for name in ("time-length", "decoding"):
        assert f"]({name}.png)" in page
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_ring_lies_on_attentions_curve():
    points = {1024: 1.0, 2048: 4.0}
    assert plots._between(points, 1024) == 1.0
    assert plots._between(points, 2048) == 4.0
    assert plots._between(points, 1024 * 2**0.5) == pytest.approx(2.0)


def test_throughput_is_drawn_where_batches_differ(tmp_path):
    def line(batch, median):
        at = {"kind": "mamba2", "size": "130m", "b": batch, "l": 1, "verb": "write"}
        name = f"decode mamba2 130m b{batch} float32"
        return measured("models", name, "mambakit", median, at=at, tokens=batch)

    assert "throughput.png" not in written(tmp_path / "one", [line(1, 0.01)])
    page = written(tmp_path / "two", [line(1, 0.01), line(8, 0.02)])
    assert "](throughput.png)" in page
    assert "| decode mamba2 130m b8 float32 | mambakit | 20 ms (18 ms to 24 ms) | 34 ms | 400 | 1 |" in page


def test_no_results_are_said(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        newest(tmp_path)
    for name in ("2026-01-02-cpu", "2026-01-10-cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("{}\n")
    assert newest(tmp_path).name == "2026-01-10-cpu"
