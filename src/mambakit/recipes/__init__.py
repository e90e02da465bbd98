"""Recipes: complete training runs as YAML files, each a difference from the defaults or from another recipe.

    about:                   what `mambakit recipes` shows; not part of the run
      summary: ...
      hardware: ...
      cost: ...
      expected: ...
    base: selective-copying  another recipe, by name, or by a path relative to this file
    data: {type: ..., ...}   everything else is a `TrainConfig`

A recipe is resolved in this order, later wins: defaults, base (recursively), the file, the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.config import Config, ConfigError, merge, parse_overrides, unknown
from mambakit.training import TrainConfig

_FOLDER = Path(__file__).parent
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class About(Config):
    """What a reader should know before starting a recipe.

    Attributes:
        summary: What is trained on what, in one line.
        hardware: The machine it is meant for.
        cost: How long it takes there.
        expected: The result to expect.
    """

    summary: str
    hardware: str
    cost: str
    expected: str


@dataclass(frozen=True)
class Recipe:
    """A recipe as written, before defaults and the command line.

    Attributes:
        name: The file's name without its ending; also the name of the run folder.
        path: The file.
        about: What to know before starting it; None in a private recipe that does not say.
        settings: Plain settings of a `TrainConfig`, its base's included.
    """

    name: str
    path: Path
    about: About | None
    settings: dict[str, Any]


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """Make the configuration of a run.

    Args:
        name_or_path: A recipe of the package, such as `"shakespeare"`, or the path of a YAML file.
        overrides: Words such as `"train.steps=60"`, as on the command line.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: No such recipe, a file that cannot be read, or a setting that does not exist or does not
            fit; the message names the nearest valid one.
    """
    recipe = find_recipe(name_or_path)
    changed = merge(recipe.settings, parse_overrides(overrides))
    return TrainConfig.from_dict({"recipe": recipe.name, **changed})


def find_recipe(name_or_path: str) -> Recipe:
    """Read one recipe; arguments and errors as for `load_recipe`."""
    return _read(_locate(name_or_path), ())


def list_recipes() -> list[Recipe]:
    """Read all recipes of the package, in the order of their names.

    Raises:
        ConfigError: One of them is damaged.
    """
    return [_read(path, ()) for path in sorted(_FOLDER.glob("*.yaml"), key=lambda path: path.stem)]


def _locate(name_or_path: str, beside: Path | None = None) -> Path:
    """The file that a name or a path means; relative paths count from `beside` or the working folder."""
    path = Path(beside or "", name_or_path).expanduser()
    if path.suffix not in _SUFFIXES:
        named = {file.stem: file for file in _FOLDER.glob("*.yaml")}
        if name_or_path not in named:
            raise ConfigError(unknown("recipe", name_or_path, named))
        return named[name_or_path]
    if not path.is_file():
        siblings = [str(file) for file in path.parent.glob("*") if file.suffix in _SUFFIXES]
        raise ConfigError(unknown("recipe file", str(path), siblings))
    return path


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    """Read a file and what it is based on; `above` are the files that led here."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: base: the recipe is based on itself")
    settings = _load_yaml(path)
    about = settings.pop("about", None)
    base = settings.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the name or path of a recipe, got {base!r}")
        settings = merge(_read(_locate(base, path.parent), (*above, path.resolve())).settings, settings)
    return Recipe(
        name=path.stem,
        path=path,
        about=None if about is None else About.from_dict(about, where=f"{path}: about"),
        settings=settings,
    )


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return dict(content)
