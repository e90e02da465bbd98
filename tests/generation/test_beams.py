"""Beam search against every continuation there is, and against transformers' search."""

from __future__ import annotations

import itertools

import pytest
import torch

import mambakit
from mambakit import LanguageModel, LanguageModelConfig, beam_search
from mambakit.layers import AttentionConfig, Mamba2Config

MIXERS = {"M": Mamba2Config(d_state=8, headdim=8), "*": AttentionConfig(n_heads=4)}


def tiny(vocab_size: int = 5, sharp: float = 40.0) -> LanguageModel:
    """A hybrid whose opinions are strong enough to matter."""
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=vocab_size, d_model=16, pattern="M*", mixers=MIXERS, tie_embeddings=False
    )
    model = LanguageModel(config, dtype=torch.float64).requires_grad_(False).eval()
    model.lm_head.weight.mul_(sharp / vocab_size**0.5)
    return model


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_beams_that_hold_everything_find_the_best_of_all(penalty):
    """With as many beams as unfinished texts, the search is exhaustive: compared with all texts there are."""
    model, prompt, stop, length = tiny(vocab_size=16), [3, 1], 2, 2
    every = {}
    for text in itertools.product(range(16), repeat=length):
        ended = text[: text.index(stop) + 1] if stop in text else text
        scores = model(torch.tensor([[*prompt, *ended]]))[0].log_softmax(-1)
        total = sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(ended))
        every[ended] = total / len(ended) ** penalty
    best = sorted(every.items(), key=lambda one: -one[1])[:8]
    [found] = beam_search(
        model, [prompt], max_tokens=length, beams=8, length_penalty=penalty, early_stopping="never",
        stop_tokens=[stop],
    )  # fmt: skip
    firsts = {text[0] for text, _ in best}
    assert len(firsts) > 1 and any(text[-1] == stop for text, _ in best)
    assert [one.tokens for one in found] == [text for text, _ in best]
    assert [one.score for one in found] == pytest.approx([score for _, score in best])
    assert [one.ended for one in found] == [text[-1] == stop for text, _ in best]


def test_one_beam_is_greedy(some_toy):
    prompts = [[4, 9, 2], [7]]
    greedy = mambakit.generate(some_toy, prompts, max_tokens=9, sampling=mambakit.Sampling(temperature=0))
    found = beam_search(some_toy, prompts, max_tokens=9, beams=1)
    assert [list(one.tokens) for [one] in found] == greedy.tolist()


def test_prompts_together_are_searched_as_alone(some_toy):
    prompts = [[4, 9, 2, 8, 8], [7], [3, 3]]
    settings = {"max_tokens": 7, "beams": 3, "stop_tokens": [5, 12]}
    together = beam_search(some_toy, prompts, **settings)
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = beam_search(some_toy, [prompt], **settings)
        assert [one.tokens for one in found] == [one.tokens for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model of transformers' and the folder that it is saved in."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1, state_size=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(6)
    folder = tmp_path_factory.mktemp("theirs") / "it"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
def test_texts_and_scores_are_those_of_transformers(theirs, early_stopping, penalty):
    model, folder = theirs
    ours = mambakit.load(folder)
    ends = 0
    for seed in range(3):
        prompt = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(seed))
        for row in prompt:  # their batches go on for rows that are done until all are
            expected = model.generate(
                row[None], max_new_tokens=12, num_beams=4, num_return_sequences=4, do_sample=False,
                length_penalty=penalty, early_stopping=early_stopping, eos_token_id=[2, 7],
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            [found] = beam_search(
                ours, row[None], max_tokens=12, beams=4, length_penalty=penalty,
                early_stopping=early_stopping, stop_tokens=[2, 7],
            )  # fmt: skip
            texts = [list(one.tokens) for one in found]
            lines = expected.sequences[:, 5:].tolist()
            assert [line[: len(text)] for line, text in zip(lines, texts, strict=True)] == texts
            torch.testing.assert_close(
                torch.tensor([one.score for one in found]), expected.sequences_scores, rtol=1e-4, atol=1e-4
            )
            ends += sum(one.ended for one in found)
    assert ends > 0, "no text has ended: the penalty was not tested"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"early_stopping": "nevr"}, "unknown early_stopping 'nevr'; did you mean 'never'"),
        ({"beams": 3}, "3 beams, too many for 5 tokens"),
        ({"vocab_size": 3}, "2 beams, too many for 3 tokens"),
    ],
)
def test_searches_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_search(tiny(), [[1]], **{"max_tokens": 3, "beams": 2, **arguments})


def test_a_search_leaves_the_model_in_its_mode():
    model = tiny().train()
    beam_search(model, [[1]], max_tokens=3, beams=2)
    assert model.training
