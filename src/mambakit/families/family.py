"""What a published family is: layouts in which its checkpoints come, and the models that were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from mambakit.checkpoints.mapping import Row
from mambakit.config import Config
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mixer import MixerConfig
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.parallel import ParallelConfig
from mambakit.layers.shared import SharedConfig
from mambakit.models.backbone import DEFAULT_MIXERS
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


def rope_theta(parameters: Mapping[str, Any] | None, otherwise: float) -> float:
    """Base of the rotary embedding, in either of the places where versions of transformers keep it.

    Raises:
        ValueError: Another kind of rotary embedding than the plain one.
    """
    rope = parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters: rope_type is {rope['rope_type']!r}, expected 'default'")
    return float(rope.get("rope_theta", otherwise))


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a family's checkpoints are written.

    Attributes:
        name: `transformers`, `mamba_ssm`, `blackmamba` or `megatron`.
        matches: Whether a `config.json` is of this layout and family.
        published: Its keys.
        rows: Its tensors, or how they follow from the network.
        fixed: Keys that every such file has.
        stores_tied_head: Whether the head's weight is stored even where it is the embedding.
        pickled: Whether its readers want PyTorch's old file instead of safetensors.
        wrapped: Whether that file holds the tensors under the key `model`.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    published: type[Published]
    rows: Sequence[Row] | Callable[[LanguageModelConfig], Sequence[Row]]
    fixed: Mapping[str, Any]
    stores_tied_head: bool = False
    pickled: bool = False
    wrapped: bool = False

    def rows_of(self, config: LanguageModelConfig) -> Sequence[Row]:
        """The tensors of a network."""
        return self.rows(config) if callable(self.rows) else self.rows


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model.

    Attributes:
        hub: Repository on the Hugging Face hub.
        parameters: How many it has, tied ones once.
        config: What its `config.json` says of the network.
        active: How many of them a token uses, where experts take turns.
    """

    hub: str
    parameters: int
    config: Published
    active: int | None = None


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


def resolved(config: LanguageModelConfig) -> LanguageModelConfig:
    """The same network with sizes of attention and MLPs outright, where they followed from the width."""
    mixers = {
        letter: _resolved(mixer, config.d_model)
        for letter, mixer in {**DEFAULT_MIXERS, **config.mixers}.items()
        if letter in config.pattern
    }
    return dataclasses.replace(config, mixers=mixers)


def _resolved(mixer: MixerConfig, d_model: int) -> MixerConfig:
    if isinstance(mixer, AttentionConfig):
        return dataclasses.replace(mixer, head_dim=mixer.headdim(d_model), n_kv_heads=mixer.kv_heads)
    if isinstance(mixer, GatedMLPConfig):
        start = {field.name: field.default for field in dataclasses.fields(mixer)}
        sizes = {"expand": start["expand"], "multiple_of": start["multiple_of"]}
        return dataclasses.replace(mixer, d_hidden=mixer.hidden(d_model), **sizes)
    if isinstance(mixer, ParallelConfig):
        branches = {name: _resolved(branch, d_model) for name, branch in mixer.branches.items()}
        return dataclasses.replace(mixer, branches=branches)
    if isinstance(mixer, SharedConfig):
        return dataclasses.replace(
            mixer,
            attention=_resolved(mixer.attention, 2 * d_model),
            mlp=_resolved(mixer.mlp, d_model),
            inner=_resolved(mixer.inner, d_model),
        )
    return mixer


def check_same(found: LanguageModelConfig, wanted: LanguageModelConfig) -> None:
    """Check that a description in their words, read back, is the network that was described.

    Raises:
        ValueError: A setting that their words cannot say.
    """
    found, wanted = resolved(found), resolved(wanted)
    if len(found.blocks) != len(wanted.blocks):
        raise ValueError(f"{len(wanted.blocks)} blocks, where such files have {len(found.blocks)}")
    _compare(found, wanted, "the network", _TRAINING)
    for n, (a, b) in enumerate(zip(found.blocks, wanted.blocks, strict=True)):
        _compare(a, b, f"block {n}", _INITIAL)


def _compare(found: Any, wanted: Any, where: str, ignored: Collection[str] = _INITIAL) -> None:
    """Compare two configs setting by setting, with those of the mixers that they hold."""
    if type(found) is not type(wanted):
        raise ValueError(
            f"{where} is a {type(wanted).__name__}, where such files have a {type(found).__name__}"
        )
    for field in dataclasses.fields(found):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if field.name in ignored or theirs == ours:
            continue
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping) and theirs.keys() == ours.keys():
            pairs = [(theirs[key], ours[key], f"{key} of {where}") for key in theirs]
        else:
            pairs = [(theirs, ours, f"{field.name} of {where}")]
        for a, b, name in pairs:
            if isinstance(a, Config) and isinstance(b, Config):
                _compare(a, b, name)
            elif a != b:
                raise ValueError(f"{field.name}={ours} in {where}, where such files have {theirs}")
