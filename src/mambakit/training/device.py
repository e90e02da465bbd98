"""Where and how precisely a run computes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from mambakit.config import ConfigError


def choose(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:1` into a device that exists.

    Raises:
        ConfigError: No such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; valid: auto, cpu, cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: training runs on cpu and cuda")
    if device.type == "cuda":
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= available:
            raise ConfigError(
                f"device {name!r}: this machine has {available} CUDA devices; device=cpu runs anywhere"
            )
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32.

    GPUs do; of CPUs those with instructions for it (AVX-512 BF16, AMX): others convert, and are slower.
    """
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return device.type == "cuda"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: parameters stay float32, `bf16` lets matrix products round."""
    rounds = multiplies_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=rounds)


@contextlib.contextmanager
def numerics(matmul_precision: str, deterministic: bool) -> Iterator[None]:
    """Set PyTorch's process-wide choices for the length of a run, and put them back.

    Args:
        matmul_precision: `highest` (float32), `high` (TF32) or `medium` (bf16) for float32 products on a GPU.
        deterministic: Refuse operations that may give other bits from run to run.
    """
    precision_before = torch.get_float32_matmul_precision()
    # Asking PyTorch for determinism imports its compiler, two seconds: only where it changes something.
    switch = deterministic and not torch.are_deterministic_algorithms_enabled()
    if switch:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision_before)
        if switch:
            torch.use_deterministic_algorithms(False)


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, where the C library is glibc.

    A training step frees on the way back what it allocated on the way forth. glibc returns such blocks to the
    system, which clears every page anew for the next step: a tenth of a small model's time on a CPU.

    Returns:
        Whether it was done.
    """
    trim_threshold, mmap_threshold = (-1, 2**31 - 1), (-3, 2**25)  # names and limits of malloc.h
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and all(mallopt(*option) for option in (trim_threshold, mmap_threshold))


def move(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy a batch to the device, by way of pinned memory where that spares waiting for a GPU."""
    if device.type == "cuda":
        batch = {
            key: value if value.is_cuda or value.is_pinned() else value.pin_memory()
            for key, value in batch.items()
        }
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def wait(device: torch.device) -> None:
    """Wait for the device to finish, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators that a run draws from, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore `random_state`; a run moved between kinds of device keeps the state they share."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def peak_memory(device: torch.device) -> int | None:
    """Most memory held so far, in bytes: by tensors on a GPU, else by the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
