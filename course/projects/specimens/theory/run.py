"""Ranks below the diagonal of the matrices of sums and of chains of state space models."""

import argparse
import json
from pathlib import Path

import torch

N, M, LENGTH = 2, 3, 24
VARIANTS = ("sum", "chain", "no state", "attention")


def system(states, rng):
    """The matrix of a random time-varying diagonal system, (LENGTH, LENGTH)."""
    decays = 0.5 + 0.45 * torch.rand(LENGTH, states, generator=rng, dtype=torch.float64)
    B, C = torch.randn(2, LENGTH, states, generator=rng, dtype=torch.float64)
    columns = []
    for s in range(LENGTH):
        h, column = torch.zeros(states, dtype=torch.float64), []
        for t in range(LENGTH):
            h = decays[t] * h + (B[t] if t == s else 0)
            column.append(C[t] @ h)
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=1)


def matrix(variant, rng):
    """A causal sequence map as a matrix."""
    if variant == "sum":
        return system(N, rng) + system(M, rng)
    if variant == "chain":
        return system(M, rng) @ system(N, rng)
    if variant == "no state":
        return torch.diag(torch.randn(LENGTH, generator=rng, dtype=torch.float64))
    q, k = torch.randn(2, LENGTH, N + M, generator=rng, dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return (q @ k.T).masked_fill(mask, -torch.inf).softmax(-1)


def experiment(variant, seed, small):
    """The largest rank below the diagonal over many draws, and how often it is above N + M."""
    rng = torch.Generator().manual_seed(seed)
    ranks = []
    for _ in range(3 if small else 20):
        T = matrix(variant, rng)
        blocks = [torch.linalg.matrix_rank(T[t:, :t], rtol=1e-10).item() for t in range(1, LENGTH)]
        ranks.append(max(blocks))
    return {"largest_rank": max(ranks), "violations": sum(rank > N + M for rank in ranks)}


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
