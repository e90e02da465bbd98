"""MQAR, multi-query associative recall: look up many keys in a list read before.

Arora, Eyuboglu et al., "Zoology: measuring and improving recall in efficient language models" (ICLR 2024,
arXiv 2312.04927). The sample opens with K pairs of key and value. Then every key comes once more, and there
its value has to be said:

    read    2 8 4 7 0 0 4 0 0 0 0 0 2 0 0 0
    say     . . . . . . 7 . . . . . 8 . . .

A repeated key stands two tokens after the pairs, or four, or six, ...; which of these gaps is drawn without
replacement from the power law p(i) ~ i^(a-1), as repetitions in real text are. Induction heads ask for one
pair; here the state has to hold them all, so accuracy follows the size of the state.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mambakit.data.config import Baseline
from mambakit.data.samples import IGNORED, Epochs, Samples, Stream, below, shuffle, subsets, uniform
from mambakit.data.synthetic.generated import Generated, SyntheticConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqarConfig(SyntheticConfig, tag="mqar"):
    """MQAR with the settings of Zoology's figure 2 at its shortest length.

    The other points of that figure are (length, n_pairs) = (128, 8), (256, 16) and (512, 64). Mamba-2 (arXiv
    2405.21060, sec. 9.1) uses lengths 256 to 1024 with up to length / 4 pairs and random tokens in the gaps.

    Attributes:
        length: Tokens per sample, l, even and at least 4 n_pairs.
        n_pairs: Pairs of key and value, K.
        vocab_size: Token values: 0 fills, 1 to v/2 - 1 are keys, v/2 to v - 1 are values.
        power: Exponent a of the power law of gaps; 1 makes it uniform, small values prefer short gaps.
        random_non_queries: Fill the gaps with random tokens instead of zeros; harder.
        examples: Number of training samples, read again every epoch; None makes fresh ones for ever.
        evaluation_settings: Pairs (length, n_pairs) to test at.
        evaluation_samples: Samples per evaluation.
    """

    length: int = 64
    n_pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01
    random_non_queries: bool = False
    examples: int | None = 100_000
    evaluation_settings: tuple[tuple[int, int], ...] = ()
    evaluation_samples: int = 3_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, n_pairs=1, vocab_size=4)
        for length, n_pairs in ((self.length, self.n_pairs), *self.evaluation_settings):
            if length % 2 or length < 4 * n_pairs:
                raise ValueError(f"length is {length}, expected an even number, at least 4 * {n_pairs} pairs")
            if n_pairs >= self.vocab_size // 2:
                raise ValueError(
                    f"n_pairs is {n_pairs}, expected less than half of the {self.vocab_size} token values"
                )
        if self.power <= 0:
            raise ValueError(f"power is {self.power}, expected more than 0")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples is {self.examples}, expected at least 1, or null for fresh ones")

    @property
    def chance(self) -> float:
        """One of all values, at random."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @property
    def baseline(self) -> Baseline:
        """One of the values that were read, at random."""
        return Baseline("a value of the sample at random", "accuracy", 1 / self.n_pairs)

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples; see `SyntheticConfig.draw`."""
        k, border, middle = self.n_pairs, 2 * self.n_pairs, self.vocab_size // 2
        space = (self.length - border) // 2
        words = stream.words(indices, 4 * k + space + self.random_non_queries * self.length)
        keys = 1 + shuffle(words[:, k : 2 * k], subsets(words[:, :k], middle - 1))
        values = middle + shuffle(
            words[:, 3 * k : 4 * k], subsets(words[:, 2 * k : 3 * k], self.vocab_size - middle)
        )
        queries = border + 2 * self._gaps(words[:, 4 * k : 4 * k + space])
        if self.random_non_queries:
            tokens = below(words[:, 4 * k + space :], self.vocab_size)
        else:
            tokens = np.zeros((len(indices), self.length), dtype=np.int64)
        tokens[:, 0:border:2] = keys
        tokens[:, 1:border:2] = values
        np.put_along_axis(tokens, queries, keys, axis=1)
        labels = np.full_like(tokens, IGNORED)
        np.put_along_axis(labels, queries, values, axis=1)
        return tokens, labels

    def _gaps(self, words: np.ndarray) -> np.ndarray:
        """Draw K different gaps from the power law, one after the other, for each row of words (b, space).

        The K smallest of exponential variables with rates p are such draws in their order (Efraimidis and
        Spirakis, "Weighted random sampling with a reservoir", 2006).
        """
        rates = np.arange(1, words.shape[1] + 1) ** (self.power - 1.0)
        return np.argsort(-np.log1p(-uniform(words)) / rates, axis=1, kind="stable")[:, : self.n_pairs]

    def train(self, seed: int) -> Samples:
        """`examples` samples over and over in random orders, or fresh ones for ever."""
        if self.examples is None:
            return super().train(seed)
        return Epochs(Generated(self, Stream(seed, "train"), self.examples), seed)

    def evaluations(self) -> dict[str, Samples]:
        """The task at other sizes, `"length_512_pairs_64"` and so on."""
        return {
            f"length_{length}_pairs_{n_pairs}": self._evaluation(
                dataclasses.replace(self, length=length, n_pairs=n_pairs, evaluation_settings=())
            )
            for length, n_pairs in self.evaluation_settings
        }
