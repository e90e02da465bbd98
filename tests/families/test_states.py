"""Every family's toy in float64: pieces, tokens, rows, padding, documents, restored states are the whole."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit import Context, LanguageModel, State
from mambakit.families import FAMILIES
from mambakit.testing.toys import TOYS

LENGTH = 23


def test_every_family_has_a_toy():
    assert {name.partition("-")[0] for name in TOYS} == set(FAMILIES)


@pytest.fixture(params=TOYS)
def model(request):
    torch.manual_seed(0)
    model = LanguageModel(TOYS[request.param].ours(), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        yield model.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def close(found, expected):
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [7, 7, 9], [22, 1]])
def test_pieces_with_a_carried_state_are_the_whole(model, tokens, sizes):
    state = model.init_state(3)
    pieces = [model(piece, state) for piece in tokens.split(sizes, dim=1)]
    close(torch.cat(pieces, dim=1), model(tokens))


def test_rows_of_a_batch_are_what_they_are_alone(model, tokens):
    close(torch.cat([model(row[None]) for row in tokens]), model(tokens))


def padded(rows, side):
    """Rows of several lengths as one batch: padding is another document, positions begin with the text."""
    most = max(map(len, rows))
    tokens, number = torch.zeros(len(rows), most, dtype=torch.int64), torch.full((len(rows), most), -1)
    positions = torch.zeros(len(rows), most, dtype=torch.int64)
    for n, row in enumerate(rows):
        at = slice(most - len(row), most) if side == "left" else slice(0, len(row))
        tokens[n, at], number[n, at], positions[n, at] = row, 0, torch.arange(len(row))
    return tokens, Context(seq_idx=number, positions=positions), number == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_they_are_alone(model, tokens, side):
    rows = [tokens[0], tokens[1, :9], tokens[2, :1]]
    batch, context, is_text = padded(rows, side)
    found = model(batch, None, context)
    for n, row in enumerate(rows):
        torch.testing.assert_close(found[n, is_text[n]], model(row[None])[0], rtol=0, atol=1e-9)


def test_a_left_padded_prompt_goes_on_as_it_does_alone(model, tokens):
    rows = [tokens[0, :11], tokens[1, :6], tokens[2, :2]]
    batch, context, _ = padded(rows, "left")
    state = model.init_state(3)
    model(batch, state, context)
    for step in range(3):
        new = tokens[:, 11 + step, None]
        positions = torch.tensor([[len(row) + step] for row in rows])
        found = model(new, state, Context(seq_idx=torch.zeros(3, 1, dtype=torch.int64), positions=positions))
        for n, row in enumerate(rows):
            whole = torch.cat([row, tokens[n, 11 : 12 + step]])[None]
            torch.testing.assert_close(found[n, -1], model(whole)[0, -1], rtol=0, atol=1e-9)


def test_documents_in_one_row_are_what_they_are_alone(model, tokens):
    cuts = [5, 11, 7]
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(cuts))[None].expand(3, -1)
    positions = torch.cat([torch.arange(n) for n in cuts])[None].expand(3, -1)
    packed = model(tokens, None, Context(seq_idx=number, positions=positions))
    alone = [model(piece) for piece in tokens.split(cuts, dim=1)]
    close(packed, torch.cat(alone, dim=1))


def test_a_restored_and_a_forked_state_go_on(model, tokens, tmp_path):
    state = model.init_state(3, max_length=LENGTH)
    model(tokens[:, :10], state)
    fork = state.clone()
    state.save(tmp_path / "state.safetensors")
    model(tokens[:, 10:].flip(1), state)  # the first goes elsewhere
    expected = model(tokens)[:, 10:]
    close(model(tokens[:, 10:], fork), expected)
    close(model(tokens[:, 10:], State.load(tmp_path / "state.safetensors")), expected)


def test_text_in_a_batch_is_the_text_alone(model, tokens):
    def write(rows):
        return mambakit.generate(model, rows, max_tokens=12, sampling=mambakit.Sampling(temperature=0))

    assert torch.equal(write(tokens), torch.cat([write(row[None]) for row in tokens]))


def test_every_parameter_learns(model, tokens):
    with torch.enable_grad():
        model.train()
        context = Context()
        loss = model(tokens, None, context).logsumexp(-1).mean() + sum(context.losses)
        loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
