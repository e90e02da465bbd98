"""Draw overview.png: a model is a list, a mixer is a file, an operator is a contract.

python docs/images/overview.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, PAPER = "#1b2733", "#5b6b7b", "#ffffff"
MAMBA, MLP, ATTENTION, OPERATOR, PLAIN = "#cfe3f7", "#e4e9ee", "#fbe0c3", "#d5eed9", "#f4f6f8"


def box(axes, x, y, width, height, text, color=PLAIN, size=10.5, weight="normal", family="sans-serif"):
    """Draw a rounded box around its centre, with its text."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color,
            edgecolor=INK,
            linewidth=1.0,
        )
    )
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color=INK,
        weight=weight,
        family=family,
        linespacing=1.35,
    )


def arrow(axes, start, end, color=INK):
    """Draw an arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.1,
            color=color,
            shrinkA=0,
            shrinkB=0,
        )
    )


def heading(axes, title, below):
    """Draw a panel's title and the line under it."""
    axes.text(5, 11.55, title, ha="center", fontsize=13.5, weight="bold", color=INK)
    axes.text(5, 11.0, below, ha="center", fontsize=10.5, color=SOFT)
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 12)
    axes.axis("off")


def model(axes):
    """A stack of residual blocks, and the string that says it."""
    heading(axes, "A model is a list of blocks", 'pattern = "M-M-*-"')
    box(axes, 5, 0.75, 4.6, 0.8, "embedding")
    names = [("M", "Mamba-2", MAMBA), ("-", "gated MLP", MLP)] * 2
    names += [("*", "attention", ATTENTION), ("-", "gated MLP", MLP)]
    y = 2.1
    for letter, name, color in names:
        arrow(axes, (5, y - 0.95), (5, y - 0.42))
        box(axes, 5, y, 4.6, 0.84, name, color)
        axes.text(1.5, y, letter, fontsize=15, family="monospace", ha="center", va="center", color=INK)
        # The residual path around the block.
        axes.plot([5, 7.8, 7.8], [y - 0.74, y - 0.74, y + 0.54], color=SOFT, linewidth=1.1)
        arrow(axes, (7.8, y + 0.54), (5.05, y + 0.54), color=SOFT)
        y += 1.38
    arrow(axes, (5, y - 0.95), (5, y - 0.5))
    axes.text(5, y - 0.28, "next token", ha="center", va="center", fontsize=10.5, color=INK)
    axes.text(
        8.7, 5.6, "x + mixer(norm(x))", rotation=90, ha="center", va="center", fontsize=10.5, color=SOFT
    )


def mixer(axes):
    """The data flow of Mamba-2."""
    heading(axes, "A mixer is one small file", "layers/mamba2.py")
    box(axes, 5, 0.75, 7.4, 0.8, "in_proj")
    arrow(axes, (5, 1.15), (5, 2.05))
    for x, name in ((2.0, "z"), (5.0, "x  B  C"), (8.0, "dt")):
        axes.text(x + 0.18, 1.55, name, fontsize=10.5, color=INK, va="center")
    box(axes, 5, 2.5, 3.4, 0.84, "conv1d, SiLU", MAMBA)
    arrow(axes, (5, 2.95), (5, 4.15))
    axes.plot([8, 8], [1.15, 5.1], color=INK, linewidth=1.1)
    arrow(axes, (8, 5.1), (7.1, 5.1))
    box(
        axes,
        5,
        5.1,
        4.2,
        1.9,
        "ops.ssd\n$h_t = e^{\\Delta_t A}\\,h_{t-1} + \\Delta_t\\,B_t\\,x_t$\n$y_t = C_t\\,h_t$",
        OPERATOR,
    )
    arrow(axes, (5, 6.05), (5, 7.25))
    axes.plot([2, 2], [1.15, 7.67], color=INK, linewidth=1.1)
    arrow(axes, (2, 7.67), (3.3, 7.67))
    box(axes, 5, 7.67, 3.4, 0.84, "norm(y · SiLU(z))", MAMBA)
    arrow(axes, (5, 8.09), (5, 9.3))
    box(axes, 5, 9.7, 7.4, 0.8, "out_proj")


def operator(axes):
    """One contract, several implementations."""
    heading(axes, "An operator is one contract", "ops/ssd/")
    box(
        axes,
        5,
        9.45,
        9.2,
        1.3,
        "y, state = ssd(x, dt, A, B, C,\ninitial_state, seq_idx, ...)",
        OPERATOR,
        family="monospace",
    )
    for x, name, words in (
        (2.6, "reference", "token by token,\nthe specification"),
        (7.4, "chunked", "in parallel,\nlinear memory"),
    ):
        arrow(axes, (5, 8.8), (x, 7.95))
        box(axes, x, 7.15, 4.3, 1.6, f"{name}\n{words}", PLAIN)
    axes.text(5, 5.65, "one forward for everything", ha="center", fontsize=10.5, color=SOFT)
    rows = (
        ("train", "the whole sequence at once"),
        ("prefill", "a long prompt, piece by piece"),
        ("decode", "token by token, constant memory"),
    )
    for number, (name, words) in enumerate(rows):
        y = 4.8 - 1.2 * number
        box(axes, 1.9, y, 3.0, 0.84, name, MAMBA)
        axes.text(3.8, y, words, fontsize=10.5, va="center", color=INK)
    axes.text(
        5,
        0.45,
        "The state is a tensor in your hands:\nclone, select, save.",
        ha="center",
        fontsize=10.5,
        color=SOFT,
    )


def main() -> None:
    """Draw the three panels side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.6), facecolor=PAPER)
    for draw, panel in zip((model, mixer, operator), axes, strict=True):
        draw(panel)
    figure.tight_layout(pad=0.6, w_pad=1.5)
    figure.savefig(Path(__file__).with_name("overview.png"), dpi=130, facecolor=PAPER)


if __name__ == "__main__":
    main()
