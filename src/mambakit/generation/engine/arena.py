"""One stretch of memory for all weights, on huge pages where the system has them.

Reading weights is what decoding costs, and with pages of 4 KB a core waits for page tables: huge pages read
30 to 40% faster. PyTorch's allocator does not ask for them, hence memory of our own. What is not written to
costs nothing, so an arena may be made larger than needed.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


class Arena:
    """Memory that is handed out piece by piece, never taken back, and freed with the last tensor that views
    it.

    Args:
        capacity: Bytes that can be handed out, alignment included.
    """

    def __init__(self, capacity: int) -> None:
        self._memory = _map(capacity + _HUGE_PAGE)
        # Only whole huge pages become huge.
        self._begin = -self._memory.data_ptr() % _HUGE_PAGE
        self._taken = 0
        self._capacity = capacity

    def take(self, size: int) -> Tensor:
        """Hand out bytes.

        Args:
            size: How many.

        Returns:
            A uint8 tensor `(size,)` of zeros, its address a multiple of 64.
        """
        begin = -(-self._taken // ALIGNMENT) * ALIGNMENT
        assert begin + size <= self._capacity, "the arena was made for fewer bytes"
        self._taken = begin + size
        return self._memory[self._begin + begin :][:size]

    @property
    def taken(self) -> int:
        """Bytes handed out so far."""
        return self._taken


def _map(size: int) -> Tensor:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(size, dtype=torch.uint8)
    # Shared memory, the default, has other rules for huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: the same memory, in small pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
