"""llama.cpp, through llama-cpp-python: C++ inference on CPUs, with quantised weights where asked for.

Our weights go through a GGUF file, exported without a vocabulary.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import Step
from mambakit import LanguageModel
from mambakit.export import export_gguf

BOUNDS = {"f32": 2e-3, "f16": 2e-2, "bf16": 6e-2, "q8_0": 6e-2, "q4_0": 0.5}
"""Largest relative difference of logits: of quantised random weights only that they are not nonsense."""
CONTEXT = 1024


class Speaker:
    """See `mambakit.testing.speakers.Speaker`; batches of one.

    Args:
        ours: Whose weights to take.
        quantized: Type of the matrices: a key of `BOUNDS`.

    Attributes:
        bound: Largest relative difference of its logits.
        weight_bytes: Size of its weights.
    """

    module: nn.Module | None = None

    def __init__(self, ours: LanguageModel, quantized: str = "f32") -> None:
        self.bound = BOUNDS[quantized]
        self._vocabulary = ours.config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            export_gguf(ours, path, dtype=quantized)
            llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False  # the file goes away
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError("llama.cpp refuses the model")
        self.weight_bytes = llama_cpp.llama_model_size(self._model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = CONTEXT
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits after the prompt, read into an empty state."""
        self._forget()
        return self._decode(tokens)

    def decoder(self, batch: int) -> Step:
        """A step of one token."""
        if batch != 1:
            raise ValueError(f"batch is {batch}, expected 1")
        self._forget()
        return self._decode

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """There is none."""
        raise NotImplementedError("llama.cpp does not train")

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: Tensor) -> Tensor:
        words = np.ascontiguousarray(tokens.flatten().numpy(), dtype=np.int32)
        pointer = words.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        batch = llama_cpp.llama_batch_get_one(pointer, len(words))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (1, self._vocabulary)))

    def __del__(self) -> None:
        """Give the memory back."""
        if getattr(self, "_context", None):
            llama_cpp.llama_free(self._context)
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Say nothing."""


models = dict.fromkeys(("mamba1", "mamba2"), Speaker)
