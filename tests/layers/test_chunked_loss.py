"""A head's loss by chunks is the loss of all scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mambakit.layers.chunked_loss import summed_cross_entropy


@pytest.fixture
def problem():
    torch.manual_seed(0)
    features = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(17, (23,))
    labels[::5] = -100
    return nn.Linear(6, 17, dtype=torch.float64), features, labels


@pytest.mark.parametrize("scores", [1, 17 * 4, 17 * 22, 10**6])
def test_chunks_give_the_loss_and_gradients_of_the_whole(problem, scores):
    head, features, labels = problem
    total, best = summed_cross_entropy(head, features, labels, scores=scores)
    expected = F.cross_entropy(head(features), labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert torch.equal(best, head(features).argmax(1))
    wanted = [features, *head.parameters()]
    for a, b in zip(
        torch.autograd.grad(total * 3, wanted), torch.autograd.grad(expected * 3, wanted), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(head, features, labels, scores=scores)[0], expected)


def test_only_one_chunk_of_scores_exists_at_a_time(problem):
    _, features, labels = problem
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    head = Head(6, 17, dtype=torch.float64)
    summed_cross_entropy(head, features, labels, scores=17 * 8)[0].backward()
    assert seen == [8, 8, 7]


def test_an_adapter_in_the_head_is_trained_and_frozen_weights_are_not(problem):
    head, features, labels = problem

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = head.requires_grad_(False)
            self.down = nn.Linear(6, 2, bias=False, dtype=torch.float64)
            self.up = nn.Linear(2, 17, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    adapted = Adapted()
    with pytest.raises(ValueError, match="Adapted has no out_features, expected vocab_size"):
        summed_cross_entropy(adapted, features, labels)
    summed_cross_entropy(adapted, features, labels, scores=34, vocab_size=17)[0].backward()
    found = {name: p.grad for name, p in adapted.named_parameters()}
    adapted.zero_grad()
    F.cross_entropy(adapted(features), labels, reduction="sum").backward()
    assert found["base.weight"] is None
    for name in ("down.weight", "up.weight"):
        torch.testing.assert_close(found[name], dict(adapted.named_parameters())[name].grad)


def test_autocast_scores_in_16_bits_and_sums_in_32(problem):
    head, features, labels = problem
    head, features = head.float(), features.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = summed_cross_entropy(head, features, labels, scores=34)
    assert total.dtype == torch.float32
    total.backward()
    assert head.weight.grad.dtype == torch.float32
    expected = F.cross_entropy(head(features), labels, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=1e-2)
