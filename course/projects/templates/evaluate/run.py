"""FILL IN: what is measured."""

import argparse
import json
from pathlib import Path

import torch

VARIANTS = ("mamba1", "mamba2", "s4d", "attention", "guess")


def experiment(variant, seed, small):
    """One variant with one seed; small takes seconds. FILL IN.

    Compare at equal cost, and say at which.
    """
    torch.manual_seed(seed)
    return {"accuracy": 0.0, "parameters": 0.0}


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
