"""Triton kernels of cross entropy: a program owns a row and reads it once.

The maximum and the sum of exponentials are found together: when a larger number turns up, the sum so far is
rescaled. The backward pass needs only the logarithm of that sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(logits, labels, nats, best, log_sums, stride, v, BLOCK: tl.constexpr):
    """Nats, best column and log-sum of a row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    e = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    where = tl.full((), 0, tl.int32)
    for begin in range(0, v, BLOCK):
        x = tl.load(logits + begin + e, mask=begin + e < v, other=float("-inf")).to(tl.float32)
        block_top, block_where = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(block_top > top, begin + block_where, where)
        new_top = tl.maximum(top, block_top)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        top = new_top
    log_sum = top + tl.log(total)
    counts = label != -100
    inside = (label >= 0) & (label < v)
    wanted = tl.load(logits + label, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(nats + row, tl.where(counts, log_sum - wanted, 0.0))
    tl.store(best + row, where.to(tl.int64))
    tl.store(log_sums + row, log_sum)


@triton.jit
def backward(logits, labels, log_sums, dnats, dlogits, stride, v, BLOCK: tl.constexpr):
    """`(softmax - one_hot(label)) dnats` for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    scale = tl.where(label == -100, 0.0, tl.load(dnats + row))
    x = tl.load(logits + row * stride + column, mask=column < v, other=float("-inf")).to(tl.float32)
    found = tl.exp(x - tl.load(log_sums + row)) - tl.where(column == label, 1.0, 0.0)
    found = tl.where(label == -100, 0.0, found * scale)
    tl.store(dlogits + row * v + column, found.to(dlogits.dtype.element_ty), mask=column < v)
