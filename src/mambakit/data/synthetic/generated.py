"""What the synthetic tasks share: a config that draws batches, and the datasets made from it.

A task is a config with one method, `draw`, which turns random words into tokens and labels for a whole batch.
Nothing is stored: fresh samples for every step, and sample i is the same in every process and every run.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeVar

import numpy as np

from mambakit.data.config import DataConfig
from mambakit.data.samples import Samples, Stream, below

C = TypeVar("C", bound="SyntheticConfig")


class Generated(Samples):
    """Samples drawn by a task's config.

    Args:
        config: The task.
        stream: Where its randomness comes from.
        size: Number of samples; None for endless.
    """

    def __init__(self, config: SyntheticConfig, stream: Stream, size: int | None = None) -> None:
        super().__init__(size)
        self.config = config
        self.stream = stream

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples numbered `indices`: tokens and labels, (b, l) int64."""
        tokens, labels = self.config.draw(self.stream, indices)
        return {"tokens": tokens, "labels": labels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig(DataConfig):
    """Base of the synthetic tasks.

    Attributes:
        evaluation_samples: Samples in the validation data and in each evaluation.
    """

    evaluation_samples: int = 1024

    def __post_init__(self) -> None:
        require(self, evaluation_samples=1)

    def draw(self, stream: Stream, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make samples.

        Args:
            stream: Source of random words.
            indices: Global sample numbers, (b,) int64.

        Returns:
            Tokens and labels, (b, l) int64, with label -100 where nothing is asked.
        """
        raise NotImplementedError

    def train(self, seed: int) -> Samples:
        """Fresh samples for ever."""
        return Generated(self, Stream(seed, "train"))

    def validation(self) -> Samples:
        """Samples like the training ones, from random numbers that no training seed can reach."""
        return Generated(self, Stream(0, "validation"), self.evaluation_samples)

    def _evaluation(self: C, config: C) -> Samples:
        return Generated(config, Stream(0, "evaluation"), self.evaluation_samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTrackingConfig(SyntheticConfig):
    """Base of the tasks whose samples differ in length, trained on short ones and tested on long ones.

    The protocol is that of Grazzi et al., "Unlocking state-tracking in linear RNNs through negative
    eigenvalues" (ICLR 2025, arXiv 2411.12537): train on lengths 3 to 40, test up to 256. Mamba-3 (arXiv
    2603.15569, app. D) raises the longest training length in stages of 10^4 steps of 256 samples from 40 to
    160: `max_lengths=(40, 80, 120, 160)`.

    Lengths count the tokens that the model reads; published ones also count the place of the answer, and are
    larger by one.

    Attributes:
        min_length: Shortest training sample.
        max_lengths: Longest training sample, for each stage of training. Samples are filled up to it.
        stage_samples: Samples per stage; the last stage lasts for ever.
        evaluation_lengths: Every evaluation sample has exactly this length.
    """

    min_length: int = 3
    max_lengths: tuple[int, ...] = (40,)
    stage_samples: int = 2_560_000
    evaluation_lengths: tuple[int, ...] = (40, 64, 128, 256)

    shortest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        first_valid = -(-self.min_length // self.step) * self.step
        require(self, min_length=self.shortest, max_lengths=first_valid, stage_samples=1)
        require(self, evaluation_lengths=self.shortest)
        if not self.max_lengths:
            raise ValueError("max_lengths is empty, expected a longest length for at least one stage")

    @property
    def step(self) -> int:
        """Lengths are multiples of this."""
        return 1

    def lengths(self, words: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Draw a length for each sample, uniform between the shortest and its stage's longest.

        Args:
            words: One random word for each sample, (b,) uint64.
            indices: Global sample numbers, (b,) int64.

        Returns:
            Lengths, (b,) int64.
        """
        fewest, most = -(-self.min_length // self.step), self.longest(indices) // self.step
        return self.step * (fewest + below(words, most - fewest + 1))

    def longest(self, indices: np.ndarray) -> np.ndarray:
        """The longest length in the stage of each sample, (b,) int64."""
        stage = np.minimum(indices // self.stage_samples, len(self.max_lengths) - 1)
        return np.array(self.max_lengths)[stage]

    def validation(self) -> Samples:
        """Samples like those of the last training stage."""
        last = dataclasses.replace(self, max_lengths=self.max_lengths[-1:])
        return Generated(last, Stream(0, "validation"), self.evaluation_samples)

    def evaluations(self) -> dict[str, Samples]:
        """Samples of one length each, `"length_256"` and so on."""
        return {
            f"length_{length}": self._evaluation(
                dataclasses.replace(self, min_length=length, max_lengths=(length,))
            )
            for length in self.evaluation_lengths
        }


def require(config: SyntheticConfig, **least: int) -> None:
    """Check that fields (or each member of tuple fields) are not below their smallest valid value.

    Raises:
        ValueError: One is; the message names it.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if any(number < bound for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {value}, expected at least {bound}")
