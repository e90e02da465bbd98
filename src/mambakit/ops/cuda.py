"""CUDA C++ kernels compiled at run time: NVRTC makes a binary for this GPU, the driver loads and starts it.

Nothing is compiled when the package is installed and no CUDA toolkit is needed: NVRTC comes with PyTorch's
CUDA build and the driver with the GPU. A binary is kept on disk, so that a process that finds it pays
milliseconds.

Kernels live in `.cu` files beside their operator, preceded by what they share and by `cuda.cuh`. Each takes
one block of parameters, `Params`, mirrored by a `ctypes.Structure`; types and optional arguments are settings
of the compilation.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import os
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
"""Types of activations -> their names in the kernels."""

LEAST_CAPABILITY = (8, 0)
"""Oldest GPUs with what the kernels use: asynchronous copies and bf16."""

LEAST_OVERLAPPING = (9, 0)
"""Oldest GPUs on which a kernel can start before the one before it has ended."""
_MAY_START_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier, and a value in a union of 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("_pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("_rest", ctypes.c_char * 60),
    ]

    def __init__(self, number: int, value: int) -> None:
        super().__init__(id=number, value=value)


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class CompilationError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


class Source:
    """Kernels of one operator: a file each, and what they share.

    Args:
        folder: Where `NAME.cu` lies for each kernel.
        shared: The file in it that all kernels begin with; defines `struct Params`.
        params: Mirror of that struct.
        files: Names of files that hold kernels of other names: kernel -> file.
    """

    def __init__(
        self,
        folder: Path,
        shared: str,
        params: type[ctypes.Structure],
        files: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self._folder, self._shared, self._files = folder, shared, files
        self.params = params
        self._kernels: dict[tuple[Any, ...], Any] = {}

    def text(self, name: str) -> str:
        """The whole translation unit of a kernel."""
        paths = (
            Path(__file__).with_name("cuda.cuh"),
            self._folder / self._shared,
            self._folder / self._files.get(name, f"{name}.cu"),
        )
        return "\n".join(f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in paths)

    def launch(
        self,
        name: str,
        settings: Mapping[str, str | int],
        params: ctypes.Structure,
        *,
        blocks: int,
        threads: int,
        shared: int,
        device: torch.device,
        overlap: bool = False,
    ) -> None:
        """Start a kernel on the current stream.

        Args:
            name: The kernel's name.
            settings: Preprocessor definitions.
            params: Its parameters; copied before this returns.
            blocks: Size of the grid.
            threads: Threads of a block.
            shared: Bytes of dynamic shared memory.
            device: Where to run.
            overlap: Let it start while the kernel before it still runs, where the GPU can; the kernel itself
                waits before it reads what others write (`wait_for_earlier_kernels` of `cuda.cuh`).

        Raises:
            CompilationError: The kernel does not compile.
            RuntimeError: The driver refuses the launch, with its reason.
        """
        key = (name, device, *settings.items())
        kernel = self._kernels.get(key)
        if kernel is None:
            words = [f"-DKERNEL_{name}", *(f"-D{k}={v}" for k, v in settings.items())]
            kernel = self._kernels[key] = make(self.text(name), name, words, device)
        kernel(params, blocks, threads, shared, overlap)


class Kernel:
    """A kernel loaded on one device; called to start it."""

    def __init__(self, binary: bytes, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # creates the context
            module = ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), binary), f"loading {name}")
            self._function = ctypes.c_void_p()
            found = _driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
            _check(found, f"finding {name}")
        self._shared = 0
        self._can_overlap = torch.cuda.get_device_capability(device) >= LEAST_OVERLAPPING

    def __call__(
        self, params: ctypes.Structure, blocks: int, threads: int, shared: int, overlap: bool = False
    ) -> None:
        """Start `blocks` blocks on the current stream."""
        if self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(params, blocks, threads, shared, overlap)
        if shared > max(self._shared, 48 * 1024):
            # 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(
                _driver().cuFuncSetAttribute(self._function, 8, shared), f"{shared} bytes of shared memory"
            )
            self._shared = shared
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.device.index))
        if overlap and self._can_overlap:
            attribute = _Attribute(_MAY_START_EARLY, 1)
            launch = _Launch(blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.pointer(attribute), 1)
            code = _driver().cuLaunchKernelEx(
                ctypes.byref(launch), self._function, ctypes.byref(pointer), None
            )
        else:
            code = _driver().cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.byref(pointer), None
            )
        return _check(code, f"launching {self.name}")


def make(text: str, name: str, words: list[str], device: torch.device) -> Any:
    """Compile and load a kernel; emulation takes this function's place."""
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(_binary(text, [*words, f"--gpu-architecture=sm_{major}{minor}"]), name, device)


def runs_on(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None.

    Args:
        device: Where the inputs are.

    Returns:
        A reason for a user.
    """
    if device.type != "cuda":
        return f"takes tensors on a CUDA device, not on {device.type!r}"
    return _missing(device.index)


@functools.cache
def _missing(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability {LEAST_CAPABILITY}, this GPU has {capability}"
    try:
        _nvrtc()
    except OSError as error:
        return f"NVRTC, CUDA's run-time compiler, was not found: {error}"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def block_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def address(tensor: Tensor | None) -> int | None:
    """A tensor's address for a field of `Params`; null for an absent one."""
    return None if tensor is None else tensor.data_ptr()


def is_aligned(*tensors: Tensor | None, to: int = 16) -> bool:
    """Whether all rows of all tensors start at multiples of `to` bytes, as vector accesses need."""
    for tensor in tensors:
        if tensor is None:
            continue
        size = tensor.element_size()
        if tensor.data_ptr() % to or any(stride * size % to for stride in tensor.stride()[:-1]):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------
# The compiler and the driver


def _binary(text: str, options: list[str]) -> bytes:
    """A cubin, from disk where the same text was compiled with the same options before."""
    options = ["--std=c++17", "--device-as-default-execution-space", *options]
    version = _nvrtc_version()
    key = hashlib.sha256("\0".join([text, *options, version]).encode()).hexdigest()
    path = _folder() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        binary = _compile(text, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return binary


def _folder() -> Path:
    named = os.environ.get("MAMBAKIT_KERNEL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mambakit" / "kernels"


def _compile(text: str, options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None), "NVRTC"
    )
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            raise CompilationError(
                _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
            )
        return _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, size: Any, get: Any) -> bytes:
    length = ctypes.c_size_t()
    _check(size(program, ctypes.byref(length)), "NVRTC")
    buffer = ctypes.create_string_buffer(length.value)
    _check(get(program, buffer), "NVRTC")
    return buffer.raw


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"CUDA: {what} failed with error {code}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own NVRTC: one of its CUDA version, from the packages beside it or the system."""
    major = torch.version.cuda.split(".")[0] if torch.version.cuda else ""
    if sys.platform == "win32":
        return ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/nvrtc64*.dll"), "nvrtc64.dll")))
    name = f"libnvrtc.so.{major}"
    beside = Path(torch.__file__).parent.parent / "nvidia"
    found = sorted(glob.glob(str(beside / "*" / "lib" / name)))
    return ctypes.CDLL(found[0] if found else name)


@functools.cache
def _nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"
