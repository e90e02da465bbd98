"""Benchmarks: suites over the operators and models of mambakit, beside the peers that are installed.

    python -m benchmarks run operators                       measure; JSON lines in results/DATE-DEVICE
    python -m benchmarks run all --device cuda --budget 900  in bounded time
    python -m benchmarks report                              report.md and plots in the newest of these

Nothing wrong is timed: every variant is first compared with the float64 reference on a small case and with
the plain backend at full size (`mambakit.testing.checks`). A peer that is not installed is listed as missing.
How times are taken: `mambakit.testing.timing`.
"""

import os

# Several implementations bring OpenMP threads of their own: those that wait must sleep and not spin, or they
# take the processor from the one that is being timed. OpenMP reads this when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
