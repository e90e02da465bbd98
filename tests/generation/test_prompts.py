"""Prompts of different lengths in one batch: every row is what it is alone, for every family."""

from __future__ import annotations

import pytest
import torch

from mambakit.generation import Sampling, generate, generate_text, stream, stream_text
from mambakit.generation.prompts import as_prompts, read

GREEDY = Sampling(temperature=0)
LENGTHS = (13, 4, 1, 9)


def ragged(lengths=LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(50, (n,), generator=draw).tolist() for n in lengths]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask; the padding is a token that the texts use too."""
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), None)
        tokens[number, place], mask[number, place] = torch.tensor(row), 1
    return tokens, mask


@pytest.mark.parametrize("chunk", [4096, 4])
def test_states_and_logits_of_a_ragged_batch_are_those_of_its_rows(toy, chunk):
    """Pieces of 4 end in the padding, with it, and in the text."""
    prompts = as_prompts(ragged())
    state = toy.init_state(len(LENGTHS))
    logits = toy.lm_head(read(toy, prompts, state, chunk))
    for name, leaf in state.tensors():
        assert not name.endswith("position") or leaf.tolist() == list(LENGTHS)
    after = torch.arange(len(LENGTHS) * 3).view(len(LENGTHS), 3)
    further = toy(after, state)
    for number, row in enumerate(ragged()):
        own = toy.init_state(1)
        close(logits[number], toy(torch.tensor([row]), own)[0, -1])
        close(further[number], toy(after[number, None], own)[0])


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(seed=5, top_k=20, repetition_penalty=1.3)], ids=["greedy", "sampled"]
)
def test_a_ragged_batch_writes_what_its_rows_write_alone(toy, sampling):
    rows, seeds = ragged(), [11, 3, 3, 8]
    alone = [
        generate(toy, [row], max_tokens=8, sampling=sampling, seeds=[seed])
        for row, seed in zip(rows, seeds, strict=True)
    ]
    together = generate(toy, rows, max_tokens=8, sampling=sampling, seeds=seeds, prefill_chunk=5)
    assert torch.equal(together, torch.cat(alone))
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        same = generate(toy, tokens, mask=mask, max_tokens=8, sampling=sampling, seeds=seeds)
        assert torch.equal(same, together)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3", "bamba"])
def test_kernels_of_the_processor_keep_padding_out_too(named_toy, name):
    model = named_toy(name, torch.float32)
    state = model.init_state(len(LENGTHS))
    logits = model.lm_head(read(model, as_prompts(ragged()), state, 6))
    for number, row in enumerate(ragged()):
        own = model.init_state(1)
        torch.testing.assert_close(
            logits[number], model(torch.tensor([row]), own)[0, -1], rtol=1e-4, atol=1e-4
        )
        for (leaf, found), (_, alone) in zip(state.tensors(), own.tensors(), strict=True):
            if leaf.endswith(("ssm", "conv")):
                torch.testing.assert_close(found[number], alone[0], rtol=1e-4, atol=1e-5)


def test_rows_of_a_ragged_batch_end_each_for_itself(some_toy):
    rows = ragged()
    free = generate(some_toy, rows, max_tokens=8, sampling=Sampling(seed=1))
    stop = int(free[0, 5])
    new = generate(some_toy, rows, max_tokens=8, sampling=Sampling(seed=1), stop_tokens=[stop])
    for own, ended in zip(free.tolist(), new.tolist(), strict=True):
        until = own.index(stop) + 1 if stop in own else len(own)
        assert ended[:until] == own[: min(until, len(ended))]
        assert set(ended[until:]) <= {stop}


def test_a_stop_token_waits_for_the_least_number_of_tokens(some_toy):
    rows = ragged()
    settings = {"max_tokens": 12, "sampling": Sampling(seed=1)}
    stop = int(generate(some_toy, rows, **settings)[0, 0])
    assert int(generate(some_toy, rows[:1], **settings, stop_tokens=[stop]).shape[1]) == 1
    new = generate(some_toy, rows[:1], **settings, stop_tokens=[stop], min_tokens=4)[0].tolist()
    assert stop not in new[:4]
    # The rule by hand: the same numbers drawn from logits without that token.
    hidden = generate(some_toy, rows[:1], **{**settings, "max_tokens": 4}, stop_tokens=[stop], min_tokens=4)
    assert hidden[0].tolist() == new[:4]


class Letters:
    """50 symbols, a token each."""

    vocab_size = 50

    def encode(self, text):
        return [ord(c) - ord("A") for c in text]

    def decode(self, tokens):
        return "".join(chr(ord("A") + int(t)) for t in tokens)


def test_texts_together_are_the_texts_alone(some_toy):
    prompts, seeds = ["HELLO", "A", "WORLDS"], [4, 9, 2]
    settings = {"max_tokens": 30, "stop_tokens": [17]}

    def alone(prompt, seed, **more):
        sampling = Sampling(seed=seed)
        return "".join(stream_text(some_toy, Letters(), prompt, sampling=sampling, **settings, **more))

    free = [alone(*pair) for pair in zip(prompts, seeds, strict=True)]
    assert generate_text(some_toy, Letters(), prompts, seeds=seeds, **settings) == free
    stop = [free[0][2:4], max(free, key=len)[5:8]]  # one ends the first text early, one another
    expected = [alone(*pair, stop=stop) for pair in zip(prompts, seeds, strict=True)]
    assert expected != free
    assert generate_text(some_toy, Letters(), prompts, seeds=seeds, stop=stop, **settings) == expected


def test_all_texts_stopped_early_stop_the_model(some_toy):
    def forward(*_):
        forward.calls += 1

    forward.calls = 0
    handle = some_toy.register_forward_hook(forward)
    prompts = ["HELLO", "WORLDS"]
    generate_text(
        some_toy, Letters(), prompts, max_tokens=200, seeds=[1, 2], stop=[chr(c) for c in range(65, 115)]
    )
    handle.remove()
    assert forward.calls == 0, "the prompt's features gave the first token, which ended both"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "there is no prompt"),
        ({"tokens": [[1], []]}, r"prompt 1 is \(0,\)"),
        ({"tokens": [[1.5]]}, "prompt 0 is .* torch.float32"),
        ({"tokens": [[1]], "mask": torch.ones(1, 1)}, "mask was given with a list"),
        ({"tokens": torch.ones(2, 3)}, "tokens is torch.float32"),
        ({"mask": torch.ones(2, 4)}, r"mask has shape \(2, 4\)"),
        ({"mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "row 0 of the mask has a gap"),
        ({"mask": torch.tensor([[0, 1, 1], [0, 0, 0]])}, "row 1 of the mask is all padding"),
        ({"min_tokens": 4}, "min_tokens is 4, expected 0 to max_tokens=3"),
        ({"seeds": [1]}, r"seeds is \[1\], expected 2 numbers"),
        ({"seeds": [1, -1]}, r"seeds is \[1, -1\]"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(some_toy, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(some_toy, **{"tokens": torch.ones(2, 3, dtype=torch.int64), "max_tokens": 3, **arguments})


def test_prompts_of_different_lengths_do_not_continue_a_state(some_toy):
    with pytest.raises(ValueError, match="cannot continue a state"):
        stream(some_toy, [[1, 2], [3]], max_tokens=3, state=some_toy.init_state(2))
    new = generate(some_toy, [[1, 2], [3, 4]], max_tokens=3, state=some_toy.init_state(2), sampling=GREEDY)
    assert torch.equal(new, generate(some_toy, [[1, 2], [3, 4]], max_tokens=3, sampling=GREEDY))
