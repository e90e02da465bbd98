"""Rows of names, in both directions."""

from __future__ import annotations

import pytest
import torch

from mambakit.checkpoints.mapping import Row, sources
from mambakit.checkpoints.transforms import CONCAT, SAME, STACK, STACK_CONCAT, SWAP_HALVES

KINDS = ["mamba2", "mlp", "attention", "mlp"]


def names(rows, shapes, kinds=KINDS):
    return {name: source.names for name, source in sources(rows, shapes, kinds).items()}


def test_numbers_kinds_rests_and_experts():
    rows = [
        Row("norm.weight", "final.weight"),
        Row("blocks.{2i}.mixer.*", "layers.{i}.mamba.*", kind="mamba2"),
        Row("blocks.{2i}.mixer.*", "layers.{i}.self_attn.*", kind="attention"),
        Row("blocks.{2i+1}.in_proj", ("layers.{i}.up", "layers.{i}.gate"), CONCAT),
        Row("blocks.{2i+1}.experts", "layers.{i}.experts.{e}.down", STACK),
    ]
    shapes = {
        "norm.weight": (4,),
        "blocks.0.mixer.a.weight": (4,),
        "blocks.2.mixer.a.weight": (4,),
        "blocks.3.in_proj": (8, 4),
        "blocks.1.experts": (3, 2, 4),
    }
    assert names(rows, shapes) == {
        "norm.weight": ("final.weight",),
        "blocks.0.mixer.a.weight": ("layers.0.mamba.a.weight",),
        "blocks.2.mixer.a.weight": ("layers.1.self_attn.a.weight",),
        "blocks.3.in_proj": ("layers.1.up", "layers.1.gate"),
        "blocks.1.experts": tuple(f"layers.0.experts.{e}.down" for e in range(3)),
    }


def test_blocks_counted_by_kind():
    rows = [
        Row("blocks.{n}.a", "layers.{i}.mamba", kind="mamba2"),
        Row("blocks.{n}.a", "layers.{i}.mlp", kind="mlp"),
    ]
    shapes = {f"blocks.{n}.a": () for n in range(4)}
    theirs = ["layers.0.mamba", "layers.0.mlp", "layers.1.mamba", "layers.1.mlp"]
    assert [*names(rows, shapes, 2 * ["mamba2", "mlp"]).values()] == [(name,) for name in theirs]
    assert names(rows, shapes, 4 * ["mamba2"])["blocks.3.a"] == ("layers.3.mamba",)


@pytest.mark.parametrize(
    ("rows", "shapes", "message"),
    [
        ([Row("a", "b")], {"c": ()}, "c is explained by 0 rows"),
        ([Row("a", "b"), Row("a", "c")], {"a": ()}, "a is explained by 2 rows"),
        ([Row("a", "b"), Row("c", "b")], {"a": (), "c": ()}, "b is the source of both a and c"),
        ([Row("blocks.{2i+1}.a", "b.{i}")], {"blocks.2.a": ()}, "explained by 0 rows"),
        ([Row("blocks.{i}.a", "b.{i}", kind="mlp")], {"blocks.0.a": ()}, "explained by 0 rows"),
    ],
)
def test_a_name_without_one_explanation_is_refused(rows, shapes, message):
    with pytest.raises(ValueError, match=message):
        names(rows, shapes)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (SAME, [(4, 3)]),
        (CONCAT, [(4, 3), (4, 3)]),
        (STACK, 3 * [(4, 3)]),
        (STACK_CONCAT, 6 * [(4, 3)]),
        (SWAP_HALVES, [(6, 3)]),
        (SWAP_HALVES, [(6,)]),
    ],
)
def test_transforms_come_back(transform, shapes):
    theirs = [torch.randn(shape) for shape in shapes]
    back = transform.split(transform.join(theirs), len(theirs))
    assert len(back) == len(theirs) and all(map(torch.equal, back, theirs))


def test_swapped_halves_are_in_the_other_order():
    assert SWAP_HALVES.join([torch.arange(4)]).tolist() == [2, 3, 0, 1]
    assert SWAP_HALVES.join([torch.arange(8).view(4, 2)]).tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]
