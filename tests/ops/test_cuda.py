"""How kernels are started: what the driver is handed."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mambakit.ops import cuda


class Driver:
    """Takes the driver's place and notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def cuLaunchKernel(self, function, *rest):
        self.calls.append(("plain", rest[:7]))
        return 0

    def cuLaunchKernelEx(self, launch, function, params, extra):
        # As the driver reads it: CUlaunchConfig (56 bytes), CUlaunchAttribute (72) of CUDA 12 and 13.
        raw = ctypes.string_at(ctypes.addressof(launch._obj), 56)
        words = [int.from_bytes(raw[4 * i : 4 * i + 4], "little") for i in range(7)]
        stream, attributes = (int.from_bytes(raw[at : at + 8], "little") for at in (32, 40))
        count = int.from_bytes(raw[48:52], "little")
        attribute = ctypes.string_at(attributes, 72)
        identifier, value = (int.from_bytes(attribute[at : at + 4], "little") for at in (0, 8))
        self.calls.append(("overlapping", words, stream, count, identifier, value))
        return 0


@pytest.fixture
def kernel(monkeypatch):
    """A kernel as if it had been loaded on the first GPU, on stream 7."""
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    made = cuda.Kernel.__new__(cuda.Kernel)
    made.name, made.device, made._shared = "imagined", torch.device("cuda", 0), 0
    made._function, made._can_overlap, made.driver = ctypes.c_void_p(1), True, driver
    return made


def test_a_launch_that_may_start_early_is_laid_out_as_the_driver_reads_it(kernel):
    kernel(cuda._Launch(), 5, 128, 1024, True)
    assert kernel.driver.calls == [("overlapping", [5, 1, 1, 128, 1, 1, 1024], 7, 1, 6, 1)]


@pytest.mark.parametrize(("able", "asked"), [(True, False), (False, True), (False, False)])
def test_without_the_wish_or_the_hardware_a_launch_is_plain(kernel, able, asked):
    kernel._can_overlap = able
    kernel(cuda._Launch(), 5, 128, 1024, asked)
    assert kernel.driver.calls == [("plain", (5, 1, 1, 128, 1, 1, 1024))]
