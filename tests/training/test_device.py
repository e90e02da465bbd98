"""Where a run computes: the types it multiplies in, and the memory it keeps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambakit.training import device, run

COUNT_FAULTS = """
import resource, torch
from mambakit.training import device

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before, kept = faults(), device.keep_freed_memory()
faults()
print(int(kept), before, faults())
"""


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True, "amx_bf16": False}, False),
    ],
)
def test_bf16_is_for_processors_that_have_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.multiplies_bf16(torch.device("cpu")) is expected
    with device.autocast(torch.device("cpu"), "auto"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "float32")])
def test_auto_is_the_precision_it_chooses(
    tiny: Callable, tmp_path: Path, outcome: Callable, same: Callable, monkeypatch, fast, precision
):
    monkeypatch.setattr(device, "multiplies_bf16", lambda where: fast)
    run(tiny(out=str(tmp_path / "plain"), train={"steps": 3, "precision": precision}))
    run(tiny(train={"steps": 3, "precision": "auto"}))
    same(outcome(tmp_path / "plain"), outcome(tmp_path / "run"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_is_kept():
    """Twenty arrays of 20 MB, one after another: 5,000 pages each, or the same pages again."""
    found = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    kept, before, after = map(int, found.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert after < 100 < before
