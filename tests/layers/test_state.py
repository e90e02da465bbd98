"""The state: clone, select, reset, size, and the file it is saved in."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers.mixer import State


def example() -> State:
    return State(
        {
            "0": State({"conv": torch.randn(3, 2, 4), "ssm": torch.randn(3, 4, 5)}),
            "1": State({"k": torch.randn(3, 7, 2, dtype=torch.bfloat16), "length": torch.tensor(6)}),
        }
    )


def test_clone_is_independent():
    state = example()
    fork = state.clone()
    fork["0"]["ssm"].zero_()
    assert state["0"]["ssm"].abs().sum() > 0


def test_to_narrows_what_is_floating_point_in_a_copy():
    state = example()
    narrow = state.to(torch.bfloat16)
    assert torch.equal(narrow["0"]["ssm"], state["0"]["ssm"].bfloat16())
    assert torch.equal(narrow["1"]["k"], state["1"]["k"])
    assert narrow["1"]["length"].dtype == torch.int64
    for (_, tensor), (_, copied) in zip(state.tensors(), narrow.tensors(), strict=True):
        assert copied.data_ptr() != tensor.data_ptr()


def test_select_reorders_and_repeats_rows():
    state = example()
    chosen = state.select(torch.tensor([2, 0, 2, 1]))
    assert torch.equal(chosen["0"]["conv"], state["0"]["conv"][[2, 0, 2, 1]])
    assert chosen["1"]["length"] == 6
    with pytest.raises(IndexError):
        state.select(torch.tensor([3]))


def test_reset_rows_and_all():
    state = example()
    before = state.clone()
    state.reset(torch.tensor([1]))
    assert state["0"]["ssm"][1].abs().sum() == 0
    assert torch.equal(state["0"]["ssm"][[0, 2]], before["0"]["ssm"][[0, 2]])
    assert state["1"]["length"] == 6
    state.reset()
    assert all(tensor.abs().sum() == 0 for _, tensor in state.tensors())


def test_nbytes_counts_every_tensor():
    assert example().nbytes == 4 * (3 * 2 * 4 + 3 * 4 * 5) + 2 * (3 * 7 * 2) + 8


def test_save_and_load(tmp_path):
    state = example()
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert {n for n, _ in loaded.tensors()} == {n for n, _ in state.tensors()}
    for name, tensor in loaded.tensors():
        assert torch.equal(tensor, dict(state.tensors())[name])
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_damaged_file_is_one_clear_error(tmp_path):
    path = tmp_path / "state.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cannot read a state from .*state.safetensors"):
        State.load(path)
    with pytest.raises(ValueError, match=r"missing\.safetensors"):
        State.load(tmp_path / "missing.safetensors")
