"""Every family's toy in float64: pieces, tokens, rows, documents and restored states are the whole."""

from __future__ import annotations

import pytest
import torch

import mambakit
from mambakit import Context, LanguageModel, State
from mambakit.families import FAMILIES
from mambakit.testing.toys import TOYS

LENGTH = 23


def test_every_family_has_a_toy():
    assert set(TOYS) == set(FAMILIES)


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
