"""Selective copying: remember the few tokens that matter, whatever lies between them.

Mamba (arXiv 2312.00752, sec. 4.1.1 and app. E.1). The tokens to copy lie at random places in a long string of
noise, so a model has to choose by content what to keep; a time-invariant model can only choose by position.
The paper's own generator is not public. This is the one of the S4 repository, `torch_copying_data(L, M, A,
variable=True)`, at the paper's sizes:

    read    0 0 5 0 9 0 0 2 0 0 15 15 15      noise 0, data 1..A-2, markers A-1
    say     . . . . . . . . . .  5  9  2      L + M places, then M markers, the answers at the markers

With A = 16 there are therefore 14 data symbols.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mambakit.data.samples import IGNORED, Samples, Stream, below, subsets
from mambakit.data.synthetic.generated import SyntheticConfig, require

_NOISE = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig(SyntheticConfig, tag="selective-copying"):
    """Selective copying with the settings of Mamba's table 1.

    Attributes:
        length: Noise tokens L; a sample has L + 2 M tokens.
        n_data: Data tokens to copy, M.
        vocab_size: Token values A: noise, A - 2 data symbols, marker.
        evaluation_lengths: Values of L to test at.
        evaluation_samples: Samples per evaluation.
    """

    length: int = 4096
    n_data: int = 16
    vocab_size: int = 16
    evaluation_lengths: tuple[int, ...] = (8192,)
    evaluation_samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, length=0, n_data=1, vocab_size=3, evaluation_lengths=0)

    @property
    def chance(self) -> float:
        """One of the data symbols, at random."""
        return 1 / (self.vocab_size - 2)

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples; see `SyntheticConfig.draw`."""
        m = self.n_data
        words = stream.words(indices, 2 * m)
        data = 1 + below(words[:, :m], self.vocab_size - 2)
        places = np.sort(subsets(words[:, m:], self.length + m), axis=1)
        tokens = np.full((len(indices), self.length + 2 * m), _NOISE, dtype=np.int64)
        np.put_along_axis(tokens, places, data, axis=1)
        tokens[:, -m:] = self.vocab_size - 1
        labels = np.full_like(tokens, IGNORED)
        labels[:, -m:] = data
        return tokens, labels

    def evaluations(self) -> dict[str, Samples]:
        """The same task in more (or less) noise, `"length_8192"` and so on."""
        return {
            f"length_{length}": self._evaluation(dataclasses.replace(self, length=length))
            for length in self.evaluation_lengths
        }
