"""The published sizes, counted without memory, and what the families' own data must obey."""

from __future__ import annotations

import pytest
import torch

from mambakit.checkpoints.mapping import sources
from mambakit.config import to_dict
from mambakit.families import FAMILIES
from mambakit.models import LanguageModel

SIZES = [(family, name) for family in FAMILIES.values() for name in family.sizes]


@pytest.mark.parametrize(("family", "name"), SIZES, ids=lambda value: getattr(value, "name", value))
def test_a_published_size_has_the_published_number_of_parameters(family, name):
    size = family.sizes[name]
    model = LanguageModel(size.config.ours(), device="meta")
    assert sum(p.numel() for p in model.parameters()) == size.parameters


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_description_in_their_words_comes_back(family):
    for size in family.sizes.values():
        config = size.config.ours()
        for layout in family.layouts:
            published = layout.published.of(config)
            assert layout.published.of(published.ours()) == published
            again = layout.published.from_dict({**to_dict(published), "token": "ignored"})
            assert again == published
            written = {**to_dict(published), **layout.fixed}
            assert [f.name for f in FAMILIES.values() for one in f.layouts if one.matches(written)] == [
                family.name
            ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_tensor_has_one_source(family):
    for layout in family.layouts:
        config = layout.published(vocab_size=64).ours()
        model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = sources(layout.rows, shapes, [block.tag for block in config.blocks])
        assert list(found) == list(shapes)
