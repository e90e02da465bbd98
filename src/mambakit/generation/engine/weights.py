"""The four forms in which the engine keeps a linear layer's weights, and how they lie in memory.

    float32   as they are
    bfloat16  rounded; computed with in float32
    int8      128 + integers in [-127, 127], one scale per row
    int4      8 + integers in [-8, 7], one bfloat16 scale per row and 64 columns

`panels.h` describes the layout that `pack` writes. Against integers the engine rounds its activations as well, to
[-127, 127] for every token and 64 columns; products and sums are then integers, and exact.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Literal["float32", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)

PANEL = 32
"""Rows of a panel."""
GROUP = 64
"""Columns with a scale of their own."""

# int4: the largest number becomes -8 at the first of these factors. With a smaller scale it is cut off, and all others
# are rounded more finely; the best in the mean square is taken, group by group.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


def packed_size(rows: int, columns: int, form: Form) -> int:
    """Bytes that `pack` writes for a matrix."""
    panels, groups = -(-rows // PANEL), -(-columns // GROUP)
    of_a_panel = {
        "float32": 4 * PANEL * columns,
        "bfloat16": 4 * PANEL * -(-columns // 2),
        "int8": 4 * PANEL + PANEL * GROUP * groups,
        "int4": (2 * PANEL + PANEL * GROUP // 2) * groups,
    }
    return panels * of_a_panel[form]


def pack(weight: Tensor, form: Form, into: Tensor) -> None:
    """Write a matrix as panels.

    Args:
        weight: `(rows, columns)`.
        form: How to keep it.
        into: Bytes `(packed_size(rows, columns, form),)`, uint8.
    """
    weight = _padded(weight.detach().float(), PANEL, {"float32": 1, "bfloat16": 2}.get(form, GROUP))
    panels = weight.shape[0] // PANEL
    if form == "float32":
        view = into.view(torch.float32).view(panels, -1, PANEL)  # (panel, column, row)
        view.copy_(weight.view(panels, PANEL, -1).transpose(1, 2))
    elif form == "bfloat16":
        pairs = weight.bfloat16().view(panels, PANEL, -1, 2)  # (panel, row, pair, of the pair)
        into.view(torch.bfloat16).view(panels, -1, PANEL, 2).copy_(pairs.transpose(1, 2))
    elif form == "int8":
        numbers, scales = _int8(weight)
        into = into.view(panels, -1)
        into[:, : 4 * PANEL].view(torch.float32).copy_(scales.view(panels, PANEL))
        fours = (numbers + 128).to(torch.uint8).view(panels, PANEL, -1, 4)
        into[:, 4 * PANEL :].view(panels, -1, PANEL, 4).copy_(fours.transpose(1, 2))
    else:
        numbers, scales = _int4(weight)  # (rows, groups, 64), (rows, groups)
        into = into.view(panels, scales.shape[1], -1)
        into[..., : 2 * PANEL].view(torch.bfloat16).copy_(
            scales.bfloat16().view(panels, PANEL, -1).transpose(1, 2)
        )
        halves = (numbers + 8).to(torch.uint8).view(panels, PANEL, -1, 2, GROUP // 8, 4)
        both = halves[:, :, :, 0] | halves[:, :, :, 1] << 4  # (panel, row, group, word, byte)
        words = into[..., 2 * PANEL :].view(panels, -1, GROUP // 8, PANEL, 4)
        words.copy_(both.permute(0, 2, 3, 1, 4))


def rounded(weight: Tensor, form: Form) -> Tensor:
    """The weights that the engine computes with, for one who wants to compute with the same.

    Args:
        weight: `(rows, columns)`.
        form: How the engine keeps it.

    Returns:
        The numbers `(rows, columns)` that the form can hold, float32.
    """
    rows, columns = weight.shape
    weight = weight.detach().float()
    if form == "float32":
        return weight
    if form == "bfloat16":
        return weight.bfloat16().float()
    if form == "int8":
        numbers, scales = _int8(weight)
        return numbers * scales[:, None]
    numbers, scales = _int4(_padded(weight, 1, GROUP))
    return (numbers * scales[..., None]).flatten(1)[:rows, :columns]


def rounded_activations(x: Tensor) -> Tensor:
    """The activations that a product with integers sees: integers times a scale per token and 64 channels.

    Args:
        x: `(..., d)`.

    Returns:
        The same, rounded.
    """
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127 / most, 0)
    return ((groups * inverse).round() * (most / 127)).flatten(-2)[..., : x.shape[-1]]


def _padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers as floats `(rows, columns)` and a scale per row."""
    scales = weight.abs().amax(1) / 127
    return _divided(weight, scales[:, None]).clamp(-127, 127), scales


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers as floats `(rows, groups, 64)` and a scale `(rows, groups)`, a bfloat16 number."""
    groups = weight.unflatten(1, (-1, GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, numbers, scales = None, torch.empty_like(groups), torch.empty_like(extreme)
    for shrink in _SHRINK:
        tried = (extreme * (shrink / -8)).bfloat16().float()
        found = _divided(groups, tried).clamp(-8, 7)
        error = (found * tried - groups).square().sum(-1, keepdim=True)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        numbers, scales = torch.where(better, found, numbers), torch.where(better, tried, scales)
    return numbers, scales.squeeze(-1)


def _divided(weight: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales != 0, weight / scales, 0).round()
