"""Parity: is the number of ones odd? One bit of state, flipped by every one.

The smallest state-tracking task. A linear recurrence whose eigenvalues are positive, such as Mamba's and
Mamba-2's, cannot do it at all lengths; negative eigenvalues (Grazzi et al., arXiv 2411.12537) or rotations
(Mamba-3, arXiv 2603.15569) can.

    read    1 2 2 1 2 0 0      0 fills up, 1 is zero, 2 is one
    say     . . . . 2 . .      here: odd, the answer in the same two symbols
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from mambakit.config import unknown
from mambakit.data.samples import IGNORED, Stream, below
from mambakit.data.synthetic.generated import StateTrackingConfig

_FILL, _ZERO = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityConfig(StateTrackingConfig, tag="parity"):
    """Parity of random bits, by the protocol in `StateTrackingConfig`.

    Attributes:
        labels: What training asks for. `"last"`: the parity of all bits at the last one, as the papers do;
            `"every"`: at every bit the parity so far, which is much easier to learn. Validation and tests
            always ask for the last.
        min_length: Fewest bits.
        max_lengths: Most bits, for each stage of training.
        stage_samples: Samples per stage.
        evaluation_lengths: Numbers of bits to test at.
        evaluation_samples: Samples per evaluation.
    """

    labels: Literal["last", "every"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in ("last", "every"):
            raise ValueError(unknown("labels", self.labels, ("last", "every")))

    @property
    def vocab_size(self) -> int:
        """Filler, zero, one."""
        return 3

    @property
    def chance(self) -> float:
        """Odd or even."""
        return 0.5

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples; see `SyntheticConfig.draw`."""
        width = int(self.longest(indices).max())
        words = stream.words(indices, 1 + width)
        lengths = self.lengths(words[:, 0], indices)[:, None]
        bits = below(words[:, 1:], 2)
        place = np.arange(width)
        read = place < lengths
        asked = read if self.labels == "every" and stream.split == "train" else place == lengths - 1
        tokens = np.where(read, _ZERO + bits, _FILL)
        return tokens, np.where(asked, _ZERO + bits.cumsum(axis=1) % 2, IGNORED)
