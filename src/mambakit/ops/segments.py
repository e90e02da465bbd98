"""Splitting time over a GPU: into how many segments a sequence is cut when its rows and channels fill no
GPU.
"""

from __future__ import annotations

import dataclasses

LEAST_TOKENS = 256
"""Tokens below which a segment is not worth a summary of its own."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a block takes for a token when `k` share a multiprocessor: `alone + k each`, in any unit.

    Blocks that mostly wait hide behind each other (`alone`), those that compute stand in line (`each`).
    """

    alone: float
    each: float

    def rounds(self, k: int, most: int) -> float:
        """Time per token of `k` blocks on a multiprocessor that holds `most` at once."""
        full, rest = divmod(k, most)
        return full * (self.alone + most * self.each) + (self.alone + rest * self.each if rest else 0.0)


def division(
    length: int,
    tile: int,
    blocks: int,
    processors: int,
    most: int,
    work: Pace = Pace(1.0, 0.0),
    summary: Pace = Pace(0.1, 0.0),
) -> tuple[int, int]:
    """Cut a sequence so that its blocks are done soonest.

    Args:
        length: Tokens.
        tile: A segment is a multiple of this many tokens.
        blocks: Blocks of threads there are without cutting.
        processors: Multiprocessors of the GPU.
        most: Blocks that one of them holds at once.
        work: Of a block on its segment.
        summary: Of a block that summarises its segment, which comes before; the last segment needs none.

    Returns:
        Tokens of a segment, and the number of segments.
    """

    def cost(segments: int) -> float:
        k, summarised = (-(-blocks * n // processors) for n in (segments, segments - 1))
        return (work.rounds(k, most) + summary.rounds(summarised, most)) / segments

    most_segments = max(1, min(-(-processors * most // blocks), length // max(LEAST_TOKENS, tile)))
    wanted = min(range(1, most_segments + 1), key=cost)
    segment = -(-length // wanted // tile) * tile
    return segment, -(-length // segment)
