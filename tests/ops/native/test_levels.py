"""The conformance suite and the decode engine on every instruction level, and on libraries with sanitizers.

They run on the level that this processor prefers. Here they run again, in processes of their own, on the
other levels; and under the address and undefined-behaviour sanitizers, which see a kernel reach
one number beyond a tensor, an index that overflows, or a misaligned access.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambakit.ops import native
from mambakit.ops.native import build

TESTS = Path(__file__).parents[2]
SUITE = TESTS / "ops" / "test_conformance.py"
ENGINE = TESTS / "generation" / "engine"
SANITIZE = [
    *("-DMAMBAKIT_CHECKED", "-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]


def run_tests(tests: Path, select: str, **environment: str) -> None:
    """Run tests in a process with this environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        [*command, "-k", select],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def conformance(select: str, **environment: str) -> None:
    """Run the suite's cases of the C++ kernels in a process with this environment."""
    run_tests(SUITE, f"cpu-cpu and ({select})", **environment)


def runnable_levels() -> list[str]:
    """Levels that this processor runs."""
    found = native.load()
    if found.library is None:
        return []
    names = list(build.levels())
    return names[: names.index(native.best_level()) + 1]


@pytest.mark.parametrize("level", build.levels())
def test_conformance_on_a_level(level):
    if level not in runnable_levels():
        pytest.skip(native.load().reason or f"this processor does not run {level}")
    if level == native.load().level:
        pytest.skip("the level that the whole suite runs on")
    conformance("not traces", MAMBAKIT_NATIVE=level)
    run_tests(ENGINE, "test_step or test_weights", MAMBAKIT_NATIVE=level)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are preloaded as on Linux")
def test_conformance_under_sanitizers(tmp_path):
    """On the baseline, where the ends of rows are ordinary memory accesses that the sanitizer sees."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    runtime = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler[0]} has no address sanitizer as a shared library")
    built = build.build(tmp_path, only=["baseline"], flags=SANITIZE)
    environment = {
        "MAMBAKIT_NATIVE": str(built.libraries["baseline"]),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    conformance("values or token_by_token or layout", **environment)
    run_tests(ENGINE, "test_weights or forward or neighbours", **environment)
