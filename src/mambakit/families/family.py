"""What a published family is: layouts in which its checkpoints come, and the models that were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from mambakit.checkpoints.mapping import Row
from mambakit.config import Config
from mambakit.layers.mixer import MixerConfig
from mambakit.models.language import LanguageModelConfig

M = TypeVar("M", bound=MixerConfig)
MOST_LAYERS = 10_000
"""No more are built, whatever a file says."""


class Published(Config):
    """Base of a dataclass with the keys of a published `config.json`, as far as they describe the network.

    Keys that are absent have the default of the implementation that published them; keys that say nothing
    about the network are ignored. Pairs our name -> their name translate fields in both directions.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    def ours(self) -> LanguageModelConfig:
        """Describe the same network in our words.

        Raises:
            ValueError: Settings that no network of ours has.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define ours")

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Published:
        """Describe a network of ours in their words, as far as they reach; `check_same` tells how far.

        Raises:
            ValueError: The network is plainly not one of this family.
        """
        raise NotImplementedError(f"{cls.__name__} does not define of")

    def take(self, pairs: Mapping[str, str]) -> dict[str, Any]:
        """Our settings, from pairs our name -> their name."""
        return {ours: getattr(self, theirs) for ours, theirs in pairs.items()}


def give(config: Config, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Their settings, from pairs our name -> their name: the inverse of `Published.take`."""
    return {theirs: getattr(config, ours) for ours, theirs in pairs.items()}


def whole(number: float) -> float:
    """The number, as an `int` if it is one: readers that want integers refuse 2.0."""
    return int(number) if number == int(number) else number


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a family's checkpoints are written.

    Attributes:
        name: `transformers` or `mamba_ssm`.
        matches: Whether a `config.json` is of this layout and family.
        published: Its keys.
        rows: Its tensors.
        fixed: Keys that every such file has.
        stores_tied_head: Whether the head's weight is stored even where it is the embedding.
        pickled: Whether its readers want PyTorch's old file instead of safetensors.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    published: type[Published]
    rows: Sequence[Row]
    fixed: Mapping[str, Any]
    stores_tied_head: bool = False
    pickled: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model.

    Attributes:
        hub: Repository on the Hugging Face hub.
        parameters: How many it has, tied ones once.
        config: What its `config.json` says of the network.
    """

    hub: str
    parameters: int
    config: Published


@dataclasses.dataclass(frozen=True)
class Family:
    """A published family of models.

    Attributes:
        name: Its name.
        layouts: How its checkpoints are written; the first is the one that we write by default.
        sizes: Published models by name.
    """

    name: str
    layouts: Sequence[Layout]
    sizes: Mapping[str, Size]


def is_of_type(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """A test for the `model_type` of a transformers configuration."""
    return lambda found: found.get("model_type") in names


def repeated(letters: str, count: int) -> str:
    """A pattern that repeats letters.

    Raises:
        ValueError: A count that no network has.
    """
    if not 1 <= count <= MOST_LAYERS:
        raise ValueError(f"{count} layers, expected 1 to {MOST_LAYERS}")
    return f"{count}{letters}" if len(letters) == 1 else f"{count}({letters})"


def only(config: LanguageModelConfig, kind: type[M]) -> M:
    """The one config that all blocks of a network share.

    Raises:
        ValueError: Blocks of another kind, or with several configs.
    """
    found = one_of(config.blocks, kind)
    if any(block != found for block in config.blocks):
        raise ValueError(f"pattern {config.pattern!r}, expected blocks of one {kind.__name__} only")
    return found


def one_of(blocks: Iterable[MixerConfig], *kinds: type[M]) -> M | None:
    """The config that all blocks of some kinds share; None if there are no such blocks.

    Raises:
        ValueError: Several configs.
    """
    found = [block for block in blocks if type(block) in kinds]
    if any(block != found[0] for block in found):
        raise ValueError(f"blocks of one kind with several settings: {found[0]} and others")
    return found[0] if found else None


_INITIAL = frozenset(
    {
        "dt_min",
        "dt_max",
        "dt_init_floor",
        "dt_init",
        "dt_scale",
        "A_init_range",
        "balance_loss",
        "balance_rate",
    }
)
"""Settings of mixers that matter for a start or for training only: most published files do not have them."""
_TRAINING = frozenset({"initializer_range", "dropout", "pattern", "mixers"})


def check_same(found: LanguageModelConfig, wanted: LanguageModelConfig) -> None:
    """Check that a description in their words, read back, is the network that was described.

    Raises:
        ValueError: A setting that their words cannot say.
    """
    pairs = [("the network", found, wanted, _TRAINING)]
    if len(found.blocks) != len(wanted.blocks):
        raise ValueError(f"{len(wanted.blocks)} blocks, where such files have {len(found.blocks)}")
    pairs += [
        (f"block {n}", *both, _INITIAL)
        for n, both in enumerate(zip(found.blocks, wanted.blocks, strict=True))
    ]
    for where, a, b, ignored in pairs:
        if type(a) is not type(b):
            raise ValueError(f"{where} is a {type(b).__name__}, where such files have a {type(a).__name__}")
        for field in dataclasses.fields(a):
            theirs, ours = getattr(a, field.name), getattr(b, field.name)
            if field.name not in ignored and theirs != ours:
                raise ValueError(f"{field.name}={ours} in {where}, where such files have {theirs}")
