"""Each filter against a slow oracle that works on sorted Python lists; the draw against its distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.generation import Sampler, Sampling
from mambakit.generation.sampling import draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition


def random_logits(seed: int, batch: int = 5, vocabulary: int = 37) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, vocabulary, generator=generator, dtype=torch.float64)


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(x) for x in row.tolist()]
    return [w / math.fsum(weights) for w in weights]


def oracle_top_k(row: torch.Tensor, k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: -float(row[i]))[:k])


def oracle_top_p(row: torch.Tensor, p: float) -> set[int]:
    chances = probabilities(row)
    chosen: list[int] = []
    for i in sorted(range(len(row)), key=lambda i: -chances[i]):
        chosen.append(i)
        if math.fsum(chances[j] for j in chosen) >= p:
            break
    return set(chosen)


def oracle_min_p(row: torch.Tensor, p: float) -> set[int]:
    chances = probabilities(row)
    return {i for i, chance in enumerate(chances) if chance >= p * max(chances)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 7, 36, 37, 500])
def test_top_k_keeps_the_k_largest(seed, k):
    logits = random_logits(seed)
    assert kept(keep_top_k(logits, k)) == [oracle_top_k(row, k) for row in logits]


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert [len(row) for row in kept(keep_top_k(torch.zeros(3, 9), 4))] == [4, 4, 4]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_smallest_sufficient_set(seed, p):
    logits = random_logits(seed)
    assert kept(keep_top_p(logits, p)) == [oracle_top_p(row, p) for row in logits]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [1e-3, 0.05, 0.3, 0.9])
def test_min_p_is_relative_to_the_largest_probability_of_each_row(seed, p):
    logits = random_logits(seed)
    # Rows of different scale: a threshold taken from the whole batch would be wrong for most of them.
    logits = (
        logits * torch.linspace(0.2, 2, len(logits), dtype=logits.dtype)[:, None]
        + 50 * torch.arange(5)[:, None]
    )
    expected = [oracle_min_p(row - row.max(), p) for row in logits]
    assert kept(keep_min_p(logits, p)) == expected


@pytest.mark.parametrize(
    "keep", [lambda x: keep_top_k(x, 5), lambda x: keep_top_p(x, 0.8), lambda x: keep_min_p(x, 0.2)]
)
def test_filters_leave_kept_logits_unchanged(keep):
    logits = random_logits(0)
    filtered = keep(logits)
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_repetition_penalty_lowers_seen_tokens_on_both_sides_of_zero():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    expected = torch.tensor([[2 / 1.3, -2 * 1.3, 2.0, -2.0, 0.0]])
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.3), expected, rtol=1e-6, atol=0)


def test_repetition_penalty_counts_the_prompt_and_what_was_chosen():
    logits = torch.tensor([[3.0, 2.9, 2.8, 2.7]])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), torch.tensor([[0]]))
    assert [int(sampler(logits)) for _ in range(4)] == [1, 2, 3, 0]


def test_greedy_is_argmax():
    logits = random_logits(3)
    sampler = Sampler(Sampling(temperature=0), torch.zeros(5, 1, dtype=torch.int64))
    assert torch.equal(sampler(logits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    """Chi-squared over 60,000 draws; its 99.99% point with 7 degrees of freedom is 29.9."""
    n = 60_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5, -0.2, 1.0, -2.0])
    sampler = Sampler(Sampling(temperature=temperature, seed=0), torch.zeros(1, 1, dtype=torch.int64))
    filtered = sampler.filter(logits[None])
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    counts = draw(filtered.expand(n, -1), uniform).bincount(minlength=8).double()
    expected = n * (logits.double() / temperature).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 29.9


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.one_of(st.floats(-40, 40), st.just(-math.inf)), min_size=1, max_size=12),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53), st.just(0.0)),
)
def test_a_refused_token_is_never_drawn(logits, uniform):
    if not any(math.isfinite(x) for x in logits):
        logits = [*logits, 0.0]
    token = draw(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64))
    assert math.isfinite(logits[int(token)])


def test_the_extremes_of_the_uniform_number_reach_the_first_and_the_last_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_a_row_draws_alike_alone_and_in_a_batch():
    logits = random_logits(1)
    prompts = torch.zeros(5, 1, dtype=torch.int64)
    together = Sampler(Sampling(seed=10), prompts)
    alone = [Sampler(Sampling(seed=10 + row), prompts[:1]) for row in range(5)]
    for _ in range(20):
        tokens = together(logits)
        assert tokens.tolist() == [int(alone[row](logits[row : row + 1])) for row in range(5)]


def test_without_a_seed_two_samplers_differ():
    logits, prompt = torch.zeros(1, 1000), torch.zeros(1, 1, dtype=torch.int64)
    first, second = (Sampler(Sampling(), prompt) for _ in range(2))
    assert [int(first(logits)) for _ in range(8)] != [int(second(logits)) for _ in range(8)]


def test_the_random_state_of_torch_is_neither_used_nor_moved():
    logits, prompt = random_logits(2), torch.zeros(5, 1, dtype=torch.int64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Sampler(Sampling(seed=3), prompt)(logits)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Sampler(Sampling(seed=3), prompt)(logits), first)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = random_logits(4)
    sampler = Sampler(Sampling(temperature=1e-30, seed=0), torch.zeros(5, 1, dtype=torch.int64))
    assert torch.equal(sampler(logits), logits.argmax(-1))


def test_logits_that_are_not_numbers_are_refused():
    sampler = Sampler(Sampling(), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        sampler(torch.tensor([[0.0, torch.nan]]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*, expected"):
        Sampling(**{name: value})
