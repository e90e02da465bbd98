"""CUDA kernels without a GPU: the same text, compiled by a C++ compiler for a CPU.

`emulate.h` gives the primitives of `ops/cuda.cuh` in C++: the threads of a block are fibres that take turns
and meet at barriers and lane exchanges; shared memory starts as NaN; copies check their alignment. It
computes what the kernel computes at a thousandth of the speed, so that a kernel can be written, tested and
read with a debugger anywhere. Triton kernels have Triton's own interpreter for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mambakit.ops import cuda, triton_utils

_HEADER = Path(__file__).with_name("emulate.h")
PROCESSORS = 3
"""Multiprocessors of the emulated GPU: few, so that small inputs fill it."""
BLOCK_MEMORY = 99 << 10
"""Bytes of shared memory that a block may have there: the least that a GPU with what the kernels use has."""
NO_INTERPRETER = "" if importlib.util.find_spec(triton_utils.TRITON) else "Triton is not installed"
"""Why Triton's kernels cannot be interpreted on this machine, or nothing."""


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    """Let GPU kernels take tensors in main memory inside a `with` block.

    Triton's need `TRITON_INTERPRET=1` in the environment before the first of them is imported.

    Yields:
        Nothing.
    """
    kept = cuda.make, cuda.processors, cuda.block_memory, cuda.runs_on, triton_utils.runs_on

    def choose(emulated: Callable, real: Callable) -> Callable:
        return lambda *args: (emulated if args[-1].type == "cpu" else real)(*args)

    cuda.make = choose(_make, cuda.make)
    cuda.processors = choose(lambda device: PROCESSORS, cuda.processors)
    cuda.block_memory = choose(lambda device: BLOCK_MEMORY, cuda.block_memory)
    cuda.runs_on = choose(lambda device: None, cuda.runs_on)
    triton_utils.runs_on = choose(_interpreted, triton_utils.runs_on)
    try:
        yield
    finally:
        cuda.make, cuda.processors, cuda.block_memory, cuda.runs_on, triton_utils.runs_on = kept


def _interpreted(device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter is not switched on"
    return NO_INTERPRETER or None


def _make(text: str, name: str, words: list[str], device: torch.device) -> Callable[..., None]:
    """What `cuda.make` does: a callable that runs a kernel."""
    text = f'#include "{_HEADER}"\n{text.replace("#pragma once", "")}'
    definitions = [word for word in words if word.startswith("-D")]
    key = hashlib.sha256("\0".join([text, _HEADER.read_text(), *definitions]).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"mambakit-emulation-{os.getuid()}"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            file, built = Path(work) / "kernel.cpp", Path(work) / "kernel.so"
            file.write_text(text)
            compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", *definitions]
            subprocess.run([compiler, *options, str(file), "-o", str(built)], check=True)
            os.replace(built, library)
    run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_int]

    def start(
        params: ctypes.Structure, blocks: int, threads: int, shared: int, overlap: bool = False
    ) -> None:
        run(ctypes.addressof(params), blocks, threads, shared)

    return start
