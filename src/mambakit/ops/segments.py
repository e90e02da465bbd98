"""Splitting time over a GPU: into how many segments a sequence is cut when its rows and channels fill no
GPU.
"""

from __future__ import annotations

import math

LEAST_TOKENS = 256
"""Tokens below which a segment is not worth a summary of its own."""


def division(length: int, tile: int, blocks: int, slots: int) -> tuple[int, int]:
    """Cut a sequence so that its blocks fill a GPU in as few rounds as possible.

    Args:
        length: Tokens.
        tile: A segment is a multiple of this many tokens.
        blocks: Blocks of threads there are without cutting.
        slots: Blocks that run at once.

    Returns:
        Tokens of a segment, and the number of segments.
    """
    most = max(1, min(-(-slots // blocks), length // max(LEAST_TOKENS, tile)))
    # Rounds for the whole sequence; a summary of each segment costs about a tenth.
    cost = {s: math.ceil(blocks * s / slots) / s * (1.1 if s > 1 else 1.0) for s in range(1, most + 1)}
    wanted = min(cost, key=cost.get)
    segment = -(-length // wanted // tile) * tile
    return segment, -(-length // segment)
