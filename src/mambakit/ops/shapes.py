"""Shape checks at the operators' door.

A specification is a string of letters, one per dimension, in the library's fixed alphabet (`b` batch, `l`
length, `d` channels, `n` state, `h` heads, ...). The first tensor that shows a letter binds it; every later
tensor must agree. One call at the top of an operator replaces a page of assertions and yields the sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(op: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check tensors against their letters and return the size of each letter.

    Args:
        op: Name of the operator, for the message.
        **tensors: `name=(tensor, "b l d")`. A missing tensor (`None`) is skipped. A trailing `...` stands
            for any further dimensions.

    Returns:
        The size bound to each letter.

    Raises:
        ValueError: A tensor has another number of dimensions or another size than the letters bound so far,
            or the length `l` is zero. The message shows the shape and what was expected.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, spec) in tensors.items():
        if tensor is None:
            continue
        letters = spec.split()
        shape = tensor.shape
        if letters[-1] == "...":
            letters = letters[:-1]
            fits = len(shape) >= len(letters)
        else:
            fits = len(shape) == len(letters)
        if not fits:
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected ({', '.join(spec.split())})")
        for letter, size in zip(letters, shape, strict=False):
            known = sizes.setdefault(letter, size)
            owner.setdefault(letter, name)
            if known != size:
                expected = ", ".join(f"{k}={sizes[k]}" if k in sizes else k for k in spec.split())
                raise ValueError(
                    f"{op}: {name} has shape {tuple(shape)}, expected ({expected}); "
                    f"{owner[letter]} set {letter}={known}"
                )
    if sizes.get("l") == 0:
        raise ValueError(f"{op}: the sequence is empty (length 0), expected at least one token")
    return sizes


def same_document(seq_idx: Tensor) -> Tensor:
    """Tell for every token whether it continues the document of the token before it.

    Args:
        seq_idx: Document number of each token, shape `(b, l)`, any integer type.

    Returns:
        Boolean `(b, l)`. The first token of a row counts as continuing: the initial state belongs to the
        row's first document.
    """
    keep = seq_idx.new_ones(seq_idx.shape, dtype=torch.bool)
    keep[:, 1:] = seq_idx[:, 1:] == seq_idx[:, :-1]
    return keep
