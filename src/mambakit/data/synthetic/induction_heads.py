"""Induction heads: what came after this token last time?

Olsson et al., "In-context learning and induction heads" (2022), in the form of Mamba (arXiv 2312.00752,
sec. 4.1.2 and app. E.1). A special token occurs once at a random place, followed by the answer, and once more
at the end, where the answer has to be said:

    read    3 7 S 4 0 11 7 2 S
    say     . . . . . .  . . 4

Mamba trains at length 256 and is tested at 2^6 to 2^20.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mambakit.data.samples import IGNORED, Samples, Stream, below
from mambakit.data.synthetic.generated import SyntheticConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeadsConfig(SyntheticConfig, tag="induction-heads"):
    """Induction heads with the settings of Mamba's table 2.

    Attributes:
        length: Tokens per sample, l.
        vocab_size: Token values; the last one is the special token.
        evaluation_lengths: Lengths to test at.
        evaluation_samples: Samples per evaluation.
    """

    length: int = 256
    vocab_size: int = 16
    evaluation_lengths: tuple[int, ...] = tuple(2**k for k in range(6, 21))
    evaluation_samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, length=3, vocab_size=2, evaluation_lengths=3)

    @property
    def chance(self) -> float:
        """One of the ordinary tokens, at random."""
        return 1 / (self.vocab_size - 1)

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples; see `SyntheticConfig.draw`."""
        words = stream.words(indices, 1 + self.length)
        special = self.vocab_size - 1
        tokens = below(words[:, 1:], special)
        rows = np.arange(len(indices))
        # Special token, answer and final special token need three places, so it comes at l - 3 at the latest.
        place = below(words[:, 0], self.length - 2)
        tokens[rows, place] = special
        tokens[:, -1] = special
        labels = np.full_like(tokens, IGNORED)
        labels[:, -1] = tokens[rows, place + 1]
        return tokens, labels

    def evaluations(self) -> dict[str, Samples]:
        """The same task at other lengths, `"length_512"` and so on."""
        return {
            f"length_{length}": self._evaluation(dataclasses.replace(self, length=length))
            for length in self.evaluation_lengths
        }
