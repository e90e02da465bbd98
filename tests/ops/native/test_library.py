"""Which library is loaded, whose threads it uses, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from mambakit import ops
from mambakit.ops import native
from mambakit.ops.dispatch import registry
from mambakit.ops.native import build
from mambakit.testing.samples import CASES, Draw

needs_library = pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))
KERNEL_CASES = [case for case in CASES if "cpu" in registry[case.op].kernels]


def run_python(code, **environment):
    """Standard output of code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_library_is_there_wherever_a_compiler_is():
    """Fails in a checkout whose kernels are not built or stale; the reason says which command builds them."""
    if build.find_compiler() is None:
        assert "no C++ compiler was found" in native.load().reason
    elif os.environ.get(native.ENVIRONMENT) != "off":
        assert native.load().reason is None


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_no_second_openmp_runtime_is_mapped():
    """Before and after a kernel ran on two threads, one runtime is in the process, and its threads."""
    output = run_python(
        """
        import torch
        from pathlib import Path

        def runtimes():
            files = {Path(line.split()[-1]) for line in open("/proc/self/maps") if "omp" in line}
            return sorted(file for file in files if file.name.startswith(("libgomp", "libomp", "libiomp")))

        before = runtimes()
        import mambakit
        from mambakit import ops
        from mambakit.ops import native

        torch.set_num_threads(2)
        threads = lambda: len(list(Path("/proc/self/task").iterdir()))
        torch.randn(1000, 1000).exp_()
        started = threads()
        ops.causal_conv1d(torch.randn(4, 256, 256), torch.randn(256, 4), backend="cpu")
        assert native.load().parallel, native.load().openmp
        assert threads() == started, "the kernel started threads of its own"
        assert runtimes() == before, (before, runtimes())
        print(len(before))
        """,
        OMP_NUM_THREADS="2",
    )
    assert output.strip() == "1"


@needs_library
def test_importing_loads_no_library():
    output = run_python(
        """
        import mambakit
        from mambakit.ops import native

        print(native.load.cache_info().currsize)
        """
    )
    assert output.strip() == "0"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("off", "MAMBAKIT_NATIVE=off"),
        ("avx521", "unknown level 'avx521'; did you mean 'avx512'?"),
        ("/nowhere/lib.so", "the library cannot be loaded: /nowhere/lib.so"),
    ],
)
def test_environment_variable_that_leads_to_no_library(monkeypatch, asked, message):
    monkeypatch.setenv(native.ENVIRONMENT, asked)
    assert message in native.load.__wrapped__().reason


def test_a_library_of_other_sources_is_refused(monkeypatch):
    if native.load().library is None:
        pytest.skip(native.load().reason)
    monkeypatch.setattr(build, "digest", lambda: "another")
    assert "built from other sources" in native.load.__wrapped__().reason


def test_without_libraries_the_way_to_get_them_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv(native.ENVIRONMENT, raising=False)
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert "apt install g++" in native.load.__wrapped__().reason
    monkeypatch.setattr(build, "find_compiler", lambda: ["/usr/bin/c++"])
    assert f"/usr/bin/c++ can do it now: {native.REBUILD}" in native.load.__wrapped__().reason


def test_a_compiler_that_fails_is_an_error_that_shows_its_message(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX='no-such-compiler' was not found"):
        build.build(tmp_path)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match="broken"):
        build.build(tmp_path)


@needs_library
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case):
    """Outputs and gradients, bit for bit."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            inputs = case.build(Draw(torch.float32))
            outputs = getattr(ops, case.op)(**inputs, backend="cpu")
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            gradients = torch.autograd.grad(sum((o * o).sum() for o in outputs), wanted, allow_unused=True)
            results.append([*outputs, *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


@needs_library
def test_other_types_and_transforms_go_to_plain_backends():
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    table = ops.explain("causal_conv1d", x.double(), weight)
    assert "cannot: it takes float32 and bfloat16, not float64" in table
    per_row = torch.vmap(lambda row: ops.causal_conv1d(row[None], weight)[0][0])(x)
    torch.testing.assert_close(per_row, ops.causal_conv1d(x, weight)[0])
