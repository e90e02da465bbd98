"""Low-rank adapters: what fine-tuning learns is a product of two thin matrices beside a frozen one.

    y = W x + b + (alpha / r) B A dropout(x),        A (r, d_in), B (d_out, r), B = 0 at first

Every linear layer of the mixers may have one, and the embedding. Layers are called and never reached into,
so the adapter of `in_proj`, `x_proj`, `dt_proj` and `out_proj` each computes and learns; implementations that
hand `W` to a fused kernel pass by theirs without a word.

Parameter names are those of the layer with `lora_A.weight` and `lora_B.weight` behind, as in the PEFT
library, whose folders `save_adapter` writes and `load_adapter` reads.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2106.09685), section 4.1.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.config import Config, ConfigError, unknown

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""What PEFT puts before every name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Settings of low-rank adapters.

    Attributes:
        rank: Width `r` of an adapter.
        alpha: Adapters are scaled by `alpha / rank`.
        dropout: Probability that an adapter's input is dropped in training.
        targets: Names of the layers that get one: linear layers of the mixers, such as `in_proj`, and
            `embedding`; empty is every linear layer of the mixers.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}, expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected a probability below 1")


class Adapted(nn.Module):
    """What layers with an adapter share: the adapter's product goes into the weight and out again."""

    weight: nn.Parameter
    _unmerged: Tensor | None

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter's product now."""
        return self._unmerged is not None

    def delta(self) -> Tensor:
        """The adapter as one matrix of the weight's shape."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta")

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight; the weight as it was is kept aside, so `unmerge` is exact."""
        if not self.merged:
            self._unmerged = self.weight.detach().clone()
            self.weight.add_(self.delta())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back, bit by bit as it was before `merge`."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None


class LoRALinear(Adapted, nn.Linear):
    """A linear layer with a low-rank adapter; its own weight and bias are frozen.

    Args:
        linear: The layer, whose parameters are taken over, not copied.
        config: The adapter's settings.
    """

    adapter = ("lora_A.weight", "lora_B.weight")
    """Names of what is learned."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig = LoRAConfig()) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        made = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, config.rank, **made)
        self.lora_B = nn.Linear(config.rank, self.out_features, **made)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scale = config.alpha / config.rank
        self._unmerged = None
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_adapter()
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer and adapter.

        Args:
            x: Activations `(..., d_in)`.

        Returns:
            Activations `(..., d_out)`.
        """
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + self.scale * self.lora_B(self.lora_A(self.dropout(x)))

    def delta(self) -> Tensor:
        """The adapter as one matrix `(d_out, d_in)`: `(alpha / r) B A`."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    def folded(self) -> nn.Linear:
        """A plain layer that computes the same, for good."""
        self.merge()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def reset_adapter(self) -> None:
        """Draw A as `torch.nn.Linear` draws its weight and set B to zero: the layer is what it was."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)


class LoRAEmbedding(Adapted, nn.Embedding):
    """An embedding with a low-rank adapter: `E[token] + (alpha / r) B A[:, token]`; E is frozen.

    Args:
        embedding: The layer, whose weight is taken over, not copied. It may not be the head's weight too.
        config: The adapter's settings; without dropout, as there is nothing to drop before a lookup.
    """

    adapter = ("lora_embedding_A", "lora_embedding_B")
    """Names of what is learned, and of the PEFT library."""

    def __init__(self, embedding: nn.Embedding, config: LoRAConfig = LoRAConfig()) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(embedding, name))
        self.weight = embedding.weight.requires_grad_(False)
        made = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_embedding_A = nn.Parameter(torch.empty(config.rank, self.num_embeddings, **made))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, config.rank, **made))
        self.scale = config.alpha / config.rank
        self._unmerged = None
        self.reset_adapter()
        self.train(embedding.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens.

        Args:
            tokens: Token numbers `(b, l)`, integers.

        Returns:
            Activations `(b, l, d)`.
        """
        x = super().forward(tokens)
        if self.merged:
            return x
        low = nn.functional.embedding(tokens, self.lora_embedding_A.T)  # (b, l, r)
        return x + self.scale * (low @ self.lora_embedding_B.T)

    def delta(self) -> Tensor:
        """The adapter as one matrix `(v, d)`: `(alpha / r) (B A)^T`."""
        return self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T

    def folded(self) -> nn.Embedding:
        """A plain embedding that computes the same, for good."""
        self.merge()
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = self.weight
        return embedding.train(self.training)

    def reset_adapter(self) -> None:
        """Set A to zero and draw B from the normal distribution: the layer is what it was."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)


def add_adapters(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze a model and give the linear layers of its mixers adapters, in place.

    Args:
        model: A model with blocks of mixers, or any module.
        config: The adapters' settings.

    Returns:
        Dotted names of the layers that have one now.

    Raises:
        ConfigError: A target is the name of no linear layer; says which there are.
    """
    found = {
        f"{place}.{name}".lstrip("."): (module, name, child)
        for place, module in model.named_modules()
        for name, child in module.named_children()
        if not isinstance(child, Adapted)
        and (isinstance(child, nn.Embedding) or (isinstance(child, nn.Linear) and ".mixer" in f".{place}"))
    }
    linear = {name for _, name, child in found.values() if isinstance(child, nn.Linear)}
    names = {name for _, name, _ in found.values()}
    for target in config.targets:
        if target not in names:
            raise ConfigError(f"lora.targets: {unknown('layer', target, names)}")
    chosen = {key: place for key, place in found.items() if place[1] in (config.targets or linear)}
    if not chosen:
        raise ConfigError("lora: the model has no linear layer in a mixer")
    _refuse_tied(model, chosen)
    model.requires_grad_(False)
    for module, name, child in chosen.values():
        kind = LoRAEmbedding if isinstance(child, nn.Embedding) else LoRALinear
        setattr(module, name, kind(child, config))
    return list(chosen)


def _refuse_tied(model: nn.Module, chosen: dict[str, tuple[nn.Module, str, nn.Module]]) -> None:
    """Refuse an adapter of an embedding that is the head too: the head would keep the weight without it."""
    places = list(model.named_parameters(remove_duplicate=False))
    for key, (_, _, child) in chosen.items():
        others = [name for name, parameter in places if parameter is child.weight and name != f"{key}.weight"]
        if others:
            other = others[0].rpartition(".")[0]
            raise ConfigError(f"lora.targets: {key} is {other} too; untie them (tie_embeddings: false)")


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """Every layer with an adapter, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, (LoRALinear, LoRAEmbedding)):
            yield name, module


def merge(model: nn.Module) -> None:
    """Add all adapters to their weights; they still exist, and `unmerge` takes them out exactly."""
    for _, layer in adapters(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of their weights again, bit by bit."""
    for _, layer in adapters(model):
        layer.unmerge()


def fold(model: nn.Module) -> nn.Module:
    """Turn every layer with an adapter into a plain layer, in place: a model like any other.

    Args:
        model: A model with adapters, or without.

    Returns:
        The same object.
    """
    for name, layer in list(adapters(model)):
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, layer.folded())
    return model


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    config: LoRAConfig,
    base: str | None = None,
    *,
    modules: tuple[str, ...] = (),
) -> Path:
    """Write a model's adapters as the PEFT library does: a small safetensors file and its settings.

    Args:
        model: A model with adapters.
        folder: Made if needed.
        config: The adapters' settings.
        base: Name of the model that they belong to.
        modules: Modules that were trained beside them, such as a new head, to be kept whole.

    Returns:
        The folder.

    Raises:
        ConfigError: The model has no adapter.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    layers = dict(adapters(model))
    if not layers:
        raise ConfigError("the model has no adapter to save")
    tensors = {
        f"{_PREFIX}{name}.{part}": layer.get_parameter(part).detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in layer.adapter
    }
    for name in modules:
        for leaf, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{leaf}"] = tensor.detach().cpu().contiguous()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "modules_to_save": list(modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> LoRAConfig:
    """Give a model the adapters that `save_adapter` or PEFT wrote, in place.

    Args:
        model: The model that they belong to, without adapters.
        folder: Where they are.

    Returns:
        Their settings.

    Raises:
        ConfigError: Files that are missing or damaged, settings that these adapters do not have, or tensors
            that do not belong to this model.
    """
    folder = Path(folder)
    config, tensors, modules = _read_adapter(folder)
    add_adapters(model, config)
    known = {f"{name}.{part}" for name, layer in adapters(model) for part in layer.adapter}
    weights = model.state_dict(keep_vars=True)
    known |= {name for name in weights if any(name.startswith(f"{module}.") for module in modules)}
    if wrong := sorted(known ^ tensors.keys()):
        raise ConfigError(f"{folder}: {wrong[0]} is in the file or in the model, but not in both")
    for name, tensor in tensors.items():
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(weights[name].shape)}"
            raise ConfigError(f"{folder}: {name} has shape {shapes}")
        with torch.no_grad():
            weights[name].copy_(tensor)
    return config


def _read_adapter(folder: Path) -> tuple[LoRAConfig, dict[str, Tensor], list[str]]:
    """Settings, tensors by their names in the model, and modules kept whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds no adapter that can be read: {error}") from None
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("bias") != "none":
        raise ConfigError(f"{folder}: only plain LoRA without biases is known, got {settings}")
    rank, alpha = settings["r"], settings["lora_alpha"]
    targets = settings.get("target_modules") or ()
    scale = math.sqrt(rank) if settings.get("use_rslora") else 1.0
    config = LoRAConfig(
        rank=rank,
        alpha=alpha * scale,
        dropout=settings.get("lora_dropout", 0.0),
        targets=tuple(targets) if not isinstance(targets, str) else (),
    )
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return config, named, settings.get("modules_to_save") or []
