"""Operators: functions on tensors, each with one contract and several interchangeable implementations.

This is the only place that knows about backends. `ops.backend("reference")` forces one inside a `with` block,
`ops.explain("ssd", ...)` says which would run and why.
"""

from mambakit.ops.add_norm import add_norm
from mambakit.ops.attention import KVCache, KVState, attention
from mambakit.ops.causal_conv1d import causal_conv1d
from mambakit.ops.cross_entropy import cross_entropy
from mambakit.ops.dispatch import backend, explain, flop_formulas, reasons
from mambakit.ops.linear_scan import linear_scan
from mambakit.ops.long_conv import fft_conv, s4_conv, s4d_conv
from mambakit.ops.norm import norm
from mambakit.ops.selective_scan import selective_scan
from mambakit.ops.ssd import ssd
from mambakit.ops.trapezoidal import TrapezoidalState, trapezoidal

__all__ = [
    "KVCache",
    "KVState",
    "TrapezoidalState",
    "add_norm",
    "attention",
    "backend",
    "causal_conv1d",
    "cross_entropy",
    "explain",
    "fft_conv",
    "flop_formulas",
    "linear_scan",
    "norm",
    "reasons",
    "s4_conv",
    "s4d_conv",
    "selective_scan",
    "ssd",
    "trapezoidal",
]
