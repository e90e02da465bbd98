"""The published sizes, counted without memory, and what the families' own data must obey."""

from __future__ import annotations

import pytest
import torch

from mambakit.checkpoints.mapping import sources
from mambakit.config import to_dict
from mambakit.families import FAMILIES
from mambakit.families.family import resolved
from mambakit.layers import AttentionConfig, MoE
from mambakit.models import LanguageModel

SIZES = [(family, name) for family in FAMILIES.values() for name in family.sizes]


@pytest.mark.parametrize(("family", "name"), SIZES, ids=lambda value: getattr(value, "name", value))
def test_a_published_size_has_the_published_number_of_parameters(family, name):
    size = family.sizes[name]
    model = LanguageModel(size.config.ours(), device="meta")
    assert sum(p.numel() for p in model.parameters()) == size.parameters


ACTIVE = [(family, name) for family, name in SIZES if family.sizes[name].active]


@pytest.mark.parametrize(("family", "name"), ACTIVE, ids=lambda value: getattr(value, "name", value))
def test_a_token_uses_the_published_number_of_parameters(family, name):
    size = family.sizes[name]
    model = LanguageModel(size.config.ours(), device="meta")
    idle = 0
    for module in model.modules():
        if isinstance(module, MoE):
            experts = module.in_proj.weight.numel() + module.out_proj.weight.numel()
            idle += experts // module.config.n_experts * (module.config.n_experts - module.config.top_k)
    assert size.parameters - idle == size.active


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_description_in_their_words_comes_back(family):
    for size in family.sizes.values():
        config = resolved(size.config.ours())
        layouts = [layout for layout in family.layouts if isinstance(size.config, layout.published)]
        for layout in layouts if any(type(b) is AttentionConfig for b in config.blocks) else family.layouts:
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
        config = layout.published().ours()
        model = LanguageModel(config, device="meta", dtype=torch.bfloat16)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = sources(layout.rows_of(config), shapes, [block.tag for block in config.blocks])
        assert list(found) == list(shapes)
