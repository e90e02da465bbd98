"""What a model is asked to learn: loss, metrics and evaluation, as small frozen objects.

A task knows which model it needs, how one batch becomes a loss, and what the sums over many batches mean.
The trainer knows none of this. `loss` returns the sums that training logs and evaluations both reduce with
`summarise`, so a number means the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.config import Config, ConfigError, Tagged
from mambakit.data.config import DataConfig
from mambakit.data.samples import IGNORED
from mambakit.layers.chunked_loss import summed_cross_entropy
from mambakit.layers.mixer import Context
from mambakit.models import (
    LanguageModel,
    LanguageModelConfig,
    SequenceClassifier,
    SequenceClassifierConfig,
    TextClassifier,
    TextClassifierConfig,
)
from mambakit.training.device import move
from mambakit.training.metrics import Sums

Batch = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class TaskConfig(Config, Tagged):
    """Base of all tasks; `type:` in a recipe chooses the member."""

    def complete(self, model: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
        """Fill in the sizes of a model that its data decides.

        Args:
            model: Plain settings of the model, as in a recipe.
            data: The data source.

        Returns:
            Settings from which `build_model` makes a model without looking at the data.

        Raises:
            ConfigError: The data does not suit the task, or the given sizes do not suit the data.
        """
        raise NotImplementedError

    def build_model(self, model: Mapping[str, Any], data: DataConfig | None = None) -> nn.Module:
        """Make a freshly initialised model.

        Args:
            model: Plain settings of the model.
            data: Completes them; None if they are complete.

        Returns:
            A `LanguageModel` or a `SequenceClassifier`.

        Raises:
            ConfigError: A setting that the model or the data refuses.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> int:
        """How many predictions a batch (on the CPU) is judged by."""
        raise NotImplementedError

    def tokens(self, batch: Batch) -> int:
        """How many positions a batch makes the model read."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Batch:
        """Add, on the CPU, what spares the device work in `loss`."""
        return batch

    def loss(
        self, model: nn.Module, batch: Batch, targets: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch.

        Args:
            model: From `build_model`.
            batch: Tensors on the model's device.
            targets: What the summed loss is divided by: the `targets` of the whole optimiser step where this
                batch is a part of it, so that the gradients of the parts add up to that of the whole. None:
                those of this batch.

        Returns:
            The loss, a scalar in nats, and sums over the batch for `summarise`, detached scalars.
        """
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Measure a model, in evaluation mode and without gradients.

        Args:
            model: From `build_model`.
            batches: Batches on any device.

        Returns:
            The metrics of `summarise` over all batches together.

        Raises:
            ValueError: There is no batch.
        """
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        sums = Sums()
        try:
            with torch.no_grad():  # not inference_mode: a table cached here must serve training too
                for batch in batches:
                    sums.add(self.measure(model, move(self.prepare(batch), device)))
        finally:
            model.train(training)
        if not (totals := sums.read()):
            raise ValueError("nothing to evaluate on, expected at least one batch")
        return self.summarise(totals)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sums of one batch, without a loss to differentiate."""
        return self.loss(model, batch)[1]

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums over any number of batches into metrics, `loss` in nats per target among them."""
        raise NotImplementedError

    def reading_length(self, length: int) -> int:
        """How many positions of a sequence of `length` an evaluation holds in memory at once."""
        return length


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(TaskConfig, tag="language-modeling"):
    """Predict the label of every position that has one.

    The loss is the cross entropy in nats, summed over all positions with a label and divided by their number
    in the whole optimiser step. A mean of the means of parts would weigh short documents more.

    Args:
        prefill_chunk: Evaluate sequences longer than this piece by piece, carrying the model's state, so that
            memory does not grow with length. None evaluates every sequence in one pass.

    Raises:
        ValueError: prefill_chunk is not positive.
    """

    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse an empty chunk."""
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {self.prefill_chunk}, expected at least 1")

    def complete(self, model: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
        """Fill in `vocab_size`; a larger one, such as a multiple of 64, may be given."""
        needed = data.vocab_size
        if needed is None:
            raise ConfigError(f"data.type: language modelling needs tokens, and {data.tag!r} has none")
        given = model.get("vocab_size", needed)
        if isinstance(given, int) and given < needed:
            raise ConfigError(f"model.vocab_size: {given} is too small for the {needed} tokens of the data")
        return {**model, "vocab_size": given}

    def build_model(self, model: Mapping[str, Any], data: DataConfig | None = None) -> LanguageModel:
        """Make a language model."""
        settings = model if data is None else self.complete(model, data)
        return _built(LanguageModel, LanguageModelConfig.from_dict(settings, where="model"))

    def targets(self, batch: Batch) -> int:
        """Positions with a label."""
        return int((batch["labels"] != IGNORED).sum())

    def tokens(self, batch: Batch) -> int:
        """Positions, with a label or without."""
        return batch["tokens"].numel()

    def prepare(self, batch: Batch) -> Batch:
        """Where labels are rare, list their places, so that only those are scored: `(b, l, v)` is large."""
        places = (batch["labels"].flatten() != IGNORED).nonzero().squeeze(1)
        return {**batch, "places": places} if 2 * len(places) <= batch["labels"].numel() else batch

    def loss(
        self, model: LanguageModel, batch: Batch, targets: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy over the labels; see `TaskConfig.loss`."""
        context = Context(seq_idx=batch.get("seq_idx"))
        labels = batch["labels"]
        if "places" in batch:
            places = batch["places"]
            features = model.features(batch["tokens"], None, context).flatten(0, 1)  # (b l, d)
            nats, missed = _head_loss(
                model, features.index_select(0, places), labels.flatten().index_select(0, places)
            )
            wrong = torch.zeros_like(labels, dtype=torch.bool).flatten().index_copy(0, places, missed)
        else:
            features = model.features(batch["tokens"], None, context).flatten(0, 1)  # (b l, d)
            nats, wrong = _head_loss(model, features, labels.flatten())
        labelled = labels != IGNORED
        sums = _sequence_sums(nats, wrong.view_as(labels).sum(1), labelled.sum(1))
        total = sums["targets"].clamp(min=1) if targets is None else targets
        for loss in context.losses:  # means over this part of the batch, so weighted by its share
            nats = nats + loss * sums["targets"]
        return nats / total, sums

    def measure(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """The sums of one batch; long sequences chunk by chunk with carried state."""
        tokens, labels, documents = batch["tokens"], batch["labels"], batch.get("seq_idx")
        rows, length = tokens.shape
        if self.reading_length(length) == length:
            return super().measure(model, batch)
        state = model.init_state(rows, max_length=length)
        nats = torch.zeros((), device=tokens.device, dtype=torch.float64)
        wrong = torch.zeros(rows, device=tokens.device, dtype=torch.int64)
        for start in range(0, length, self.prefill_chunk):
            piece = slice(start, start + self.prefill_chunk)
            context = None
            if documents is not None:
                context = Context(seq_idx=documents[:, piece])
                if (
                    start
                ):  # a carried state belongs to the first document of a piece; where that is new, to none
                    new = documents[:, start] != documents[:, start - 1]
                    state.reset(new.nonzero().squeeze(1))
            features = model.features(tokens[:, piece], state, context)
            row, column = (labels[:, piece] != IGNORED).nonzero(as_tuple=True)
            if len(row):
                piece_nats, piece_wrong = _head_loss(
                    model, features[row, column], labels[:, piece][row, column]
                )
                nats += piece_nats
                wrong.index_add_(0, row, piece_wrong.long())
        return _sequence_sums(nats, wrong, (labels != IGNORED).sum(1))

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss, bits per token, perplexity, accuracy per label and per whole sequence."""
        targets = max(sums["targets"], 1.0)
        loss = sums["nats"] / targets
        return {
            "loss": loss,
            "bits_per_token": loss / math.log(2),
            "perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows a float
            "accuracy": 1.0 - sums["wrong"] / targets,
            "sequence_accuracy": sums["exact"] / max(sums["sequences"], 1.0),
        }

    def reading_length(self, length: int) -> int:
        """The chunk, where sequences are read in chunks."""
        return length if self.prefill_chunk is None else min(length, self.prefill_chunk)


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(TaskConfig, tag="sequence-classification"):
    """Name the class of a whole sequence; the loss is the mean cross entropy in nats."""

    def complete(self, model: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
        """Fill in `n_classes` and either `vocab_size` or `in_features`."""
        if data.n_classes is None:
            raise ConfigError(f"data.type: classification needs classes, and {data.tag!r} has none")
        sizes = {"n_classes": data.n_classes, "vocab_size": data.vocab_size, "in_features": data.in_features}
        needed = {key: size for key, size in sizes.items() if size is not None}
        for key, size in needed.items():
            if model.get(key, size) != size:
                raise ConfigError(f"model.{key}: {model[key]!r} does not suit the data, which has {size}")
        return {**model, **needed}

    def build_model(self, model: Mapping[str, Any], data: DataConfig | None = None) -> SequenceClassifier:
        """Make a sequence classifier."""
        settings = model if data is None else self.complete(model, data)
        return _built(SequenceClassifier, SequenceClassifierConfig.from_dict(settings, where="model"))

    def targets(self, batch: Batch) -> int:
        """Sequences."""
        return len(batch["label"])

    def tokens(self, batch: Batch) -> int:
        """Steps of all sequences."""
        return batch["inputs"].shape[0] * batch["inputs"].shape[1]

    def loss(
        self, model: SequenceClassifier, batch: Batch, targets: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of the classes; see `TaskConfig.loss`."""
        label = batch["label"]
        nats, wrong = _score(model(batch["inputs"]), label)
        sums = {"nats": nats.detach(), "wrong": wrong.sum(), "targets": torch.ones_like(label).sum()}
        return nats / (len(label) if targets is None else targets), sums

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss and accuracy."""
        targets = max(sums["targets"], 1.0)
        return {"loss": sums["nats"] / targets, "accuracy": 1.0 - sums["wrong"] / targets}


@dataclass(frozen=True, kw_only=True)
class TextClassification(TaskConfig, tag="text-classification"):
    """Name the class of each of the packed documents; the loss is the mean cross entropy in nats.

    Args:
        label_smoothing: Share of the probability that is spread over all classes, in [0, 1).
        language_weight: Weight of the language model's own loss on the same documents, which keeps what it
            knows from being forgotten (Chronopoulou et al., 1902.10547, for the idea); 0 is none.

    Raises:
        ValueError: A number out of range.
    """

    label_smoothing: float = 0.0
    language_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, expected a number in [0, 1)")
        if not self.language_weight >= 0:
            raise ValueError(f"language_weight is {self.language_weight}, expected a number >= 0")

    def complete(self, model: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
        """Fill in `n_classes` and `vocab_size`; a larger vocabulary may be given."""
        if data.n_classes is None or data.vocab_size is None:
            raise ConfigError(f"data.type: text classification needs texts with classes, not {data.tag!r}")
        needed, given = data.vocab_size, model.get("vocab_size", data.vocab_size)
        if isinstance(given, int) and given < needed:
            raise ConfigError(f"model.vocab_size: {given} is too small for the {needed} tokens of the data")
        classes = model.get("n_classes", data.n_classes)
        if classes != data.n_classes:
            raise ConfigError(
                f"model.n_classes: {classes!r} does not suit the data, which has {data.n_classes}"
            )
        return {**model, "vocab_size": given, "n_classes": classes}

    def build_model(self, model: Mapping[str, Any], data: DataConfig | None = None) -> TextClassifier:
        """Make a text classifier."""
        settings = model if data is None else self.complete(model, data)
        return _built(TextClassifier, TextClassifierConfig.from_dict(settings, where="model"))

    def targets(self, batch: Batch) -> int:
        """Documents."""
        return int((batch["label"] != IGNORED).sum())

    def tokens(self, batch: Batch) -> int:
        """Tokens of all documents, filling included."""
        return batch["tokens"].numel()

    def prepare(self, batch: Batch) -> Batch:
        """Add the next token of every token inside its document, where the language is learned too."""
        if not self.language_weight:
            return batch
        tokens, ends = batch["tokens"], batch["lengths"].cumsum(0) - 1
        following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).clone()
        following[:, ends] = IGNORED
        following[:, int(ends[-2]) + 1 if len(ends) > 1 else 0 :] = IGNORED  # the filling
        return {**batch, "following": following}

    def loss(
        self, model: TextClassifier, batch: Batch, targets: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of the classes; see `TaskConfig.loss`."""
        label, lengths, context = batch["label"], batch["lengths"], Context()
        features = model.features(batch["tokens"], lengths, context)  # (1, t, d)
        logits = model.classify(features, lengths)  # (n, k)
        nats, _ = _score(logits, label)
        sums = self._sums(nats, logits, label)
        loss = nats
        if self.label_smoothing:
            smooth = self.label_smoothing
            spread = -torch.log_softmax(logits.float(), -1).mean(-1)[label != IGNORED].sum()
            loss = (1 - smooth) * nats + smooth * spread
        if self.language_weight and model.training:
            following = batch["following"].flatten()
            language, _ = _head_loss(model.language, features[0], following)
            # A mean over tokens, weighted by the documents of this part of the batch.
            share = sums["targets"] / (following != IGNORED).sum().clamp(min=1)
            loss = loss + self.language_weight * share * language
        for extra in context.losses:  # means over this part of the batch, so weighted by its share
            loss = loss + extra * sums["targets"]
        return loss / (sums["targets"] if targets is None else targets), sums

    def _sums(self, nats: Tensor, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Nats, and how many documents of each class were taken for each class."""
        classes = logits.shape[-1]
        known = label != IGNORED
        cells = torch.where(known, label * classes + logits.detach().argmax(-1), classes * classes)
        counts = torch.zeros(classes * classes + 1, device=label.device, dtype=torch.int64)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
        sums = {f"class_{i}_as_{j}": counts[i * classes + j] for i in range(classes) for j in range(classes)}
        return {"nats": nats.detach(), "targets": known.sum(), **sums}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss, accuracy, and F1: of class 1 where there are two classes, else the mean over the classes."""
        classes = math.isqrt(len(sums) - 2)
        counts = [[sums[f"class_{i}_as_{j}"] for j in range(classes)] for i in range(classes)]
        right = [counts[i][i] for i in range(classes)]
        said = [sum(row[i] for row in counts) for i in range(classes)]
        f1 = [2 * right[i] / max(said[i] + sum(counts[i]), 1.0) for i in range(classes)]
        targets = max(sums["targets"], 1.0)
        return {
            "loss": sums["nats"] / targets,
            "accuracy": sum(right) / targets,
            "f1": f1[1] if classes == 2 else sum(f1) / classes,
        }


def _built(kind: type[M], config: Config) -> M:
    """Build a model; sizes that do not fit each other are the recipe's fault, not the program's."""
    try:
        return kind(config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def _head_loss(model: LanguageModel, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of features `(n, d)` under a model's head, and which of the labels were missed."""
    nats, best = summed_cross_entropy(model.lm_head, features, labels, vocab_size=model.config.vocab_size)
    return nats, (best != labels) & (labels != IGNORED)


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `(n, v)` logits, and which of the `(n,)` labels were missed."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return nats, (logits.detach().argmax(-1) != labels) & (labels != IGNORED)


def _sequence_sums(nats: Tensor, wrong: Tensor, labelled: Tensor) -> dict[str, Tensor]:
    """Sums from the total nats and, for each sequence `(b,)`, its misses and its labels."""
    return {
        "nats": nats.detach(),
        "wrong": wrong.sum(),
        "targets": labelled.sum(),
        "exact": ((wrong == 0) & (labelled > 0)).sum(),
        "sequences": (labelled > 0).sum(),
    }
