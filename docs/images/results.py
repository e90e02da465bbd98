"""Draw results.png from finished runs: what the README claims, as measured.

mambakit train shakespeare
mambakit train induction-heads
mambakit train induction-heads-attention
python docs/images/results.py runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, SOFT, MAMBA, ATTENTION = "#1b2733", "#5b6b7b", "#2b6cb0", "#d97706"
NANOGPT_CPU = 1.88  # karpathy/nanoGPT, README: its CPU settings, 2,000 steps of 12 x 64 characters


def summary(run: Path) -> dict:
    """Read a finished run's summary."""
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def shakespeare(axes, run: Path) -> None:
    """Validation loss over the characters read, with what there is to beat."""
    result = summary(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens_per_step = result["tokens_seen"] / result["steps"]
    points = [
        (line["step"] * tokens_per_step / 1e6, line["val_loss"]) for line in lines if "val_loss" in line
    ]
    axes.plot(*zip(*points, strict=True), color=MAMBA, marker="o", markersize=4, label="mambakit, Mamba-2")
    for loss, name in (
        (NANOGPT_CPU, "nanoGPT, CPU settings"),
        (result["baseline"]["value"], "order-4 n-gram"),
    ):
        axes.axhline(loss, color=SOFT, linewidth=1, linestyle="--")
        axes.annotate(
            f"{name}, {loss:.2f}", (points[-1][0], loss), ha="right", va="bottom", color=SOFT, fontsize=9
        )
    final = result["metrics"]["val_loss"]
    axes.set_ylim(bottom=final - 0.06)
    axes.annotate(
        f"{final:.3f}", (points[-1][0], final), xytext=(4, -12), textcoords="offset points", color=MAMBA
    )
    minutes, size = result["seconds"] / 60, result["parameters"] / 1e6
    axes.set_title(
        f"Tiny Shakespeare: {size:.2f} M parameters, {minutes:.1f} min, {result['hardware']['cores']} cores"
    )
    axes.set_xlabel("training characters read, millions")
    axes.set_ylabel("validation loss, nats per character")


def induction(axes, mamba: Path, attention: Path) -> None:
    """Accuracy over the length of the test."""
    for run, name, color in ((mamba, "Mamba", MAMBA), (attention, "attention, RoPE", ATTENTION)):
        metrics = summary(run)["metrics"]
        found = {
            int(key.split("_")[-1]): value
            for key, value in metrics.items()
            if key.startswith("accuracy@length_")
        }
        axes.plot(
            sorted(found),
            [100 * found[n] for n in sorted(found)],
            color=color,
            marker="o",
            markersize=4,
            label=name,
        )
    trained = summary(mamba)["config"]["data"]["length"]
    axes.axvline(trained, color=SOFT, linewidth=1, linestyle="--")
    axes.annotate(" trained here", (trained, 50), color=SOFT, fontsize=9)
    chance = 100 * summary(mamba)["chance"]
    axes.axhline(chance, color=SOFT, linewidth=1, linestyle=":")
    axes.annotate(
        "chance", (trained, chance), xytext=(4, 3), textcoords="offset points", color=SOFT, fontsize=9
    )
    axes.set_xscale("log", base=2)
    axes.set_ylim(-3, 103)
    axes.set_title("Induction heads: recall beyond the training length")
    axes.set_xlabel("length of the test, tokens")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)


def main(runs: Path) -> None:
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    shakespeare(left, runs / "shakespeare")
    induction(right, runs / "induction-heads", runs / "induction-heads-attention")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_color(INK)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("results.png"), dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
