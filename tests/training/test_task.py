"""Losses and metrics against hand computation, and every shortcut against the plain way."""

from __future__ import annotations

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambakit.config import ConfigError
from mambakit.data import MnistConfig, ParityConfig, SelectiveCopyingConfig
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig, SequenceClassifier
from mambakit.training import LanguageModeling, SequenceClassification, TaskConfig

MIXERS = {
    "S": Mamba1Config(d_state=4),
    "M": Mamba2Config(d_state=8, headdim=8),
    "*": AttentionConfig(n_heads=2),
}


def language_model(pattern: str = "SM*", vocabulary: int = 7) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=vocabulary, d_model=16, pattern=pattern, mixers=MIXERS)
    return LanguageModel(config).double()


def language_batch(rows: int = 6, length: int = 20, share: float = 0.2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, 7, (rows, length))
    labels[torch.rand(rows, length) > share] = -100
    return {"tokens": torch.randint(0, 7, (rows, length)), "labels": labels}


class Fixed(nn.Module):
    """Says the given logits, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.lm_head = nn.Identity()
        self.config = types.SimpleNamespace(vocab_size=logits.shape[-1])

    def features(self, inputs: torch.Tensor, state: None = None, context: None = None) -> torch.Tensor:
        return self.logits

    def forward(self, inputs: torch.Tensor, state: None = None, context: None = None) -> torch.Tensor:
        return self.logits


def test_language_metrics_by_hand():
    # Two sequences: one right at both of its labels, one right at one of two; a third asks nothing.
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).log()
    logits = probabilities.expand(3, 2, 3).clone()
    labels = torch.tensor([[0, 1], [0, 2], [-100, -100]])
    metrics = LanguageModeling().evaluate(
        Fixed(logits), [{"tokens": torch.zeros_like(labels), "labels": labels}]
    )
    loss = -(2 * math.log(0.5) + math.log(0.8) + math.log(0.1)) / 4
    assert metrics == pytest.approx(
        {
            "loss": loss,
            "bits_per_token": loss / math.log(2),
            "perplexity": math.exp(loss),
            "accuracy": 3 / 4,
            "sequence_accuracy": 1 / 2,
        },
        rel=1e-6,
    )


def test_classification_metrics_by_hand():
    logits = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]]).log()
    batch = {"inputs": torch.zeros(3, 4, 1), "label": torch.tensor([0, 1, 1])}
    metrics = SequenceClassification().evaluate(Fixed(logits), [batch, batch])
    assert metrics == pytest.approx(
        {"loss": -(math.log(0.7) + math.log(0.6) + math.log(0.1)) / 3, "accuracy": 2 / 3}, rel=1e-6
    )
    assert SequenceClassification().tokens(batch) == 12


def test_evaluation_weighs_targets_not_batches_and_leaves_the_mode_alone():
    model, task = language_model(), LanguageModeling()
    model.train()
    batch = language_batch()
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(6)]
    whole, split = task.evaluate(model, [batch]), task.evaluate(model, rows)
    assert whole == pytest.approx(split, rel=1e-12)
    assert model.training
    nats = [F.cross_entropy(model(r["tokens"])[0], r["labels"][0], reduction="sum").item() for r in rows]
    assert whole["loss"] == pytest.approx(sum(nats) / task.targets(batch), rel=1e-12)
    with pytest.raises(ValueError, match="at least one batch"):
        task.evaluate(model, [])


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_gradients_of_parts_add_up_to_that_of_the_whole(share: float):
    task, batch = LanguageModeling(), language_batch(share=share)
    model = language_model()
    task.loss(model, task.prepare(batch))[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    targets = task.targets(batch)
    for rows in (
        slice(0, 1),
        slice(1, 4),
        slice(4, 6),
    ):  # parts of unequal size and unequal numbers of labels
        part = task.prepare({key: value[rows] for key, value in batch.items()})
        task.loss(model, part, targets)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-10, atol=1e-14)


def test_scoring_only_the_labelled_places_changes_nothing():
    task, batch, model = LanguageModeling(), language_batch(share=0.2), language_model()
    prepared = task.prepare(batch)
    assert len(prepared["places"]) == task.targets(batch)
    assert "places" not in task.prepare(language_batch(share=0.9))
    one, other = task.loss(model, batch), task.loss(model, prepared)
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=0)
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_by_chunks_with_carried_state_changes_nothing(chunk: int, packed: bool):
    model, batch = language_model(), language_batch(share=0.3)
    if packed:
        batch["seq_idx"] = (torch.arange(20) // 9).expand(6, 20)
    whole = LanguageModeling().evaluate(model, [batch])
    chunked = LanguageModeling(prefill_chunk=chunk).evaluate(model, [batch])
    assert chunked == pytest.approx(whole, rel=1e-10)
    if packed:  # the documents matter, so the agreement above says something
        unpacked = {key: value for key, value in batch.items() if key != "seq_idx"}
        assert LanguageModeling().evaluate(model, [unpacked])["loss"] != pytest.approx(
            whole["loss"], rel=1e-4
        )


def test_models_get_their_sizes_from_the_data():
    task = LanguageModeling()
    model = task.build_model({"d_model": 16, "pattern": "-"}, ParityConfig())
    assert model.lm_head.weight.shape == (3, 16)
    padded = task.build_model({"d_model": 16, "pattern": "-", "vocab_size": 64}, ParityConfig())
    assert padded.lm_head.weight.shape == (64, 16)
    classifier = SequenceClassification().build_model({"d_model": 16, "pattern": "-"}, MnistConfig())
    assert isinstance(classifier, SequenceClassifier)
    assert (classifier.head.out_features, classifier.encoder.in_features) == (10, 1)


def test_models_that_do_not_suit_the_data_are_refused_in_one_line():
    cases = [
        (
            LanguageModeling(),
            {"d_model": 16, "pattern": "-", "vocab_size": 2},
            ParityConfig(),
            "model.vocab_size: 2 is",
        ),
        (LanguageModeling(), {"d_model": 16, "pattern": "-"}, MnistConfig(), "'mnist' has none"),
        (
            SequenceClassification(),
            {"d_model": 16, "pattern": "-"},
            SelectiveCopyingConfig(),
            "needs classes",
        ),
        (
            SequenceClassification(),
            {"d_model": 16, "pattern": "-", "n_classes": 5},
            MnistConfig(),
            "model.n_classes: 5",
        ),
        (
            LanguageModeling(),
            {"d_model": 16, "pattern": "-", "patern": "M"},
            ParityConfig(),
            "did you mean 'pattern'",
        ),
        (LanguageModeling(), {"d_model": 15, "pattern": "M"}, ParityConfig(), "model: d_model=15"),
    ]
    for task, model, data, message in cases:
        with pytest.raises(ConfigError, match=message):
            task.build_model(model, data)


def test_tasks_are_chosen_by_type():
    assert TaskConfig.members.keys() >= {"language-modeling", "sequence-classification"}
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        LanguageModeling(prefill_chunk=0)
