"""FILL IN: what is measured."""

import argparse
import json
from pathlib import Path

import torch

VARIANTS = ("mine", "without", "attention", "majority")


def experiment(variant, seed, small):
    """One variant with one seed; small takes seconds. FILL IN.

    Put the mixer into run.py: a MixerConfig called MyConfig and its Mixer, as the guide's page
    on mixers shows.
    """
    torch.manual_seed(seed)
    return {"accuracy": 0.0}


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
