"""Three state space mixers and attention on selective copying, with equally many parameters."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from mambakit import LanguageModel, LanguageModelConfig
from mambakit.data import SelectiveCopyingConfig
from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config, S4DConfig

TASK = SelectiveCopyingConfig(length=8, n_data=2, vocab_size=6, evaluation_lengths=(8, 16))
MODELS = {
    "mamba1": (24, Mamba1Config(d_state=8)),
    "mamba2": (24, Mamba2Config(d_state=20, headdim=12)),
    "s4d": (38, S4DConfig(d_state=16)),
    "attention": (36, AttentionConfig(n_heads=3)),
}
VARIANTS = (*MODELS, "guess")


def accuracy(model, samples):
    """Share of the symbols that are copied right."""
    batch = samples.generate(np.arange(256))
    tokens, labels = torch.as_tensor(batch["tokens"]), torch.as_tensor(batch["labels"])
    asked = labels != -100
    with torch.no_grad():
        found = model(tokens).argmax(-1)
    return (found == labels)[asked].double().mean().item()


def experiment(variant, seed, small):
    """Accuracy at the trained amount of noise, and at twice as much."""
    if variant == "guess":
        return {"accuracy": TASK.chance, "accuracy_longer": TASK.chance, "parameters": 0}
    torch.manual_seed(seed)
    width, mixer = MODELS[variant]
    config = LanguageModelConfig(vocab_size=6, d_model=width, pattern="2X", mixers={"X": mixer})
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    data, batch = TASK.train(seed), 32
    steps = 10 if small else 150
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    for step in range(steps):
        drawn = data.generate(np.arange(step * batch, (step + 1) * batch))
        tokens, labels = torch.as_tensor(drawn["tokens"]), torch.as_tensor(drawn["labels"])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    near, far = (accuracy(model, TASK.evaluations()[f"length_{length}"]) for length in (8, 16))
    parameters = sum(p.numel() for p in model.parameters())
    return {"accuracy": near, "accuracy_longer": far, "parameters": parameters}


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
