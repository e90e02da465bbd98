"""mamba_ssm: the published CUDA and Triton kernels, modules and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.utils.generation import InferenceParams
from torch import Tensor, nn

from benchmarks.peers import PUBLISHED, Theirs, renamed
from mambakit import LanguageModel
from mambakit.testing.speakers import Step
from mambakit.testing.workloads import Call

FRONT = {"embedding.": "backbone.embedding.", "backbone.blocks.": "backbone.layers."}
CHUNK = 256


def _selective_scan(inputs: Mapping[str, Any]) -> Call:
    theirs = {k: inputs[k].detach().mT.contiguous().requires_grad_() for k in ("x", "dt", "z")}
    theirs |= {
        k: inputs[k].detach().permute(0, 2, 3, 1).contiguous().requires_grad_()
        for k in ("B", "C")  # (b, g, n, l)
    }
    theirs |= {k: inputs[k] for k in ("A", "D", "dt_bias")}

    def forward() -> Tensor:
        t = theirs
        return selective_scan_fn(
            t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], delta_softplus=True
        )

    ours = dict.fromkeys(("y", "x", "dt", "z"), lambda t: t.mT)
    ours |= dict.fromkeys(("B", "C"), lambda t: t.permute(0, 3, 1, 2))
    return Call(forward, theirs, ours, lambda y: y.mT.contiguous())


def _ssd(inputs: Mapping[str, Any]) -> Call:
    theirs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def forward() -> Tensor:
        t = theirs
        return mamba_chunk_scan_combined(
            t["x"], t["dt"], t["A"], t["B"], t["C"], CHUNK, D=t["D"], dt_bias=t["dt_bias"], dt_softplus=True
        )

    return Call(forward, theirs)


def _norm(inputs: Mapping[str, Any]) -> Call:
    theirs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def forward() -> Tensor:
        t = theirs
        if "z" in t:
            return rmsnorm_fn(t["x"], t["weight"], None, t["z"], eps=1e-5, norm_before_gate=False)
        return rms_norm_fn(t["x"], t["weight"], None, eps=1e-5)

    return Call(forward, theirs)


operators = {"selective_scan": _selective_scan, "ssd": _ssd, "norm": _norm}


def _mixer(kind: str) -> Any:
    def make(ours: nn.Module) -> nn.Module:
        weight, c = ours.in_proj.weight, ours.config
        sizes = {"d_state": c.d_state, "d_conv": c.d_conv, "expand": int(c.expand), "bias": c.bias}
        placed = {"device": weight.device, "dtype": weight.dtype}
        if kind == "mamba1":
            made = Mamba(ours.in_proj.in_features, **sizes, **placed)
        else:
            made = Mamba2(
                ours.in_proj.in_features,
                headdim=c.headdim,
                ngroups=c.ngroups,
                chunk_size=CHUNK,
                **sizes,
                **placed,
            )
        made.load_state_dict(renamed(ours, PUBLISHED if kind == "mamba1" else {}))
        return made

    return make


def _model(kind: str) -> Any:
    def make(ours: LanguageModel) -> Theirs:
        weight, blocks, c = ours.embedding.weight, ours.backbone.blocks, ours.backbone.blocks[0].mixer.config
        extra = {"headdim": c.headdim, "ngroups": c.ngroups} if kind == "mamba2" else {}
        config = MambaConfig(
            d_model=ours.config.d_model,
            n_layer=len(blocks),
            vocab_size=ours.config.vocab_size,
            ssm_cfg={"layer": kind.capitalize(), "d_state": c.d_state, **extra},
            pad_vocab_size_multiple=1,
        )
        made = MambaLMHeadModel(config, device=weight.device, dtype=weight.dtype).eval()
        made.load_state_dict(renamed(ours, {**FRONT, **(PUBLISHED if kind == "mamba1" else {})}))

        def read(tokens: Tensor) -> Tensor:
            cache = InferenceParams(max_seqlen=tokens.shape[1], max_batch_size=len(tokens))
            return made(tokens, inference_params=cache, num_last_tokens=1).logits[:, -1]

        def decoder(batch: int) -> Step:
            cache = InferenceParams(max_seqlen=2**20, max_batch_size=batch)
            cache.key_value_memory_dict = made.allocate_inference_cache(batch, 2**20, dtype=weight.dtype)
            for state in (t for layer in cache.key_value_memory_dict.values() for t in layer):
                state.zero_()
            cache.seqlen_offset = 1  # anything but 0 means one token at a time, with the states as they are

            def step(token: Tensor) -> Tensor:
                return made(token[:, None], inference_params=cache).logits[:, -1]

            return step

        return Theirs(made, logits=lambda tokens: made(tokens).logits, read=read, decoder=decoder)

    return make


mixers = {kind: _mixer(kind) for kind in ("mamba1", "mamba2")}
models = {kind: _model(kind) for kind in ("mamba1", "mamba2")}

if not torch.cuda.is_available():
    raise ImportError("needs a CUDA device")
