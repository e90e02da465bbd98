"""Tests of a language model that are log-likelihoods underneath.

LAMBADA          say the last word of a passage that only the whole passage gives away (Paperno et al.,
                 1606.06031; the detokenised version of GPT-2, scored as the lm-evaluation-harness does)
multiple choice  which of several answers is the likeliest?  acc takes the sum of their tokens'
                 log-probabilities, acc_norm that sum per character, so that long answers are not punished
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambakit.data.config import DataError
from mambakit.evaluation.reader import Reader
from mambakit.evaluation.scoring import TOKENS, Request, encode_pair, score


def lambada(reader: Reader, passages: Sequence[str], *, tokens: int = TOKENS) -> dict[str, float]:
    """Let a model say the last word of passages.

    Args:
        reader: The model.
        passages: Texts of several words.
        tokens: Most tokens to read at once.

    Returns:
        `accuracy`: share of passages whose last word is what the model would write, greedily, token by token;
        `perplexity`: `exp` of the mean surprise per word; `passages`.

    Raises:
        DataError: A passage of one word.
    """
    requests = []
    for number, text in enumerate(passages, 1):
        context, space, word = text.rstrip().rpartition(" ")
        if not space:
            raise DataError(f"passage {number} is {text[:40]!r}, expected several words")
        requests.append(Request(*encode_pair(reader.tokenizer, context, f" {word}", reader.end)))
    scores = score(reader.model, requests, tokens=tokens)
    nats = -sum(one.log_likelihood for one in scores) / len(scores)
    return {
        "accuracy": sum(one.is_greedy for one in scores) / len(scores),
        "perplexity": math.exp(min(nats, 700.0)),
        "passages": len(scores),
    }


def multiple_choice(
    reader: Reader, questions: Sequence[dict[str, Any]], *, tokens: int = TOKENS
) -> dict[str, float]:
    """Let a model choose among answers by their likelihood.

    Args:
        reader: The model.
        questions: Each a `context`, its `choices` (continuations, written with the space before them where
            one belongs), and the number of the right one, `answer`.
        tokens: Most tokens to read at once.

    Returns:
        `acc`, `acc_norm`, their standard errors, and `questions`.

    Raises:
        DataError: A question without one of these.
    """
    requests, sizes = [], []
    for number, question in enumerate(questions, 1):
        context, choices, _ = _question(question, number)
        sizes.append(len(choices))
        requests += [Request(*encode_pair(reader.tokenizer, context, c, reader.end)) for c in choices]
    scores = iter(score(reader.model, requests, tokens=tokens))
    right, right_norm = [], []
    for question, size in zip(questions, sizes, strict=True):
        sums = [next(scores).log_likelihood for _ in range(size)]
        means = [nats / len(text) for nats, text in zip(sums, question["choices"], strict=True)]
        right.append(sums.index(max(sums)) == question["answer"])
        right_norm.append(means.index(max(means)) == question["answer"])
    return {
        "acc": sum(right) / len(right),
        "acc_stderr": _standard_error(right),
        "acc_norm": sum(right_norm) / len(right_norm),
        "acc_norm_stderr": _standard_error(right_norm),
        "questions": len(right),
    }


def read_passages(path: Path) -> list[str]:
    """Read LAMBADA's file: a JSON object with "text" on every line.

    Raises:
        DataError: The file cannot be read, or a line is something else.
    """
    return [_key(line, "text", str, f"{path}, line {number}") for number, line in _lines(path)]


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read multiple-choice questions: a JSON object with "context", "choices" and "answer" on every line.

    Raises:
        DataError: The file cannot be read, or a line is something else.
    """
    return [line for _, line in _lines(path)]


def _question(question: dict[str, Any], number: int) -> tuple[str, list[str], int]:
    where = f"question {number}"
    context = _key(question, "context", str, where)
    choices = _key(question, "choices", list, where)
    answer = _key(question, "answer", int, where)
    if not all(isinstance(one, str) and one for one in choices) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer is {answer} of {len(choices)} choices, expected the number of one")
    return context, choices, answer


def _key(line: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if not isinstance(line.get(key), kind):
        raise DataError(f'{where}: expected "{key}" to be of type {kind.__name__}, got {line.get(key)!r}')
    return line[key]


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from None
    if not found or not all(isinstance(line, dict) for _, line in found):
        raise DataError(f"{str(path)!r}: expected a JSON object on every line")
    return found


def _standard_error(right: Sequence[bool]) -> float:
    """Of a mean, with the sample's variance."""
    n, mean = len(right), sum(right) / len(right)
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else 0.0
