"""An averaging mixer whose decay the token chooses from (-1, 1) instead of (0, 1), on parity."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mambakit import Mixer, MixerConfig, State, ops

LENGTH, WIDTH = 8, 16
VARIANTS = ("signed", "unsigned", "attention", "majority")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConfig(MixerConfig, tag="project-gated"):
    """Whether decays may be negative."""

    signed: bool = True


class Gated(Mixer, config=GatedConfig):
    """h_t = a_t h_{t-1} + v_t, a_t from the token, and a linear layer behind it."""

    def __init__(self, d_model, config=GatedConfig(), *, device=None, dtype=None):  # noqa: B008
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.signed = config.signed
        self.in_proj = nn.Linear(d_model, 2 * d_model, **made)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **made)

    def init_state(self, batch, *, max_length=None, device=None, dtype=None):
        weight = self.out_proj.weight
        return State({"h": weight.new_zeros(batch, weight.shape[0], device=device)})

    def forward(self, x, state=None, context=None):
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        a = torch.tanh(gate) if self.signed else torch.sigmoid(gate)
        h = None if state is None else state["h"]
        seq_idx = None if context is None else context.seq_idx
        y, _ = ops.linear_scan(a, value, state=h, seq_idx=seq_idx)
        return self.out_proj(y)


class Attention(nn.Module):
    """A layer of causal attention with learned positions."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.qkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x + self.position).chunk(3, dim=-1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Net(nn.Module):
    """Embedding, one mixer, a nonlinear readout of every position."""

    def __init__(self, mixer):
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(2, WIDTH), mixer
        self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, bits):
        return self.head(self.mixer(self.embedding(bits)))


def experiment(variant, seed, small):
    """Accuracy of the parity after the last bit, on all sequences there are."""
    torch.manual_seed(seed)
    every = torch.cartesian_prod(*[torch.tensor([0, 1])] * LENGTH)
    truth = every.cumsum(1) % 2
    if variant == "majority":
        guess = truth[:, -1].mode().values
        return {"accuracy": (truth[:, -1] == guess).double().mean().item(), "parameters": 0}
    mixer = Attention() if variant == "attention" else GatedConfig(signed=variant == "signed").build(WIDTH)
    net = Net(mixer)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(20 if small else 600):
        rows = torch.randint(len(every), (64,))
        loss = F.cross_entropy(net(every[rows]).flatten(0, 1), truth[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = net(every)[:, -1].argmax(-1) == truth[:, -1]
    parameters = sum(p.numel() for p in net.parameters())
    return {"accuracy": right.double().mean().item(), "parameters": parameters}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    runs = [
        {"variant": variant, "seed": seed, "metrics": experiment(variant, seed, options.small)}
        for variant in VARIANTS
        for seed in (0, 1, 2)
    ]
    options.out.write_text(json.dumps(runs))
