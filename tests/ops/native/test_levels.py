"""The conformance suite on every instruction level, and on libraries built with sanitizers.

The suite itself runs on the level that this processor prefers. Here it runs again, in processes of their own,
on the other levels; and under the address and undefined-behaviour sanitizers, which see a kernel reach
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

SUITE = Path(__file__).parents[1] / "test_conformance.py"
SANITIZE = [
    *("-DMAMBAKIT_CHECKED", "-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]


def conformance(select: str, **environment: str) -> None:
    """Run the suite's cases of the C++ kernels in a process with this environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(SUITE)]
    done = subprocess.run(
        [*command, "-k", f"cpu-cpu and ({select})"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=SUITE.parents[2],
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


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


@pytest.mark.timeout(300)
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
    conformance(
        "values or token_by_token or layout",
        MAMBAKIT_NATIVE=str(built.libraries["baseline"]),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
