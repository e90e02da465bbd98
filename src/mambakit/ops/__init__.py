"""Operators: functions on tensors, each with one contract and several interchangeable implementations.

This is the only place that knows about backends. `ops.backend("reference")` forces one inside a `with` block,
`ops.explain("ssd", ...)` says which would run and why.
"""

from mambakit.ops.dispatch import backend, explain
from mambakit.ops.linear_scan import linear_scan
from mambakit.ops.selective_scan import selective_scan
from mambakit.ops.ssd import ssd

__all__ = ["backend", "explain", "linear_scan", "selective_scan", "ssd"]
