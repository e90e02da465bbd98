"""Decoding with a real model: one token at a time is the full forward, a batch is its rows one by one."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation import Sampling, generate, stream, stream_text
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig

GREEDY = Sampling(temperature=0)
MIXERS = {
    "S": Mamba1Config(d_state=4),
    "M": Mamba2Config(d_state=8, headdim=8),
    "*": AttentionConfig(n_heads=4),
}


@pytest.fixture(params=["SM", "M-*-"])
def model(request) -> LanguageModel:
    """Small, with a head of its own: a tied one, untrained, repeats the token it has just read."""
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=31, d_model=32, pattern=request.param, mixers=MIXERS, tie_embeddings=False
    )
    return LanguageModel(config, dtype=torch.float64)


def prompts(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def test_greedy_decoding_is_the_argmax_of_the_full_forward(model):
    tokens = prompts()
    new = generate(model, tokens, max_tokens=12, sampling=GREEDY)
    whole = torch.cat([tokens, new], dim=1)
    with torch.no_grad():
        best = model(whole)[:, tokens.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(new, best)
    assert len(new.unique()) > 3, "a model that says one thing only would prove nothing"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5, top_k=8, min_p=0.01, repetition_penalty=1.2)])
def test_a_batch_is_its_rows_one_by_one(model, sampling):
    tokens = prompts()
    together = generate(model, tokens, max_tokens=10, sampling=sampling)
    for row in range(len(tokens)):
        seed = None if sampling.seed is None else sampling.seed + row
        own = Sampling(**{**vars(sampling), "seed": seed})
        assert torch.equal(
            generate(model, tokens[row : row + 1], max_tokens=10, sampling=own)[0], together[row]
        )


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 100])
def test_the_prompt_may_be_read_in_pieces_of_any_size(model, chunk):
    whole = generate(model, prompts(), max_tokens=8, sampling=GREEDY)
    assert torch.equal(generate(model, prompts(), max_tokens=8, sampling=GREEDY, prefill_chunk=chunk), whole)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model):
    first, again, other = (
        generate(model, prompts(), max_tokens=20, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_longer_run_begins_with_the_shorter_one(model):
    short, long = (generate(model, prompts(), max_tokens=n, sampling=Sampling(seed=3)) for n in (5, 15))
    assert torch.equal(long[:, :5], short)


def test_a_conversation_goes_on_from_its_state(model):
    tokens = prompts(batch=1)
    state = model.init_state(1, max_length=64)
    first = generate(model, tokens, max_tokens=6, sampling=GREEDY, state=state)
    addition = prompts(batch=1, length=4)
    # The state covers everything but the last token that was yielded.
    second = generate(
        model, torch.cat([first[:, -1:], addition], dim=1), max_tokens=6, sampling=GREEDY, state=state
    )
    whole = generate(model, torch.cat([tokens, first, addition], dim=1), max_tokens=6, sampling=GREEDY)
    assert torch.equal(second, whole)


def test_a_row_ends_at_its_stop_token_and_the_batch_with_its_last_row(model):
    free = generate(model, prompts(), max_tokens=20, sampling=GREEDY)
    stop = int(free[0, 3])
    new = generate(model, prompts(), max_tokens=20, sampling=GREEDY, stop_tokens=[stop])
    ends = []
    for row in range(len(free)):
        hits = (free[row] == stop).nonzero().flatten()
        ends.append(int(hits[0]) + 1 if len(hits) else free.shape[1])
        shown = new[row, : ends[-1]]
        assert torch.equal(shown, free[row, : len(shown)])
        assert (new[row, ends[-1] :] == stop).all()
    assert new.shape[1] == max(ends)


def test_generation_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = stream(model, prompts(), max_tokens=5, sampling=GREEDY)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_generous_limit_costs_nothing(model):
    assert next(stream(model, prompts(), max_tokens=10**12)).shape == (3,)


def test_tokens_that_only_fill_up_the_vocabulary_are_never_chosen(model):
    with torch.no_grad():
        model.lm_head.weight[20:] *= 10  # so that they would be, often
    assert generate(model, prompts(), max_tokens=30, sampling=Sampling(seed=0)).max() >= 20
    for sampling in (GREEDY, Sampling(seed=0)):
        new = generate(model, prompts() % 20, max_tokens=30, sampling=sampling, vocab_size=20)
        assert new.max() < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"shape \(2, 0\)"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"shape \(4,\)"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_the_call(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(model, **{"tokens": prompts(), "max_tokens": 3, **arguments})


class Letters:
    """31 symbols, a token each."""

    vocab_size = 31

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, tokens) -> str:
        return "".join(chr(ord("a") + int(t)) for t in tokens)


def test_streamed_text_ends_before_a_stop_string_that_spans_tokens(model):
    full = "".join(stream_text(model, Letters(), "hello", max_tokens=60, sampling=Sampling(seed=2)))
    assert len(full) == 60
    stop = full[20:23]
    pieces = list(
        stream_text(model, Letters(), "hello", max_tokens=60, sampling=Sampling(seed=2), stop=[stop, "@"])
    )
    assert "".join(pieces) == full[: full.index(stop)]
    assert all(pieces)


def test_streamed_text_ends_before_a_stop_token(model):
    sampling = Sampling(seed=2)
    full = "".join(stream_text(model, Letters(), "hello", max_tokens=30, sampling=sampling))
    [token] = Letters().encode(full[10])
    text = "".join(
        stream_text(model, Letters(), "hello", max_tokens=30, sampling=sampling, stop_tokens=[token])
    )
    assert text == full[: full.index(full[10])]


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="no tokens"):
        stream_text(model, Letters(), "", max_tokens=3)


def test_a_stop_string_in_the_prompt_ends_nothing(model):
    sampling = Sampling(seed=2)
    full = "".join(stream_text(model, Letters(), "hello", max_tokens=8, sampling=sampling))
    assert "hello" not in full
    assert (
        "".join(stream_text(model, Letters(), "hello", max_tokens=8, sampling=sampling, stop=["hello"]))
        == full
    )
