"""Modular arithmetic: Python itself says what the expressions are worth."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.data import ModularArithmeticConfig
from mambakit.data.samples import IGNORED


def expressions(config: ModularArithmeticConfig, data, numbers) -> list[tuple[list[str], int]]:
    """Each sample as its symbols before the equals sign, and the label there."""
    batch = data.batch(numbers)
    pairs = []
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        symbols = [config.symbols[token] for token in tokens]
        end = symbols.index("=")
        assert set(symbols[end + 1 :]) <= {" "}
        assert [t for t, label in enumerate(labels) if label != IGNORED] == [end]
        pairs.append((symbols[:end], labels[end]))
    return pairs


SETTINGS = {"modulus": st.integers(2, 9), "shortest": st.integers(2, 20), "more": st.integers(1, 40)}


@given(**SETTINGS, brackets=st.booleans(), seed=st.integers(0, 99))
def test_python_computes_the_same(modulus, shortest, more, brackets, seed):
    config = ModularArithmeticConfig(
        brackets=brackets, modulus=modulus, min_length=shortest, max_lengths=(shortest + more,)
    )
    for symbols, answer in expressions(config, config.train(seed), range(6)):
        assert shortest <= len(symbols) + 1 <= shortest + more
        assert eval("".join(symbols)) % modulus == answer


@given(seed=st.integers(0, 99))
def test_with_brackets_every_operation_has_its_own(seed):
    config = ModularArithmeticConfig(brackets=True, min_length=30, max_lengths=(40,))
    for symbols, _ in expressions(config, config.train(seed), range(4)):
        tree = ast.parse("".join(symbols), mode="eval").body
        operations = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
        assert all(isinstance(node.op, ast.Add | ast.Sub) for node in operations)
        # One pair for each operation, and one for each leaf like (3) or (-3). Leaves have at most 4 tokens,
        # so 29 tokens or more need at least 4 operations.
        assert symbols.count("(") == symbols.count(")") >= len(operations) >= 4


def test_all_trees_of_a_size_are_as_likely_as_in_the_protocol():
    # 6 tokens before the equals sign: (left op right) with 1 + 2 or 2 + 1 tokens, each half of the time.
    config = ModularArithmeticConfig(brackets=True, min_length=7, max_lengths=(7,))
    shapes = Counter(
        "".join("n" if symbol.isdigit() else symbol for symbol in symbols)
        for symbols, _ in expressions(config, config.train(0), range(4000))
    )
    assert set(shapes) == {"(n+-n)", "(n--n)", "(-n+n)", "(-n-n)"}
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in shapes.values())


@pytest.mark.parametrize(("length", "shape"), [(2, "n"), (3, "-n"), (4, "(n)"), (5, "(-n)")])
def test_short_expressions_with_brackets(length, shape):
    config = ModularArithmeticConfig(brackets=True, min_length=length, max_lengths=(length,))
    for symbols, _ in expressions(config, config.train(0), range(20)):
        assert "".join("n" if symbol.isdigit() else symbol for symbol in symbols) == shape


@pytest.mark.parametrize("brackets", [False, True])
def test_lengths_and_symbols_are_uniform(brackets):
    config = ModularArithmeticConfig(brackets=brackets, min_length=3, max_lengths=(20,))
    pairs = expressions(config, config.train(0), range(9000))
    lengths = Counter(len(symbols) + 1 for symbols, _ in pairs)
    assert sorted(lengths) == (list(range(3, 21)) if brackets else list(range(4, 21, 2)))
    expected = 9000 / len(lengths)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in lengths.values())
    symbols = Counter(symbol for symbols, _ in pairs for symbol in symbols)
    digits = [symbols[str(n)] for n in range(5)]
    assert all(abs(count - sum(digits) / 5) < 5 * (sum(digits) / 5) ** 0.5 for count in digits)
    if not brackets:
        operators = [symbols[sign] for sign in "+-*"]
        assert all(abs(count - sum(operators) / 3) < 5 * (sum(operators) / 3) ** 0.5 for count in operators)


@pytest.mark.parametrize("brackets", [False, True])
def test_evaluations_have_exactly_their_length_and_the_right_answers(brackets):
    config = ModularArithmeticConfig(brackets=brackets, evaluation_lengths=(6, 256), evaluation_samples=20)
    for length in (6, 256):
        data = config.evaluations()[f"length_{length}"]
        for symbols, answer in expressions(config, data, range(20)):
            assert len(symbols) + 1 == length
            assert eval("".join(symbols)) % 5 == answer


def test_the_defaults_are_the_protocols():
    config = ModularArithmeticConfig()
    assert (config.modulus, config.min_length, config.max_lengths, config.brackets) == (5, 3, (40,), False)
    assert (config.vocab_size, config.chance) == (12, 0.2)
    assert len(config.symbols) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modulus": 1}, "modulus is 1"),
        ({"min_length": 1}, "min_length is 1, expected at least 2"),
        ({"evaluation_lengths": (40, 41)}, "expected even numbers without brackets"),
        ({"min_length": 3, "max_lengths": (3,)}, r"max_lengths is \(3,\), expected at least 4"),
    ],
)
def test_settings_that_make_no_task_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModularArithmeticConfig(**settings)
