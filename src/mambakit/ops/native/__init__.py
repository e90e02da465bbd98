"""The C++ kernels from Python: which library fits this processor, and how a kernel is called.

The libraries (`build.py`) are plain C behind `ctypes`, so one build serves every Python and every torch. The
first kernel that is asked for loads the best instruction level; nothing happens at import. A library is taken
only if it was made of the very sources that lie beside it.

Threads come from the OpenMP runtime that PyTorch has loaded: its `GOMP_parallel` is looked up in this process
and handed to the library. PyTorch and the kernels thus share one pool, and a process that has been told to
use one thread (a worker of a data loader) starts none here.

The environment variable `MAMBAKIT_NATIVE` forces a level (`avx512`, `avx2`, `baseline`), names a library's
file, or switches the kernels `off`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.config import unknown
from mambakit.ops.native import build
from mambakit.ops.operands import common_type, rows
from mambakit.ops.shapes import same_document

ENVIRONMENT = "MAMBAKIT_NATIVE"
REBUILD = "python -m mambakit.ops.native"
"""The command that compiles the kernels."""
DTYPES = (torch.float32, torch.bfloat16)
"""Types of activations that the kernels take, the most exact first."""


@dataclasses.dataclass(frozen=True)
class Native:
    """What was found.

    Attributes:
        library: The loaded library, or `None`.
        reason: Why there is none, and what to do about it.
        level: Its instruction level, or the file that `MAMBAKIT_NATIVE` named.
        compiler: Version of the compiler that made it.
        openmp: File of the OpenMP runtime whose threads it uses, or why it uses none.
        parallel: Whether it uses threads.
    """

    library: ctypes.CDLL | None = None
    reason: str | None = None
    level: str = ""
    compiler: str = ""
    openmp: str = ""
    parallel: bool = False


@functools.cache
def load() -> Native:
    """Find and load the best library, once per process.

    Returns:
        The library and what is known of it, or the reason why there is none.
    """
    asked = os.environ.get(ENVIRONMENT, "")
    if asked == "off":
        return Native(reason=f"{ENVIRONMENT}=off")
    try:
        if os.sep in asked:
            return _opened(Path(asked), asked)
        if asked and asked not in build.levels():
            return Native(reason=f"{ENVIRONMENT}: {unknown('level', asked, [*build.levels(), 'off'])}")
        best = asked or best_level()
        names = list(build.levels())
        for level in reversed(names[: names.index(best) + 1]):
            path = build.LIBRARIES / build.library_name(level)
            if path.exists() or asked:
                return _opened(path, level)
        return Native(reason=_why_not_built())
    except OSError as error:
        return Native(reason=f"the library cannot be loaded: {error}")


def best_level() -> str:
    """The highest instruction level that this processor runs, asked of the lowest library."""
    lowest = build.LIBRARIES / build.library_name("baseline")
    return _text(ctypes.CDLL(str(lowest)), "mambakit_best_level") if lowest.exists() else "baseline"


def _reason() -> str | None:
    return load().reason


# What `torch.compiler.assume_constant_result` sets, without the second that importing torch._dynamo takes: a
# tracer calls this function instead of reading it.
_reason._dynamo_marked_constant = True


def _opened(path: Path, level: str) -> Native:
    library = ctypes.CDLL(str(path))
    if _text(library, "mambakit_sources") != build.digest():
        return Native(reason=f"{path.name} was built from other sources; build it again: {REBUILD}")
    address, openmp = _openmp()
    library.mambakit_use_openmp.argtypes = [ctypes.c_void_p]
    library.mambakit_use_openmp(address)
    return Native(
        library=library,
        level=level,
        compiler=_text(library, "mambakit_compiler"),
        openmp=openmp,
        parallel=address is not None,
    )


def _text(library: ctypes.CDLL, function: str) -> str:
    found = getattr(library, function)
    found.restype = ctypes.c_char_p
    return found().decode()


def _why_not_built() -> str:
    compiler = build.find_compiler()
    if compiler is None:
        return f"not built, because no C++ compiler was found: {build.HOW_TO_GET_A_COMPILER}, then {REBUILD}"
    return f"not built when mambakit was installed; {compiler[0]} can do it now: {REBUILD}"


def _openmp() -> tuple[int | None, str]:
    """The address of `GOMP_parallel` in a runtime that is loaded already, and that runtime's file.

    GCC's, LLVM's and Intel's runtimes all have it. What the process itself would find comes first, because
    PyTorch finds the same; then any runtime that is mapped. None is ever loaded here: a second one would
    bring threads of its own.
    """
    if not torch.backends.openmp.is_available():
        return None, "none: this torch is built without OpenMP"
    mapped = _mapped_runtimes()
    for path in [None, *mapped]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (AttributeError, OSError, TypeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value, path or " ".join(mapped)
    return None, "none: the OpenMP runtime of this torch was not found"


def _mapped_runtimes() -> list[str]:
    """Files of OpenMP runtimes in this process: opening one of them again loads nothing."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as lines:
            files = {line.split(maxsplit=5)[-1].strip() for line in lines if "omp" in line}
    except OSError:
        beside = Path(torch.__file__).parent / "lib"
        files = {str(path) for path in (*beside.glob("libomp*"), *beside.glob("libiomp*"))}
    return sorted(path for path in files if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


class Kernel:
    """One C function, looked up at its first call.

    Args:
        name: The function's name without its prefix.
        fields: Types of its `Args` in order, as for the `struct` module: `q` for pointers and integers, `d`
            for floating-point numbers, each possibly repeated (`"12qd"`).
    """

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        self.pack = struct.Struct(f"={fields}").pack
        self.size = struct.calcsize(f"={fields}")
        self.function: ctypes._CFuncPtr | None = None

    def __call__(self, *values: float) -> None:
        """Run it on these fields."""
        function = self.function or self._find()
        if function(self.pack(*values), self.size):
            raise RuntimeError(f"{self.name}: the library expects other arguments than {self.size} bytes")

    def _find(self) -> ctypes._CFuncPtr:
        library = load().library
        assert library is not None, "a kernel is called only where `unsupported` found a library"
        function = getattr(library, f"mambakit_{self.name}")
        function.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        function.restype = ctypes.c_int
        self.function = function
        return function


def unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or `None`.

    Args:
        x: The operator's main input.
        *others: Its other floating-point inputs.

    Returns:
        The first reason: another device or type, or no library.
    """
    for tensor in (x, *others):
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in DTYPES):
            if not tensor.is_cpu:
                return f"the tensors are on {tensor.device}, not on the CPU"
            return f"it takes float32 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    return _reason()


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def even_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor as rows of its last dimension at one distance from each other, and that distance.

    A slice of channels is taken as it is; what cannot be seen that way is copied.
    """
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    strides, shape = tensor.stride(), tensor.shape
    even = strides[-1] == 1 and all(
        strides[i] == strides[i + 1] * shape[i + 1] for i in range(tensor.dim() - 2)
    )
    if even and tensor.dim() > 1:
        return tensor, strides[-2]
    return tensor.contiguous(), shape[-1]


def common(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sequence tensors in their common type, each with a contiguous last dimension."""
    dtype = common_type(*tensors)
    return [rows(tensor, dtype) for tensor in tensors]


def starts(seq_idx: Tensor | None) -> Tensor | None:
    """Whether a token starts a document, `(b, l)` in bytes; the first token of a row never does."""
    return None if seq_idx is None else ~same_document(seq_idx)
