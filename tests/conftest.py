"""Settings of every test run: one thread per process, so that results do not depend on the machine."""

from __future__ import annotations

import os

# Before torch is imported anywhere: tiny tensors run several times slower with a thread pool, and
# pytest-xdist already puts a process on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Before Triton is imported anywhere: where there is no GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
