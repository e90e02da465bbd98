"""Packed documents: from `cu_seqlens`, where each begins, to `seq_idx`, the number of each token's."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_idx_of(cu_seqlens: Tensor, batch: int, length: int, function: str) -> Tensor:
    """Number the tokens of a row by their document.

    Args:
        cu_seqlens: First token of each document, and the number of tokens `(documents + 1,)`.
        batch: Rows there are.
        length: Tokens there are.
        function: Who asks, for the message.

    Returns:
        Document numbers `(1, l)`, int32.

    Raises:
        ValueError: Several rows, or documents that are not these tokens.
    """
    if batch != 1:
        raise ValueError(
            f"{function}: cu_seqlens is for one row of packed documents, not for a batch of {batch}"
        )
    lengths = cu_seqlens.diff().long()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((lengths < 0).any()):
        raise ValueError(
            f"{function}: cu_seqlens is {cu_seqlens.tolist()}, expected numbers that rise from 0 to the "
            f"{length} tokens"
        )
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    return numbers.repeat_interleave(lengths, output_size=length).unsqueeze(0)


def check_same_documents(seq_idx: Tensor, numbers: Tensor, function: str) -> None:
    """Refuse a `seq_idx` whose documents begin elsewhere than those of `cu_seqlens`.

    Raises:
        ValueError: They differ.
    """
    if seq_idx.shape != numbers.shape or not torch.equal(seq_idx.diff(dim=1) != 0, numbers.diff(dim=1) != 0):
        raise ValueError(f"{function}: seq_idx and cu_seqlens say differently where documents begin")
