"""Speculation changes the time, not the text: the same tokens greedily, the same distribution otherwise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mambakit import LanguageModel, LanguageModelConfig, Sampling, generate, speculate
from mambakit.generation import Acceptance
from mambakit.generation.speculative import _Chooser, verify
from mambakit.layers import Mamba1Config, Mamba2Config

GREEDY = Sampling(temperature=0)


def like(model: LanguageModel, noise: float) -> LanguageModel:
    """A draft that agrees with a model now and then."""
    torch.manual_seed(5)
    draft = LanguageModel(model.config, dtype=model.embedding.weight.dtype).requires_grad_(False).eval()
    draft.load_state_dict(model.state_dict())
    for parameter in draft.parameters():
        parameter.add_(noise * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return draft


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_greedy_text_is_that_of_the_model_alone(toy, noise):
    draft, counts = like(toy, noise), Acceptance()
    sampling = Sampling(temperature=0, repetition_penalty=9)  # some toys would repeat one token for ever
    alone = generate(toy, [[3, 1, 4, 1, 5]], max_tokens=20, sampling=sampling)[0].tolist()
    found = list(speculate(toy, draft, [3, 1, 4, 1, 5], max_tokens=20, sampling=sampling, acceptance=counts))
    assert found == alone and len(set(found)) > 2
    assert counts.written == counts.accepted + counts.checks >= 19
    if noise == 0:
        assert counts.rate == 1


@pytest.mark.parametrize("lookahead", [1, 2, 7])
def test_rejections_in_a_row_lose_nothing(some_toy, lookahead):
    """A draft that never agrees lets tokens pile up that are read again, and then for themselves."""
    draft = like(some_toy, 0)
    draft.lm_head.weight = torch.nn.Parameter(-draft.lm_head.weight, requires_grad=False)
    sampling = Sampling(temperature=0, repetition_penalty=1.2)
    alone = generate(some_toy, [[3, 1, 4]], max_tokens=45, sampling=sampling)[0].tolist()
    counts = Acceptance()
    found = list(
        speculate(
            some_toy, draft, torch.tensor([3, 1, 4]), max_tokens=45, sampling=sampling, lookahead=lookahead,
            acceptance=counts,
        )
    )  # fmt: skip
    assert found == alone
    assert counts.rate < 0.1


def test_text_ends_at_a_stop_token_and_with_the_prompt_read_in_pieces(some_toy):
    alone = generate(some_toy, [list(range(20))], max_tokens=30, sampling=GREEDY)[0].tolist()
    stop = alone[12]
    found = list(
        speculate(
            some_toy, like(some_toy, 0.1), [list(range(20))][0], max_tokens=30, sampling=GREEDY,
            stop_tokens=[stop], prefill_chunk=6,
        )
    )  # fmt: skip
    assert found == alone[: alone.index(stop) + 1]


def bound(degrees: int) -> float:
    """A chi-square that is exceeded by chance once in ten thousand times (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: dict, expected: dict) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; rare outcomes are taken together."""
    rare = [key for key, value in expected.items() if value < 5]
    cells = [(counts.get(key, 0), value) for key, value in expected.items() if value >= 5]
    if rare:
        cells.append((sum(counts.get(key, 0) for key in rare), sum(expected[key] for key in rare)))
    cells = [(seen, value) for seen, value in cells if value > 0]
    return sum((seen - value) ** 2 / value for seen, value in cells), len(cells) - 1


def test_accepting_and_rejecting_gives_the_models_distribution():
    """The rule alone, with two proposals: pairs of tokens against p1 p2."""
    draw = torch.Generator().manual_seed(0)
    p1, q1 = torch.softmax(2 * torch.randn(2, 5, generator=draw, dtype=torch.float64), -1)
    p2, q2, p3 = torch.softmax(2 * torch.randn(3, 5, generator=draw, dtype=torch.float64), -1)
    chooser = _Chooser(Sampling(seed=1), torch.zeros(1, 1, dtype=torch.int64), 5)
    n, counts, stood = 6000, {}, 0
    for _ in range(n):
        proposed = [chooser.draw(q1), chooser.draw(q2)]
        count, after = verify(proposed, [q1, q2], [p1, p2, p3], chooser)
        text = [*proposed[:count], after]
        # A text that stopped after one token goes on by p2, as the next round would.
        pair = (text[0], text[1] if len(text) > 1 else chooser.draw(p2))
        counts[pair] = counts.get(pair, 0) + 1
        stood += count
    expected = {(a, b): n * float(p1[a] * p2[b]) for a, b in itertools.product(range(5), repeat=2)}
    statistic, degrees = chi_square(counts, expected)
    assert statistic < bound(degrees)
    # The chance that the first stands is the mass that p and q share, and so on.
    shared = [float(torch.minimum(p, q).sum()) for p, q in ((p1, q1), (p2, q2))]
    assert stood / n == pytest.approx(shared[0] + shared[0] * shared[1], abs=4 * n**-0.5)


def pair() -> tuple[LanguageModel, LanguageModel]:
    """A model and a smaller draft of another kind, of strong and different opinions."""
    torch.manual_seed(0)
    made = []
    for d_model, mixer in ((16, Mamba2Config(d_state=4, headdim=8)), (8, Mamba1Config(d_state=4))):
        config = LanguageModelConfig(
            vocab_size=6, d_model=d_model, pattern="M", mixers={"M": mixer}, tie_embeddings=False
        )
        model = LanguageModel(config).requires_grad_(False).eval()
        model.lm_head.weight.mul_(6)
        made.append(model)
    return made[0], made[1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=4, repetition_penalty=1.5),
        pytest.param(Sampling(), marks=pytest.mark.slow),
    ],
    ids=["filtered", "plain"],
)
def test_sampled_texts_have_the_models_distribution(sampling):
    """Texts of three tokens, counted, against their probabilities from the model's own forward."""
    model = pair()[0]
    draft, prompt, n = like(model, 0.8), [1, 2], 500
    expected = {}
    for text in itertools.product(range(6), repeat=3):
        probability = 1.0
        for i, token in enumerate(text):
            seen = [*prompt, *text[:i]]
            logits = model(torch.tensor([seen]))[0, -1]
            chooser = _Chooser(sampling, torch.tensor([seen]), 6)
            probability *= float(chooser.distribution(logits)[token])
            if probability == 0:
                break
        expected[text] = n * probability
    assert sum(expected.values()) == pytest.approx(n)
    counts, went = {}, Acceptance()
    for seed in range(n):
        settings = Sampling(**{**vars(sampling), "seed": seed})
        text = tuple(
            speculate(model, draft, prompt, max_tokens=3, lookahead=2, sampling=settings, acceptance=went)
        )
        counts[text] = counts.get(text, 0) + 1
    statistic, degrees = chi_square(counts, expected)
    assert degrees > 10
    assert statistic < bound(degrees)
    assert 0.2 < went.rate < 0.9, "drafts that always or never stand would prove nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.ones(2, 3, dtype=torch.int64)}, "2 prompts, expected one"),
        ({"lookahead": 0}, "lookahead is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"vocab_size": 7}, "vocabularies of 6 and 6 tokens"),
        ({"tokens": []}, r"prompt 0 is \(0,\)"),
    ],
)
def test_speculation_that_makes_no_sense_is_refused(arguments, message):
    model, draft = pair()
    with pytest.raises(ValueError, match=message):
        speculate(model, draft, **{"tokens": [1], "max_tokens": 3, **arguments})


def test_models_of_different_tokens_do_not_speculate(some_toy):
    with pytest.raises(ValueError, match="vocabularies of 50 and 6 tokens"):
        speculate(some_toy, pair()[1], [1], max_tokens=3)
    found = speculate(some_toy, pair()[1].double(), [1], max_tokens=3, vocab_size=6, sampling=GREEDY)
    assert list(found) == generate(some_toy, [[1]], max_tokens=3, vocab_size=6, sampling=GREEDY)[0].tolist()
