"""Scoring by the engine against scoring by the forward."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation.engine import DecodedModel, DecodeEngine
from mambakit.layers.mixer import Context
from mambakit.training.task import LanguageModeling


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(71, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("batch", [1, 16, 35])
def test_logits_are_those_of_the_forward(make, batch):
    model, text = make("all"), tokens(batch, 6)
    decoded = DecodedModel(model, DecodeEngine(model))
    torch.testing.assert_close(decoded(text), model(text), rtol=1e-4, atol=1e-4)


def test_every_document_begins_anew(make):
    model, text = make("all"), tokens(3, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 2, 2, 2, 2, 4]])
    context = Context(seq_idx=documents)
    decoded = DecodedModel(model, DecodeEngine(model))
    found = decoded(text, None, context)
    torch.testing.assert_close(found, model(text, None, context), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0, 3:], decoded(text[:1, 3:])[0])


def test_a_state_goes_on(make):
    model, text = make("all"), tokens(3, 8)
    decoded = DecodedModel(model, DecodeEngine(model, "int4"))
    state = decoded.init_state(3, max_length=8)
    pieces = torch.cat([decoded.features(text[:, :5], state), decoded.features(text[:, 5:], state)], 1)
    assert torch.equal(pieces, decoded(text))


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_task_measures_the_same(make, chunk):
    model, text = make("all"), tokens(4, 8)
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:].clone()}
    batch["labels"][:, :2] = -100
    task = LanguageModeling(prefill_chunk=chunk)
    wanted = task.evaluate(model, [batch])
    found = task.evaluate(DecodedModel(model, DecodeEngine(model)), [batch])
    assert found == pytest.approx(wanted, rel=1e-5)
    rounded = task.evaluate(DecodedModel(model, DecodeEngine(model, "int4")), [batch])
    assert rounded["loss"] != pytest.approx(wanted["loss"], rel=1e-5), "the engine was not asked"
