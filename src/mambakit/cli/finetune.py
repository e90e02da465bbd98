"""`mambakit finetune RECIPE [key=value ...]`."""

from __future__ import annotations

from typing import Annotated

import typer

from mambakit.cli.options import Backend, Settings
from mambakit.cli.train import carry_out
from mambakit.config import ConfigError
from mambakit.recipes import load_recipe


def finetune(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A name from `mambakit recipes`, or the path of a YAML file."),
    ],
    settings: Settings = None,
    backend: Backend = None,
) -> None:
    """Go on training a model that is already trained: all of it, adapters, or its last layers.

    mambakit finetune sst2 finetune.source=runs/novels finetune.mode=lora finetune.lora.rank=16
    """
    words = settings or []
    config = load_recipe(recipe, words)
    if config.finetune is None:
        raise ConfigError(
            f"{recipe} starts from nothing; give the model to start from, such as "
            "finetune.source=runs/novels, or use `mambakit train`"
        )
    carry_out("finetune", config, recipe, words, backend)
