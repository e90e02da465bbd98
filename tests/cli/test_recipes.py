"""Recipes: how files, bases and words become a run, and that every recipe of the package makes one."""

from __future__ import annotations

import dataclasses

import pytest

from mambakit.config import ConfigError, to_dict
from mambakit.recipes import find_recipe, list_recipes, load_recipe
from mambakit.training import TrainConfig

RECIPES = {recipe.name: recipe for recipe in list_recipes()}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run(name):
    config = load_recipe(name)
    assert config.recipe == name
    assert RECIPES[name].about is not None
    assert TrainConfig.from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", [name for name in RECIPES if load_recipe(name).finetune is None])
def test_every_recipe_makes_a_model_that_suits_its_data(name):
    config = load_recipe(name)
    model = config.task.build_model(config.model, config.data)
    assert sum(p.numel() for p in model.parameters()) > 1000


@pytest.mark.parametrize("name", [name for name in RECIPES if load_recipe(name).finetune is not None])
def test_a_fine_tuning_recipe_names_what_the_model_has(name):
    """Its settings of the model, laid over a small language model's."""
    config = load_recipe(name)
    words = [
        f"model.{key}={value}" for key, value in (("d_model", 16), ("pattern", "'-'"), ("vocab_size", 99))
    ]
    changed = load_recipe(name, words)
    data = dataclasses.replace(config.data, vocabulary="subwords", vocabulary_size=99)
    model = config.task.build_model(changed.model, data)
    assert model.backbone.config.dropout == config.model.get("dropout", 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_a_comment(name):
    first = RECIPES[name].path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")


def test_the_recipes_promised_are_there():
    assert {
        "shakespeare",
        "shakespeare-gpu",
        "s4-mnist",
        "s4-mnist-pixels",
        "selective-copying",
        "induction-heads",
        "parity",
    } <= set(RECIPES)


def test_shakespeare_reads_as_little_and_is_as_small_as_it_says():
    config = load_recipe("shakespeare")
    assert config.train.steps * config.train.batch_size * config.data.length <= 1_550_000
    large = load_recipe("shakespeare-gpu")
    model = large.task.build_model(large.model, large.data)
    assert sum(p.numel() for p in model.parameters()) <= 10_800_000


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if (RECIPES[name].path.read_text()).count("\nbase:")]
)
def test_a_variant_differs_in_its_model_and_not_in_its_task(name):
    variant = load_recipe(name)
    [base] = [
        line.split()[1] for line in RECIPES[name].path.read_text().splitlines() if line.startswith("base:")
    ]
    original = load_recipe(base)
    assert variant.task == original.task
    assert type(variant.data) is type(original.data)
    assert variant.data.length == original.data.length if hasattr(variant.data, "length") else True
    assert variant.model != original.model


def test_later_wins(tmp_path):
    (tmp_path / "one.yaml").write_text("base: shakespeare\ntrain: {steps: 11, batch_size: 3}\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\ntrain: {steps: 12}\nseed: 5\n")
    config = load_recipe(str(tmp_path / "two.yaml"), ["train.log_every=7", "seed=6"])
    assert config.recipe == "two"
    assert (config.train.steps, config.train.batch_size, config.train.log_every, config.seed) == (12, 3, 7, 6)
    assert config.model == load_recipe("shakespeare").model


def test_a_mixer_of_another_type_takes_none_of_the_base_mixers_settings(tmp_path):
    (tmp_path / "s4.yaml").write_text(
        "base: selective-copying\nmodel: {mixers: {M: {type: mamba2, headdim: 8}}}\n"
    )
    assert load_recipe(str(tmp_path / "s4.yaml")).model["mixers"] == {"M": {"type": "mamba2", "headdim": 8}}


def test_what_a_recipe_says_of_itself_is_not_part_of_the_run():
    recipe = find_recipe("shakespeare")
    assert "about" not in recipe.settings
    assert "nats per character" in recipe.about.expected


def test_the_readers_do_not_change_what_they_read(tmp_path):
    (tmp_path / "loop.yaml").write_text("base: pool.yaml\n")
    (tmp_path / "pool.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="based on itself"):
        find_recipe(str(tmp_path / "loop.yaml"))
