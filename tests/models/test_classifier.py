"""Text classification: packed documents are documents on their own, and the head reads what it says."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config
from mambakit.models import TextClassifier, TextClassifierConfig

MIXERS = {
    "S": Mamba1Config(d_state=4),
    "M": Mamba2Config(d_state=8, headdim=8),
    "*": AttentionConfig(n_heads=2),
}


def classifier(pooling: str = "last", **changes) -> TextClassifier:
    torch.manual_seed(0)
    config = TextClassifierConfig(
        vocab_size=31, d_model=16, pattern="SM*", mixers=MIXERS, n_classes=3, pooling=pooling, **changes
    )
    return TextClassifier(config, dtype=torch.float64)


LENGTHS = torch.tensor([5, 1, 9, 17])
TOKENS = torch.arange(int(LENGTHS.sum()))[None] * 7 % 31


@pytest.mark.parametrize("pooling", ["last", "mean", "concat"])
def test_packed_is_one_by_one(pooling):
    model = classifier(pooling)
    together = model(TOKENS, LENGTHS)
    alone = [model(part, torch.tensor([part.shape[1]])) for part in TOKENS.split(LENGTHS.tolist(), dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean", "concat"])
def test_the_head_reads_what_its_name_says(pooling):
    model = classifier(pooling)
    features = model.language.features(TOKENS[:, :5])[0]  # the first document
    read = {
        "last": features[-1],
        "mean": features.mean(0),
        "concat": torch.cat([features[-1], features.max(0).values, features.mean(0)]),
    }[pooling]
    expected = model.head.weight @ read + model.head.bias
    torch.testing.assert_close(model(TOKENS, LENGTHS)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean", "concat"])
def test_another_document_changes_no_bit(pooling):
    model = classifier(pooling)
    changed = TOKENS.clone()
    changed[:, :6] = (changed[:, :6] + 3) % 31  # the first two documents
    before, after = model(TOKENS, LENGTHS), model(changed, LENGTHS)
    assert torch.equal(before[2:], after[2:])
    assert not torch.equal(before[:2], after[:2])


def test_dropped_tokens_in_training_only():
    model = classifier(token_dropout=0.5)
    assert torch.equal(model.eval()(TOKENS, LENGTHS), model(TOKENS, LENGTHS))
    assert not torch.equal(model.train()(TOKENS, LENGTHS), model.eval()(TOKENS, LENGTHS))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="unknown pooling 'lasst'; did you mean 'last'"):
        classifier("lasst")
    with pytest.raises(ValueError, match=r"head_dropout=1\.0"):
        classifier(head_dropout=1.0)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 16\)"):
        classifier()(TOKENS[:, :32].view(2, 16), LENGTHS)
