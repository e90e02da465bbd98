"""Evaluation against the plain way in float64: one token at a time, no batches, no state."""

from __future__ import annotations

import itertools
import json
import math
import types

import pytest
import torch

from mambakit.data import Bytes, DataError
from mambakit.evaluation import (
    Reader,
    Request,
    encode_pair,
    exact_perplexity,
    lambada,
    length_curve,
    multiple_choice,
    score,
    strided_perplexity,
)
from mambakit.evaluation.scoring import batches_by_length
from mambakit.evaluation.tasks import read_questions
from mambakit.layers import AttentionConfig, Mamba1Config, Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig

MIXERS = {
    "S": Mamba1Config(d_state=4),
    "M": Mamba2Config(d_state=8, headdim=8),
    "*": AttentionConfig(n_heads=2),
}
CLOSE = {"rel": 1e-9}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=256, d_model=16, pattern="SM*", mixers=MIXERS, initializer_range=0.5
    )
    return LanguageModel(config, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(256, (101,))


def surprise(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first, given all before it."""
    with torch.no_grad():
        logs = torch.log_softmax(model(ids[None])[0], -1)
    return -logs[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 7, 100, 4096])
def test_exact_perplexity_forgets_nothing(model, ids, chunk):
    found = exact_perplexity(model, ids, chunk=chunk, size=80)
    nats = float(surprise(model, ids).sum())
    assert (found.nats, found.tokens) == (pytest.approx(nats, **CLOSE), 100)
    metrics = found.metrics()
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 100))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / 80))


@pytest.mark.parametrize(("length", "stride"), [(32, 32), (32, 8), (32, 5), (10, 1), (100, 7), (400, 400)])
def test_strided_perplexity_is_that_of_the_literature(model, ids, length, stride):
    """The loop of transformers' documentation: windows, the overlap masked."""
    expected, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + length + 1, len(ids))  # tokens, one more than are read
        fresh = end - max(done, 1)
        window = surprise(model, ids[start:end])
        expected += float(window[len(window) - fresh :].sum())
        count, done = count + fresh, end
        if end == len(ids):
            break
    found = strided_perplexity(model, ids, length=length, stride=stride, batch=3)
    assert (found.nats, found.tokens) == (pytest.approx(expected, **CLOSE), 100) and count == 100
    if length >= 100:
        assert found.nats == pytest.approx(exact_perplexity(model, ids).nats, **CLOSE)


def test_scores_are_those_of_one_at_a_time(model):
    torch.manual_seed(2)
    requests = []
    for context, rest in ((1, 1), (30, 4), (3, 9), (30, 4), (17, 1), (60, 30)):
        drawn = torch.randint(256, (context + rest,)).tolist()
        requests.append(Request(drawn[:context], drawn[context:]))
    # One whose continuation is what the model would say.
    said = int(model(torch.tensor([requests[1].context]))[0, -1].argmax())
    requests.append(Request(requests[1].context, [said]))
    scores = score(model, requests, tokens=64)
    for request, found in zip(requests, scores, strict=True):
        nats = surprise(model, torch.tensor([*request.context, *request.continuation]))
        expected = -float(nats[-len(request.continuation) :].sum())
        assert found.log_likelihood == pytest.approx(expected, **CLOSE)
        assert found.tokens == len(request.continuation)
    assert scores[-1].is_greedy and not any(one.is_greedy for one in scores[:-1])


def test_batches_hold_like_lengths():
    lengths = [3, 50, 4, 48, 5, 200, 5]
    batches = list(batches_by_length(lengths, 100))
    assert batches == [[5], [1, 3], [4, 6, 2, 0]]


def test_a_pair_is_cut_where_the_continuation_begins():
    tokenizer = Bytes()
    assert encode_pair(tokenizer, "ab ", "c") == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "", "c", end=7) == ([7], [99])
    assert encode_pair(tokenizer, "  ", "c", end=7) == ([7], [32, 32, 99])
    with pytest.raises(ValueError, match="nothing stands before 'c'"):
        encode_pair(tokenizer, "", "c")


def test_lambada_asks_for_the_last_word(model):
    reader = Reader(model, Bytes())
    passages = ["the cat sat on the mat", "one two", "a longer passage, with a comma and\nanother line"]
    found = lambada(reader, passages)
    nats = []
    for text in passages:
        word = len(text) - text.rindex(" ")
        nats.append(float(surprise(model, torch.tensor(list(text.encode())))[-word:].sum()))
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 3), **CLOSE)
    assert (found["accuracy"], found["passages"]) == (0.0, 3)
    context = "the cat sat on the"
    tokens = list(context.encode())
    for _ in range(3):  # what it would say
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    always = types.SimpleNamespace(encode=lambda text: torch.tensor(tokens[: 18 + 3 * (len(text) > 18)]))
    assert lambada(Reader(model, always), [f"{context} xyz"])["accuracy"] == 1.0
    with pytest.raises(DataError, match="passage 1 is 'word'"):
        lambada(reader, ["word"])


def test_multiple_choice_by_sum_and_by_character(model, tmp_path):
    reader = Reader(model, Bytes())
    torch.manual_seed(3)
    letters = "abcdefgh ijkl"
    questions = []
    for number in range(30):
        drawn = torch.randint(len(letters), (3, 4 + number % 5)).tolist()
        choices = [" " + "".join(letters[i] for i in row[: 2 + 3 * n]) for n, row in enumerate(drawn)]
        questions.append({"context": f"Question {number}?", "choices": choices, "answer": number % 3})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    found = multiple_choice(reader, read_questions(tmp_path / "q.jsonl"))
    right = right_norm = 0
    for one in questions:
        sums = []
        for choice in one["choices"]:
            text = (one["context"] + choice).encode()
            sums.append(-float(surprise(model, torch.tensor(list(text)))[-len(choice) :].sum()))
        right += max(range(3), key=sums.__getitem__) == one["answer"]
        means = [nats / len(choice) for nats, choice in zip(sums, one["choices"], strict=True)]
        right_norm += max(range(3), key=means.__getitem__) == one["answer"]
    assert (found["acc"], found["acc_norm"]) == (right / 30, right_norm / 30)
    assert right != right_norm
    share = right / 30
    assert found["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 29))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({"choices": ["a"], "answer": 0}, '"context" to be of type str'),
        ({"context": "?", "choices": "ab", "answer": 0}, '"choices" to be of type list'),
        ({"context": "?", "choices": ["a"], "answer": 1}, "answer is 1 of 1 choices"),
        ({"context": "?", "choices": [""], "answer": 0}, "expected the number of one"),
    ],
)
def test_questions_that_are_none(model, question, expected):
    with pytest.raises(DataError, match=expected):
        multiple_choice(Reader(model, Bytes()), [question])


def test_the_curve_is_the_mean_surprise_at_each_position(model, ids):
    curve = length_curve(model, ids, 40, passages=2, chunk=16)
    passages = torch.stack([surprise(model, ids[start : start + 41]) for start in (0, 60)])
    borders = [1, 2, 4, 8, 16, 32, 41]
    assert [(row["from"], row["to"]) for row in curve] == list(itertools.pairwise(borders))
    for row in curve:
        part = passages[:, row["from"] - 1 : row["to"] - 1]
        assert row["tokens"] == part.numel()
        assert row["loss"] == pytest.approx(float(part.mean()), **CLOSE)
        so_far = float(passages[:, : row["to"] - 1].mean())
        assert row["perplexity_so_far"] == pytest.approx(math.exp(so_far), **CLOSE)
    with pytest.raises(ValueError, match="length is 101, expected less than the 101 tokens"):
        length_curve(model, ids, 101)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m, ids: strided_perplexity(m, ids, length=8, stride=9), "stride is 9"),
        (lambda m, ids: strided_perplexity(m, ids[:1], length=8, stride=8), "1 tokens"),
        (lambda m, ids: exact_perplexity(m, ids[:1]), "1 tokens"),
        (lambda m, ids: exact_perplexity(m, ids, chunk=0), "chunk is 0"),
        (lambda m, ids: Request([], [1]), "0 tokens of context"),
    ],
)
def test_measurements_that_cannot_be(model, ids, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(model, ids)
