"""transformers: its PyTorch code for Mamba and Mamba-2, what runs where no kernels are installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from benchmarks.peers import PUBLISHED, MissingError, Theirs, renamed
from benchmarks.runner import DeclinedError
from mambakit import LanguageModel
from mambakit.testing.speakers import Step
from mambakit.testing.workloads import Call

LONGEST_BACKWARD = 256
"""Tokens: each step's gradient allocates a tensor of the whole sequence, so training costs length squared."""
MOST_BYTES = 40e9

FRONT = {
    "embedding.": "backbone.embeddings.",
    "backbone.blocks.": "backbone.layers.",
}


def _function(module: Any, name: str) -> Any:
    """A function that came with transformers 5."""
    if not hasattr(module, name):
        raise MissingError(f"transformers {transformers.__version__} has no {name}; 5.20 or newer has")
    return getattr(module, name)


def _selective_scan(inputs: Mapping[str, Any]) -> Call:
    scan = _function(modeling_mamba, "mamba_selective_scan")
    b, l, d = inputs["x"].shape
    n = inputs["A"].shape[1]
    if (needed := 12 * b * l * d * n) > MOST_BYTES:
        raise DeclinedError(f"its three tensors (b, d, l, n) would take {needed / 1e9:.0f} GB")
    theirs = {k: _channels_first(inputs[k]) for k in ("x", "dt", "z")}
    theirs |= {k: inputs[k].detach()[:, :, 0].mT.contiguous().requires_grad_() for k in ("B", "C")}
    theirs |= {k: inputs[k] for k in ("A", "D", "dt_bias")}

    def forward() -> Tensor:
        t = theirs
        if torch.is_grad_enabled() and l > LONGEST_BACKWARD:
            raise DeclinedError(f"its backward pass is quadratic in length; timed up to {LONGEST_BACKWARD}")
        return scan(
            t["x"],
            t["dt"],
            t["A"],
            t["B"],
            t["C"],
            D=t["D"],
            z=t["z"],
            delta_bias=t["dt_bias"],
            delta_softplus=True,
        )

    ours = dict.fromkeys(("y", "x", "dt", "z"), lambda t: t.mT)
    ours |= dict.fromkeys(("B", "C"), lambda t: t.mT.unsqueeze(2))
    return Call(forward, theirs, ours, lambda y: y.mT.contiguous())


def _ssd(inputs: Mapping[str, Any]) -> Call:
    scan = _function(modeling_mamba2, "mamba2_chunk_scan")
    theirs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def forward() -> Tensor:
        t = theirs
        found = scan(
            t["x"],
            t["dt"],
            t["A"],
            t["B"],
            t["C"],
            chunk_size=256,
            D=t["D"],
            dt_bias=t["dt_bias"],
            dt_softplus=True,
        )
        return found[0] if isinstance(found, tuple) else found

    return Call(forward, theirs)


def _channels_first(t: Tensor) -> Tensor:
    return t.detach().mT.contiguous().requires_grad_()


operators = {"selective_scan": _selective_scan, "ssd": _ssd}


def _config(kind: str, mixer: Any, **sizes: Any) -> Any:
    """Their config for a mixer of ours."""
    c, d_model = mixer.config, mixer.in_proj.in_features
    common = {
        "hidden_size": d_model,
        "state_size": c.d_state,
        "conv_kernel": c.d_conv,
        "expand": int(c.expand),
        "use_bias": c.bias,
        "tie_word_embeddings": True,
        **sizes,
    }
    if kind == "mamba1":
        return MambaConfig(**common, layer_norm_epsilon=1e-5)
    heads = c.nheads(d_model)
    return Mamba2Config(
        **common, num_heads=heads, head_dim=c.headdim, n_groups=c.ngroups, layer_norm_epsilon=1e-5
    )


def _mixer(kind: str) -> Any:
    def make(ours: nn.Module) -> nn.Module:
        mixer = {"mamba1": modeling_mamba.MambaMixer, "mamba2": modeling_mamba2.Mamba2Mixer}[kind]
        weight = ours.in_proj.weight
        made = mixer(_config(kind, ours, num_hidden_layers=1), layer_idx=0).to(weight.device, weight.dtype)
        made.load_state_dict(renamed(ours, PUBLISHED if kind == "mamba1" else {}))
        return made

    return make


def _model(kind: str) -> Any:
    def make(ours: LanguageModel) -> Theirs:
        weight, blocks = ours.embedding.weight, ours.backbone.blocks
        config = _config(
            kind, blocks[0].mixer, vocab_size=ours.config.vocab_size, num_hidden_layers=len(blocks)
        )
        with torch.device(weight.device):
            made = (MambaForCausalLM if kind == "mamba1" else Mamba2ForCausalLM)(config)
        made = made.to(weight.dtype).eval()
        made.load_state_dict(renamed(ours, {**FRONT, **(PUBLISHED if kind == "mamba1" else {})}))

        def decoder(batch: int) -> Step:
            cache = None

            def step(token: Tensor) -> Tensor:
                nonlocal cache
                found = made(token[:, None], cache_params=cache, use_cache=True)
                cache = found.cache_params
                return found.logits[:, -1]

            return step

        return Theirs(
            made,
            logits=lambda tokens: made(tokens, use_cache=False).logits,
            read=lambda tokens: made(tokens, use_cache=True, logits_to_keep=1).logits[:, -1],
            decoder=decoder,
        )

    return make


mixers = {kind: _mixer(kind) for kind in ("mamba1", "mamba2")}
models = {kind: _model(kind) for kind in ("mamba1", "mamba2")}
