"""llama.cpp, through llama-cpp-python: C++ inference on CPUs, with quantised weights where asked for.

Our weights are written to a GGUF file without a vocabulary, which llama.cpp then reads like any other.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import Step
from mambakit import LanguageModel

BOUNDS = {"f32": 2e-3, "bf16": 6e-2, "q8_0": 6e-2, "q4_0": 0.5}
"""Largest relative difference of logits: of quantised random weights only that they are not nonsense."""
CONTEXT = 1024


class Speaker:
    """See `mambakit.testing.speakers.Speaker`; batches of one.

    Args:
        ours: Whose weights to take.
        kind: `mamba1` or `mamba2`.
        quantized: Type of the matrices: a key of `BOUNDS`.

    Attributes:
        bound: Largest relative difference of its logits.
        weight_bytes: Size of its weights.
    """

    module: nn.Module | None = None

    def __init__(self, ours: LanguageModel, kind: str, quantized: str = "f32") -> None:
        self.bound = BOUNDS[quantized]
        self._vocabulary = ours.config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            _write(path, ours, kind, gguf.GGMLQuantizationType[quantized.upper()])
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


def _write(path: Path, ours: LanguageModel, kind: str, quantized: gguf.GGMLQuantizationType) -> None:
    """Write our weights as GGUF: matrices in the given type, everything of the recurrence in float32."""
    mixer = ours.backbone.blocks[0].mixer
    config, inner = mixer.config, mixer.out_proj.in_features
    writer = gguf.GGUFWriter(path, {"mamba1": "mamba", "mamba2": "mamba2"}[kind])
    writer.add_context_length(2**20)
    writer.add_embedding_length(ours.config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(ours.backbone.blocks))
    writer.add_vocab_size(ours.config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(
        config.rank(ours.config.d_model) if kind == "mamba1" else config.nheads(ours.config.d_model)
    )
    if kind == "mamba2":
        writer.add_ssm_group_count(config.ngroups)
    writer.add_layer_norm_rms_eps(ours.config.norm_eps)
    for name, tensor in _tensors(ours, kind).items():
        values = tensor.detach().float().contiguous().numpy()
        as_type = quantized if _is_matrix(name) else gguf.GGMLQuantizationType.F32
        if as_type != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.quantize(values, as_type)
        writer.add_tensor(name, values, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_MATRICES = ("token_embd.weight", "ssm_in.weight", "ssm_x.weight", "ssm_out.weight")


def _is_matrix(name: str) -> bool:
    """Those that hold nearly all weights, with rows of whole blocks of 32 for quantisation."""
    return name.endswith(_MATRICES)


def _tensors(ours: LanguageModel, kind: str) -> dict[str, Tensor]:
    """Their name -> tensor, in their shape."""
    found = {
        "token_embd.weight": ours.embedding.weight,
        "output_norm.weight": ours.backbone.norm_f.weight,
    }
    for number, block in enumerate(ours.backbone.blocks):
        mixer = block.mixer
        parts = {
            "attn_norm.weight": block.norm.weight,
            "ssm_in.weight": mixer.in_proj.weight,
            "ssm_conv1d.weight": mixer.conv1d.weight.squeeze(1),
            "ssm_conv1d.bias": mixer.conv1d.bias,
            "ssm_out.weight": mixer.out_proj.weight,
        }
        if kind == "mamba1":
            parts |= {
                "ssm_x.weight": mixer.ssm.x_proj.weight,
                "ssm_dt.weight": mixer.ssm.dt_proj.weight,
                "ssm_dt.bias": mixer.ssm.dt_bias,
                "ssm_a": -torch.exp(mixer.ssm.A_log),
                "ssm_d": mixer.ssm.D,
            }
        else:
            parts |= {
                "ssm_dt.bias": mixer.dt_bias,
                "ssm_a": -torch.exp(mixer.A_log).unsqueeze(1),
                "ssm_d": mixer.D.unsqueeze(1),
                "ssm_norm.weight": mixer.norm.weight.unflatten(0, (mixer.config.ngroups, -1)),
            }
        found |= {f"blk.{number}.{name}": tensor for name, tensor in parts.items()}
    return found


models = {kind: functools.partial(Speaker, kind=kind) for kind in ("mamba1", "mamba2")}
