"""The four forms in which the engine keeps a linear layer's weights, and how they lie in memory.

    float32   as they are
    bfloat16  rounded; computed with in float32
    int8      128 + integers in [-127, 127], one scale per row
    int4      8 + integers in [-8, 7], one bfloat16 scale per row and 64 columns

`panels.h` describes the layout that `pack` writes. Against integers the engine rounds its activations as
well, to [-127, 127] for every token and 64 columns; products and sums are then integers, and exact.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mambakit.ops import native

Form = Literal["float32", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)

PANEL = 32
"""Rows of a panel."""
GROUP = 64
"""Columns with a scale of their own."""

_pack = native.Kernel("decode_pack", "7q")


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
    """Round a matrix and write it as panels.

    Args:
        weight: `(rows, columns)`, float32 or bfloat16.
        form: How to keep it.
        into: Bytes `(packed_size(rows, columns, form),)`, uint8.
    """
    weight = weight.detach().contiguous()
    is_bf16 = weight.dtype == torch.bfloat16
    sizes = (*weight.shape, FORMS.index(form))
    _pack(weight.data_ptr(), is_bf16, *sizes, into.data_ptr(), torch.get_num_threads())


def unpack(panels: Tensor, rows: int, columns: int, form: Form) -> Tensor:
    """Read a matrix back from its panels.

    Args:
        panels: Bytes as `pack` writes them.
        rows: The matrix's rows.
        columns: Its columns.
        form: How it is kept.

    Returns:
        The numbers that the engine computes with `(rows, columns)`, float32.
    """
    panels = panels.view(-(-rows // PANEL), -1)
    if form == "float32":
        whole = panels.view(torch.float32).unflatten(1, (-1, PANEL)).transpose(1, 2)
    elif form == "bfloat16":
        whole = panels.view(torch.bfloat16).unflatten(1, (-1, PANEL, 2)).transpose(1, 2).flatten(2)
    elif form == "int8":
        scales = panels[:, : 4 * PANEL].view(torch.float32)
        fours = panels[:, 4 * PANEL :].unflatten(1, (-1, PANEL, 4)).transpose(1, 2).flatten(2)
        whole = (fours.float() - 128) * scales[..., None]
    else:
        groups = panels.unflatten(1, (-(-columns // GROUP), -1))  # (panel, group, byte)
        scales = groups[..., : 2 * PANEL].contiguous().view(torch.bfloat16).transpose(1, 2)
        words = groups[..., 2 * PANEL :].unflatten(2, (-1, PANEL, 4)).permute(0, 3, 1, 2, 4).flatten(3)
        numbers = torch.cat([words & 15, words >> 4], -1).float() - 8  # (panel, row, group, column)
        whole = (numbers * scales[..., None]).flatten(2)
    return whole.float().flatten(0, 1)[:rows, :columns]


def rounded(weight: Tensor, form: Form) -> Tensor:
    """The weights that the engine computes with, for one who wants to compute with the same.

    Args:
        weight: `(rows, columns)`, float32 or bfloat16.
        form: How the engine keeps it.

    Returns:
        The numbers that the form can hold `(rows, columns)`, float32.
    """
    into = torch.zeros(packed_size(*weight.shape, form), dtype=torch.uint8)
    pack(weight, form, into)
    return unpack(into, *weight.shape, form)


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
