"""A Mamba-2 that learned Shakespeare, fine-tuned on a little text as a speech recogniser would write it."""

import argparse
import copy
import json
import math
import re
from pathlib import Path

import torch
from torch.nn import functional as F

from mambakit import LanguageModel, LanguageModelConfig
from mambakit.data import shakespeare
from mambakit.layers import AttentionConfig, Mamba2Config

LENGTH, BATCH, LETTERS = 48, 16, 128
VARIANTS = ("before", "finetuned", "from scratch", "attention", "counts")


def domains():
    """The old domain, and the new one: 6,000 letters to learn from, 4,000 to be tested on, as numbers."""
    text = shakespeare() if callable(shakespeare) else shakespeare.text()
    plain = re.sub(r"[^a-z ]+", " ", text[600_000:640_000].lower())
    plain = re.sub(r" +", " ", plain)
    code = [
        torch.tensor([min(ord(c), 127) for c in part]) for part in (text[:500_000], text[500_000:504_000])
    ]
    new = [torch.tensor([ord(c) for c in part]) for part in (plain[:6000], plain[6000:10_000])]
    return (*code, *new)


def bits(model, text):
    """Bits per letter."""
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    with torch.no_grad():
        scores = model(rows[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten()).item() / math.log(2)


def train(model, text, steps, rate):
    """Next letters, from random places."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        places = torch.randint(len(text) - LENGTH - 1, (BATCH,))
        rows = torch.stack([text[place : place + LENGTH + 1] for place in places])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def counts(text, test):
    """Bits per letter of counted pairs, with one added to each."""
    pairs = torch.ones(LETTERS, LETTERS)
    pairs.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
    p = pairs / pairs.sum(1, keepdim=True)
    return -p[test[:-1], test[1:]].log2().mean().item()


def make(mixer):
    """A fresh model of one kind of mixer."""
    config = LanguageModelConfig(vocab_size=LETTERS, d_model=48, pattern="2X", mixers={"X": mixer})
    return LanguageModel(config)


def measured(model, old_test, new_test):
    """Both domains: what was learned, and what was forgotten."""
    return {"bits_new": bits(model, new_test), "bits_old": bits(model, old_test)}


def experiments(seed, small):
    """Every variant of one seed; those that begin alike share their beginning."""
    old, old_test, new, new_test = domains()
    before, after = (8, 4) if small else (200, 60)
    torch.manual_seed(seed)
    base = train(make(Mamba2Config(d_state=16, headdim=16)), old, before, 5e-3)
    yield "before", measured(base, old_test, new_test)
    yield "finetuned", measured(train(copy.deepcopy(base), new, after, 3e-3), old_test, new_test)
    fresh = make(Mamba2Config(d_state=16, headdim=16))
    yield "from scratch", {"bits_new": bits(train(fresh, new, after, 5e-3), new_test)}
    other = train(make(AttentionConfig(n_heads=4)), old, before, 5e-3)
    yield "attention", measured(train(other, new, after, 3e-3), old_test, new_test)
    yield "counts", {"bits_new": counts(new, new_test)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    runs = [
        {"variant": variant, "seed": seed, "metrics": metrics}
        for seed in (0, 1, 2)
        for variant, metrics in experiments(seed, options.small)
    ]
    options.out.write_text(json.dumps(runs))
