"""GPU kernels in these tests also run without a GPU, in emulation and in Triton's interpreter."""

from __future__ import annotations

import pytest

from mambakit.testing.emulation import emulated_gpu


@pytest.fixture(autouse=True)
def emulation():
    with emulated_gpu():
        yield
