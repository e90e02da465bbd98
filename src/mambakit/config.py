"""Configurations: frozen dataclasses inside, validated mappings at the door.

Every part of mambakit is described by a frozen standard-library dataclass deriving from `Config`. Python
code builds them directly and gets plain `ValueError`s from `__post_init__`. Text (YAML recipes, command
lines, run folders) comes in through `Config.from_dict`, which lets pydantic check names and types and turns
whatever it finds into one readable `ConfigError`. pydantic is imported only there, so that the operators,
layers and models need nothing but torch, numpy and safetensors.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A value given by the user that cannot be used, said in one line."""


class Config:
    """Base of all configurations; subclasses are `@dataclass(frozen=True, kw_only=True)`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    @classmethod
    def from_dict(cls: type[C], mapping: Mapping[str, Any], where: str = "") -> C:
        """Build a config from plain data, checking every key and type.

        Args:
            mapping: Nested plain data, as read from YAML or JSON.
            where: Prefix of the key path in error messages, for example `"model"`.

        Returns:
            The frozen config.

        Raises:
            ConfigError: An unknown key (with the nearest valid one), a value of the wrong type, or a value
                that the config itself refuses. The message names the key's full path.
        """
        import pydantic

        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{where or cls.__name__}: expected a mapping of settings, got {mapping!r}")
        try:
            return _adapter(cls).validate_python(dict(mapping))
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from None


class Tagged:
    """A family of configs told apart by the key `type`.

    The direct subclass of `Tagged` is the family (`MixerConfig`); its subclasses are members and give their
    tag in the class statement: `class Mamba2Config(MixerConfig, tag="mamba2")`. A field annotated with the
    family accepts any member, chosen by `type: mamba2` in plain data.
    """

    tag: ClassVar[str]
    members: ClassVar[dict[str, type]]

    def __init_subclass__(cls, tag: str | None = None, **kwargs: Any) -> None:
        """Register a member under its tag, or open a new family."""
        super().__init_subclass__(**kwargs)
        if Tagged in cls.__bases__:
            cls.members = {}
        elif tag is not None:
            cls.tag = tag
            cls.members[tag] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Validate the family by its tag and each member by its own fields."""
        from pydantic_core import core_schema

        if Tagged not in cls.__bases__:
            return handler(source)

        def choose(value: Any) -> Any:
            if isinstance(value, cls):
                return value
            if not isinstance(value, Mapping):
                raise ValueError(f"expected a mapping with a `type`, got {value!r}")
            fields = dict(value)
            tag = fields.pop("type", None)
            if tag not in cls.members:
                raise ValueError(unknown("type", tag, cls.members))
            return cls.members[tag].from_dict(fields)  # type: ignore[attr-defined]

        return core_schema.no_info_plain_validator_function(choose)


def to_dict(config: Any) -> Any:
    """Turn a config back into plain data that `from_dict` accepts and JSON or YAML can hold.

    Args:
        config: A config, or a mapping, sequence or scalar holding configs.

    Returns:
        Nested dicts, lists and scalars; members of a tagged family carry their `type`.
    """
    if isinstance(config, Config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
        return {"type": config.tag, **fields} if isinstance(config, Tagged) else fields
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `override` over `base`, mapping by mapping.

    A mapping that names another `type` than the base replaces it whole: the settings of one mixer mean
    nothing to another.

    Args:
        base: Nested plain data.
        override: Nested plain data whose values win.

    Returns:
        A new nested dict; the inputs stay as they are.
    """
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = (
            merge(old, value) if both and value.get("type", old.get("type")) == old.get("type") else value
        )
    return merged


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Read `key.path=value` words from a command line.

    Args:
        arguments: Words such as `train.steps=60`; the value is read as YAML, so numbers, booleans, lists
            and `{mappings}` work.

    Returns:
        Nested plain data for `merge`.

    Raises:
        ConfigError: A word without `=`, with an empty key, a value that is no YAML, or two words that
            contradict each other (`a=1 a.b=2`).
    """
    import yaml

    result: dict[str, Any] = {}
    for word in arguments:
        path, equals, text = word.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{word!r} is not of the form key=value, for example train.steps=60")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{word!r}: the value cannot be read ({str(error).splitlines()[0]})") from None
        branch = result
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"{word!r} contradicts an earlier setting of {key!r}")
        branch[keys[-1]] = value
    return result


def unknown(kind: str, name: Any, valid: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest valid one.

    Args:
        kind: What the name names, for example `"recipe"`.
        name: The name that was given.
        valid: The names that exist.

    Returns:
        One line: `unknown recipe 'shakespear'; did you mean 'shakespeare'?`, or the list of valid names
        where none is near.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names) or '(none)'}"
    return f"unknown {kind} {name!r}; {hint}"


@functools.cache
def _adapter(cls: type) -> Any:
    import pydantic

    return pydantic.TypeAdapter(cls)


def _explain(cls: type, error: Any, where: str) -> str:
    """Turn the first pydantic complaint into one line with the key's path."""
    problems = error.errors(include_url=False)
    # A misspelt key is reported twice, as unknown and as missing; the first says what to do.
    problem = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    path = [str(part) for part in problem["loc"]]
    key = ".".join([where, *path] if where else path) or cls.__name__
    if problem["type"] == "unexpected_keyword_argument":
        return f"{key}: {unknown('key', path[-1], _fields_at(cls, path[:-1]))}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: a value is required"
    message = problem["msg"].removeprefix("Value error, ")
    nested = problem["type"] == "value_error" and isinstance(problem.get("ctx", {}).get("error"), ConfigError)
    if nested:
        # A member of a tagged family reported its own path; continue it.
        return f"{key}.{message}"
    shown = (
        ""
        if isinstance(problem["input"], (dict, *_dataclass_types(problem["input"])))
        else f", got {problem['input']!r}"
    )
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _dataclass_types(value: Any) -> tuple[type, ...]:
    return (type(value),) if dataclasses.is_dataclass(value) else ()


def _fields_at(cls: type, path: list[str]) -> list[str]:
    """Names of the fields of the config reached from `cls` along `path`."""
    import typing

    for name in path:
        hint = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
        options = [
            t for t in (hint, *typing.get_args(hint)) if isinstance(t, type) and dataclasses.is_dataclass(t)
        ]
        if not options:
            return []
        cls = options[0]
    return [f.name for f in dataclasses.fields(cls) if f.init]
