"""A conversation put down and picked up goes on bit by bit; files that do not fit are refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mambakit import Conversation, LanguageModel, Sampling, generate
from mambakit.generation.fingerprint import fingerprint

SAMPLING = Sampling(seed=3, repetition_penalty=1.2)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def said(model: LanguageModel) -> Conversation:
    """One turn, read and answered."""
    talk = Conversation(model, chunk=3)
    talk.read(PROMPT)
    assert len(list(talk.write(max_tokens=6, sampling=SAMPLING))) == 6
    return talk


def turn(talk: Conversation) -> list[int]:
    talk.read([7, 8])
    return list(talk.write(max_tokens=10, sampling=SAMPLING))


def same(one: Conversation, other: Conversation) -> bool:
    pairs = zip(one.state.tensors(), other.state.tensors(), strict=True)
    return one.tokens == other.tokens and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_a_restored_conversation_goes_on_bit_by_bit(toy, tmp_path):
    talk = said(toy)
    talk.save(tmp_path / "talk.safetensors")
    restored = Conversation.load(tmp_path / "talk.safetensors", toy, chunk=3)
    assert same(restored, talk)
    assert turn(restored) == turn(talk)
    assert same(restored, talk)


def test_a_conversation_is_the_text_read_at_once(toy):
    talk = said(toy)
    before = list(talk.tokens)
    answer = turn(talk)
    assert talk.tokens == [*before, 7, 8, *answer] and before[: len(PROMPT)] == PROMPT
    whole = generate(toy, [[*before, 7, 8]], max_tokens=10, sampling=SAMPLING)
    assert whole[0].tolist() == answer


def test_forks_go_their_own_ways(toy):
    talk = said(toy)
    fork, untouched = talk.fork(), talk.fork()
    answer = turn(fork)
    assert same(talk, untouched) and not same(talk, fork)
    assert turn(talk) == answer and same(talk, fork)


def test_continuations_are_those_of_forks(toy):
    talk, untouched = said(toy), said(toy)
    seeds = [5, 6, 5]
    found = talk.continuations(3, max_tokens=8, sampling=SAMPLING, seeds=seeds).tolist()
    assert same(talk, untouched)
    for seed, text in zip(seeds, found, strict=True):
        sampling = Sampling(**{**vars(SAMPLING), "seed": seed})
        assert list(talk.fork().write(max_tokens=8, sampling=sampling)) == text
    assert found[0] == found[2] != found[1]


def test_a_text_stopped_half_way_is_where_it_was_left(some_toy):
    whole, stopped = said(some_toy), said(some_toy)
    pieces = stopped.write(max_tokens=9, sampling=SAMPLING)
    three = [next(pieces) for _ in range(3)]
    pieces.close()
    assert list(whole.write(max_tokens=3, sampling=SAMPLING)) == three
    assert same(whole, stopped)


def test_nothing_said_writes_nothing(some_toy, tmp_path):
    talk = Conversation(some_toy)
    talk.read([])
    for call in (talk.write, lambda **_: talk.continuations(2, max_tokens=1)):
        with pytest.raises(ValueError, match="nothing was said yet"):
            call(max_tokens=3)
    talk.save(tmp_path / "empty")
    restored = Conversation.load(tmp_path / "empty", some_toy)
    restored.read(PROMPT)
    talk.read(PROMPT)
    assert same(restored, talk)
    with pytest.raises(ValueError, match="count is 0"):
        talk.continuations(0, max_tokens=1)


def rewrite(path, change) -> None:
    """Let `change` edit the tensors and the header of a file."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: at.unlink(), "cannot read a conversation from"),
        (lambda at: at.write_bytes(b""), "cannot read a conversation from"),
        (lambda at: at.write_bytes(at.read_bytes()[:-1]), "cannot read a conversation from"),
        (lambda at: at.write_bytes(at.read_bytes()[:40]), "cannot read a conversation from"),
        (lambda at: at.write_bytes(at.read_bytes()[:-1] + b"\x55"), "is damaged: its content"),
        (lambda at: rewrite(at, lambda t, m: t.pop("state.0.ssm")), "is damaged: its content"),
        (lambda at: rewrite(at, lambda t, m: t["tokens"].add_(1)), "is damaged: its content"),
        (lambda at: rewrite(at, lambda t, m: m.pop("format")), "is no conversation of this version: None"),
        (lambda at: rewrite(at, lambda t, m: m.update(format="x 2")), "'x 2', expected 'mambakit conv"),
        (lambda at: rewrite(at, lambda t, m: m.pop("model")), "belongs to another model"),
        (lambda at: rewrite(at, lambda t, m: m.update(model="{")), "is damaged: its header"),
        (lambda at: rewrite(at, lambda t, m: m.update(model="[]")), "is damaged: its header"),
    ],
)
def test_files_that_do_not_fit_are_one_clear_line(some_toy, tmp_path, damage, message):
    path = tmp_path / "talk.safetensors"
    said(some_toy).save(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Conversation.load(path, some_toy)
    assert "talk.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_another_model_is_refused_with_what_differs(some_toy, tmp_path):
    path = tmp_path / "talk.safetensors"
    said(some_toy).save(path)
    config = some_toy.config
    other = LanguageModel(config, dtype=torch.float64)
    other.load_state_dict(some_toy.state_dict())
    assert same(Conversation.load(path, other), Conversation.load(path, some_toy))
    with pytest.raises(ValueError, match="belongs to another model than this: its tensors have other shapes"):
        Conversation.load(path, other.float())
    other = other.double()
    with torch.no_grad():
        other.load_state_dict(some_toy.state_dict())
        other.backbone.blocks[0].mixer.out_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="its weights are others"):
        Conversation.load(path, other)
    changed = LanguageModel(type(config)(**{**vars(config), "logits_scale": 0.5}), dtype=torch.float64)
    with pytest.raises(ValueError, match="its network has other settings"):
        Conversation.load(path, changed)


def test_a_fingerprint_knows_every_toy_and_its_copy(toy):
    copy = LanguageModel(toy.config, dtype=torch.float64)
    assert fingerprint(copy)["weights"] != fingerprint(toy)["weights"]
    copy.load_state_dict(toy.state_dict())
    assert fingerprint(copy) == fingerprint(toy)
    assert json.dumps(fingerprint(toy))
