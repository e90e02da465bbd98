"""mamba.py: Mamba in plain PyTorch with a parallel scan whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mambapy.mamba import Mamba, MambaBlock, MambaConfig, RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import PUBLISHED, Theirs, renamed
from benchmarks.runner import DeclinedError
from mambakit import LanguageModel
from mambakit.testing.speakers import Step
from mambakit.testing.workloads import Call

FRONT = {"backbone.blocks.": "mamba.layers.", "backbone.norm_f.": "norm_f."}
MOST_BYTES = 40e9


def _selective_scan(inputs: Mapping[str, Any]) -> Call:
    b, l, d = inputs["x"].shape
    n = inputs["A"].shape[1]
    if inputs["x"].dtype != torch.float32:
        raise DeclinedError(f"computes in float32 only, not in {inputs['x'].dtype}")
    if (needed := 12 * b * l * d * n) > MOST_BYTES:
        raise DeclinedError(f"its three tensors (b, l, d, n) would take {needed / 1e9:.0f} GB")
    theirs = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    theirs |= {k: inputs[k].detach()[:, :, 0].contiguous().requires_grad_() for k in ("B", "C")}

    def forward() -> Tensor:
        t = theirs
        dt = F.softplus(t["dt"] + t["dt_bias"])
        y = MambaBlock.selective_scan(None, t["x"], dt, t["A"], t["B"], t["C"], t["D"])
        return y * F.silu(t["z"])

    return Call(forward, theirs, dict.fromkeys(("B", "C"), lambda t: t.unsqueeze(2)))


operators = {"selective_scan": _selective_scan}


def _config(mixer: nn.Module, layers: int) -> MambaConfig:
    c = mixer.config
    return MambaConfig(
        mixer.in_proj.in_features,
        layers,
        d_state=c.d_state,
        expand_factor=int(c.expand),
        d_conv=c.d_conv,
        bias=c.bias,
    )


def _mixer(ours: nn.Module) -> nn.Module:
    weight = ours.in_proj.weight
    made = MambaBlock(_config(ours, 1)).to(weight.device, weight.dtype)
    made.load_state_dict(renamed(ours, PUBLISHED))
    return made


class _LanguageModel(nn.Module):
    """Its layers between an embedding and a head, as in its `lm.py`, which needs mamba_ssm only to be
    imported."""

    def __init__(self, config: MambaConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm_f(self.mamba(self.embedding(tokens))))

    def step(self, token: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        x, caches = self.mamba.step(self.embedding(token), caches)
        return self.lm_head(self.norm_f(x)), caches


def _model(ours: LanguageModel) -> Theirs:
    weight, blocks = ours.embedding.weight, ours.backbone.blocks
    if weight.dtype != torch.float32:
        raise DeclinedError(f"refuses weights in {weight.dtype}")
    with torch.device(weight.device):
        made = _LanguageModel(_config(blocks[0].mixer, len(blocks)), ours.config.vocab_size).eval()
    made.load_state_dict(renamed(ours, {**FRONT, **PUBLISHED}))

    def decoder(batch: int) -> Step:
        mixer = made.mamba.layers[0].mixer.config
        inputs = torch.zeros(batch, mixer.d_inner, mixer.d_conv - 1, device=weight.device)
        caches = [(None, inputs.clone()) for _ in blocks]

        def step(token: Tensor) -> Tensor:
            nonlocal caches
            logits, caches = made.step(token, caches)
            return logits

        return step

    # It has no way to read a prompt into a cache but token by token: this is its forward pass, all logits
    # included.
    return Theirs(made, logits=made, read=lambda tokens: made(tokens)[:, -1], decoder=decoder)


mixers = {"mamba1": _mixer}
models = {"mamba1": _model}
