"""What every data source offers: the family `DataConfig`, and the two words a summary needs beside a score.

A data source is one frozen config, chosen in a recipe by its `type`. It knows what a model must know (how
many symbols or classes) and makes three kinds of dataset:

    train(seed)     endless; what sample 7 is depends on the seed and on 7, on nothing else
    validation()    finite and always the same; watched during training
    evaluations()   finite, by name; harder or official tests, run once at the end

Language modelling samples are `{"tokens": (l,), "labels": (l,)}`: `labels[t]` is what has to be said at
position t, already shifted, and -100 where nothing is asked. Packed ones add `"seq_idx": (l,)`.
Classification samples are `{"inputs": (l, f), "label": ()}`.
Labelled texts are packed: a batch is `{"tokens": (1, t), "lengths": (n,), "label": (n,)}`, texts end to end.
"""

from __future__ import annotations

import dataclasses

from mambakit.config import Config, ConfigError, Tagged
from mambakit.data.samples import Samples
from mambakit.data.tokenizers import Tokenizer


class DataError(ConfigError):
    """A data file that is missing, damaged, or not what it claims to be, said in one line."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A trivial predictor that a trained model has to beat.

    Attributes:
        name: What it does, for example `"order-4 n-gram"`.
        metric: `"loss"` (nats per predicted token) or `"accuracy"` (a fraction).
        value: Its score, measured on the split that `validation` or the official test uses.
    """

    name: str
    metric: str
    value: float


class DataConfig(Config, Tagged):
    """One source of data; members say which."""

    @property
    def vocab_size(self) -> int | None:
        """Number of token values a model reads and predicts; None where inputs are not tokens."""
        return None

    @property
    def n_classes(self) -> int | None:
        """Number of classes; None for language modelling."""
        return None

    @property
    def in_features(self) -> int | None:
        """Width f of continuous inputs (l, f); None where inputs are tokens."""
        return None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns text into tokens and back; None where the data is not text."""
        return None

    @property
    def chance(self) -> float | None:
        """Accuracy of a uniform guess among the possible answers; None where accuracy is not the measure."""
        return None

    @property
    def baseline(self) -> Baseline | None:
        """The strongest trivial predictor known for these settings, if one is."""
        return None

    def train(self, seed: int) -> Samples:
        """Make the endless training data.

        Args:
            seed: Any integer in [0, 2**64); other seeds give other samples or another order.

        Returns:
            A dataset without a length, indexed by the global sample number.

        Raises:
            DataError: A file is missing or damaged.
        """
        raise NotImplementedError

    def validation(self) -> Samples:
        """Make the data watched during training: finite, fixed, and never a training sample's twin.

        Returns:
            A dataset with a length, in a fixed order.

        Raises:
            DataError: A file is missing or damaged.
        """
        raise NotImplementedError

    def evaluations(self) -> dict[str, Samples]:
        """Make the tests to run once at the end.

        Returns:
            Finite datasets by name, for example `{"length_512": ...}`; empty where validation says it all.

        Raises:
            DataError: A file is missing or damaged.
        """
        return {}
