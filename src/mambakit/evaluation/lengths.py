"""Loss by position: what longer contexts do to a model.

A model that uses its context is less surprised at position 8,192 than at position 100; one that was only ever
trained on 2,048 tokens may fall apart behind them. The curve is the mean surprise over positions 1, 2-3, 4-7,
... of passages as long as asked, each read from its beginning with its state carried.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.evaluation.perplexity import CHUNK, token_nats
from mambakit.models import LanguageModel


def length_curve(
    model: LanguageModel, ids: Tensor, length: int, *, passages: int = 16, batch: int = 4, chunk: int = CHUNK
) -> list[dict[str, Any]]:
    """Measure the surprise of tokens by how many stand before them.

    Args:
        model: A language model, in evaluation mode.
        ids: Token ids of a text `(n,)`, longer than `length`.
        length: Tokens judged in a passage.
        passages: Passages at most, spread evenly over the text; fewer where it is short.
        batch: Passages read at once.
        chunk: Tokens read at once of each.

    Returns:
        A row for every range of positions `[from, to)`, which double: `from`, `to`, `tokens`, `loss` in nats
        per token, `perplexity`; and `perplexity_so_far` of a passage cut at `to`.

    Raises:
        ValueError: The text is shorter than one passage.
    """
    if len(ids) <= length:
        raise ValueError(f"length is {length}, expected less than the {len(ids)} tokens of the text")
    count = min(passages, max(1, (len(ids) - 1) // length))
    starts = [round(i * (len(ids) - 1 - length) / max(count - 1, 1)) for i in range(count)]
    total = torch.zeros(length, dtype=torch.float64)
    for first in range(0, count, batch):
        rows = torch.stack([ids[start : start + length + 1] for start in starts[first : first + batch]])
        nats = torch.cat([part.cpu() for part in token_nats(model, rows, chunk)], dim=1)
        total += nats.sum(0, dtype=torch.float64)
    return _rows(total / count, count)


def draw(curve: list[dict[str, Any]], picture: Path, title: str, trained: int | None = None) -> None:
    """Draw a curve into a PNG.

    Args:
        curve: From `length_curve`.
        picture: The file to write.
        title: Shown on top.
        trained: Tokens of a training window, marked by a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    middles = [math.sqrt(row["from"] * (row["to"] - 1)) for row in curve]
    axis.plot(middles, [row["perplexity"] for row in curve], "o-", label="at this position")
    axis.plot(
        [row["to"] - 1 for row in curve],
        [row["perplexity_so_far"] for row in curve],
        "s--",
        label="of a passage of this length",
    )
    if trained is not None:
        axis.axvline(trained, color="tab:gray", linestyle=":", label=f"training windows: {trained:,}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("perplexity per token")
    axis.set_title(title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=120, format="png")


def _rows(nats: Tensor, passages: int) -> list[dict[str, Any]]:
    """Ranges of positions counted from 1: [1, 2), [2, 4), [4, 8), ..."""
    rows, first = [], 1
    while first <= len(nats):
        end = min(2 * first, len(nats) + 1)
        loss, so_far = float(nats[first - 1 : end - 1].mean()), float(nats[: end - 1].mean())
        rows.append(
            {
                "from": first,
                "to": end,
                "tokens": (end - first) * passages,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "perplexity_so_far": math.exp(min(so_far, 700.0)),
            }
        )
        first = end
    return rows
