"""Modular arithmetic: the value of an expression modulo 5, with or without brackets.

From the Chomsky-hierarchy tasks of Deletang et al. (ICLR 2023, arXiv 2207.02098), in the form of Grazzi et
al. (arXiv 2411.12537), which Mamba-3 (arXiv 2603.15569, app. D) follows too:

    without brackets    3 - 2 * 4 + 1 =          numbers joined by + - *, and * binds tighter
    with brackets       ( 2 - ( ( - 1 ) + 4 ) ) =    random trees of + and -, with signs; no *

The answer has to be said at the equals sign. Without brackets a finite state suffices (a regular language),
with brackets a stack is needed (a context-free one).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mambakit.data.samples import IGNORED, Stream, below
from mambakit.data.synthetic.generated import StateTrackingConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmeticConfig(StateTrackingConfig, tag="modular-arithmetic"):
    """Expressions modulo a small number, by the protocol in `StateTrackingConfig`.

    Token values are 0 to modulus - 1, then `+ - * ( ) =`, then the filler. Without brackets all lengths are
    even: n numbers, n - 1 operators, the equals sign.

    Attributes:
        brackets: Which of the two tasks.
        modulus: The numbers are 0 to modulus - 1.
        min_length: Fewest tokens, with the equals sign.
        max_lengths: Most tokens, for each stage of training.
        stage_samples: Samples per stage.
        evaluation_lengths: Numbers of tokens to test at.
        evaluation_samples: Samples per evaluation.
    """

    brackets: bool = False
    modulus: int = 5

    shortest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, modulus=2)
        if not self.brackets and any(length % 2 for length in self.evaluation_lengths):
            raise ValueError(
                f"evaluation_lengths is {self.evaluation_lengths}, expected even numbers without brackets"
            )

    @property
    def step(self) -> int:
        """Lengths are multiples of this."""
        return 1 if self.brackets else 2

    @property
    def symbols(self) -> tuple[str, ...]:
        """What each token value stands for."""
        return (*map(str, range(self.modulus)), "+", "-", "*", "(", ")", "=", " ")

    @property
    def vocab_size(self) -> int:
        """Numbers, six signs, filler."""
        return self.modulus + 7

    @property
    def chance(self) -> float:
        """One of the numbers, at random."""
        return 1 / self.modulus

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples; see `SyntheticConfig.draw`."""
        width = int(self.longest(indices).max())
        words = stream.words(indices, 1 + width)
        lengths = self.lengths(words[:, 0], indices)
        make = self._trees if self.brackets else self._chains
        tokens, answers = make(words[:, 1:], lengths - 1)
        rows = np.arange(len(indices))
        tokens[rows, lengths - 1] = self._token("=")
        labels = np.full_like(tokens, IGNORED)
        labels[rows, lengths - 1] = answers
        return tokens, labels

    def _token(self, symbol: str) -> int:
        return self.symbols.index(symbol)

    def _chains(self, words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make expressions without brackets and their values.

        Args:
            words: One random word for each place, (b, l) uint64.
            lengths: Tokens of each expression, odd, (b,).

        Returns:
            Tokens (b, l), filled up, and values (b,).
        """
        numbers = below(words[:, 0::2], self.modulus)
        operators = self._token("+") + below(words[:, 1::2], 3)
        tokens = np.empty(words.shape, dtype=np.int64)
        tokens[:, 0::2], tokens[:, 1::2] = numbers, operators
        tokens[np.arange(words.shape[1]) >= lengths[:, None]] = self._token(" ")

        total = np.zeros_like(lengths)  # of the products that are complete
        product = numbers[:, 0]  # the one under way, with its sign
        for k in range(1, int(lengths.max() + 1) // 2):
            number, operator = numbers[:, k], operators[:, k - 1]
            present = 2 * k < lengths
            times = operator == self._token("*")
            total = np.where(present & ~times, total + product, total)
            signed = np.where(operator == self._token("-"), -number, number)
            product = np.where(present, np.where(times, product * number % self.modulus, signed), product)
        return tokens, (total + product) % self.modulus

    def _trees(self, words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make expressions with brackets and their values, all branches of all samples level by level.

        An expression of 5 or more tokens is `(left operator right)`, with all lengths of `left` equally
        likely; shorter ones are `n`, `-n`, `(n)` and `(-n)`. Every choice is made by the word at the place
        of the token that it decides, so no two choices share a word.

        Args:
            words: One random word for each place, (b, l) uint64.
            lengths: Tokens of each expression, (b,).

        Returns:
            Tokens (b, l), filled up, and values (b,).
        """
        tokens = np.full(words.shape, self._token(" "), dtype=np.int64)
        values = np.zeros_like(lengths)
        rows, starts, sizes = np.arange(len(lengths)), np.zeros_like(lengths), lengths
        signs = np.ones_like(lengths)
        while rows.size:
            leaf = sizes < 5
            self._leaves(words, tokens, values, rows[leaf], starts[leaf], sizes[leaf], signs[leaf])
            rows, starts, sizes, signs = rows[~leaf], starts[~leaf], sizes[~leaf], signs[~leaf]
            left = 1 + below(words[rows, starts], sizes - 4)
            middles = starts + 1 + left
            minus = below(words[rows, middles], 2)
            tokens[rows, starts] = self._token("(")
            tokens[rows, middles] = self._token("+") + minus
            tokens[rows, starts + sizes - 1] = self._token(")")
            rows = np.concatenate([rows, rows])
            starts = np.concatenate([starts + 1, middles + 1])
            sizes = np.concatenate([left, sizes - 3 - left])
            signs = np.concatenate([signs, signs * (1 - 2 * minus)])
        return tokens, values % self.modulus

    def _leaves(
        self,
        words: np.ndarray,
        tokens: np.ndarray,
        values: np.ndarray,
        rows: np.ndarray,
        starts: np.ndarray,
        sizes: np.ndarray,
        signs: np.ndarray,
    ) -> None:
        """Write `n`, `-n`, `(n)` or `(-n)` into `tokens`, by size, and add them to `values`.

        Only + and - lie above a leaf, so it counts in the value with the product of the signs above it.
        """
        bracketed, negative = sizes >= 3, sizes % 2 == 0
        tokens[rows[bracketed], starts[bracketed]] = self._token("(")
        tokens[rows[bracketed], (starts + sizes - 1)[bracketed]] = self._token(")")
        tokens[rows[negative], (starts + bracketed)[negative]] = self._token("-")
        places = starts + bracketed + negative
        numbers = below(words[rows, places], self.modulus)
        tokens[rows, places] = numbers
        np.add.at(values, rows, np.where(negative, -signs, signs) * numbers)
