"""Sums of what was measured, kept on the device until somebody needs the numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Sums:
    """Adds up named scalars over batches without waiting for the device.

    The sums are float64: counts stay exact, and a saved and restored sum has the same bits.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._totals: Tensor | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one batch's scalars; the names are the same every time."""
        self._names = self._names or sorted(values)
        stacked = torch.stack([values[name].detach().to(torch.float64) for name in self._names])
        self._totals = stacked if self._totals is None else self._totals + stacked

    def read(self) -> dict[str, float]:
        """Fetch all sums in one transfer; waits for the device."""
        return {} if self._totals is None else dict(zip(self._names, self._totals.tolist(), strict=True))

    def clear(self) -> None:
        """Start from nothing."""
        self._names, self._totals = [], None

    def restore(self, sums: Mapping[str, float], device: torch.device) -> None:
        """Continue from what `read` returned."""
        self.clear()
        if sums:
            self._names = list(sums)
            self._totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
