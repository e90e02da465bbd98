"""What every mixer is, what it remembers, and what travels beside the activations.

A *mixer* maps a sequence of vectors to a sequence of vectors of the same width; a model is a flat list of
residual blocks around mixers. Its `State` is what it must remember to continue a sequence: made by the
mixer, passed in by the caller, updated in place, so that beams, forks, prefix caches and resumed
conversations need to know nothing about the mixer. `Context` is the one side channel: what belongs to the
tokens and not to the activations.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambakit.config import Config, Tagged


@dataclasses.dataclass
class Context:
    """What belongs to the tokens of one forward pass.

    Attributes:
        seq_idx: Document number of each token `(b, l)`, integers; information never crosses documents.
        positions: Position of each token in its document `(b, l)`, integers, for rotary embeddings; counted
            from the state's length where absent.
        losses: Scalars that layers want added to the training loss, such as a router's for an even load.
        first: What entered the backbone `(b, l, d_model)`, where blocks look back at it (Zamba); set by it.
    """

    seq_idx: Tensor | None = None
    positions: Tensor | None = None
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    first: Tensor | None = None


class State(Mapping[str, Any]):
    """A tree of named tensors: what a layer or a model remembers of a sequence.

    Every leaf has the batch as its first axis, except 0-dimensional ones, which hold for all rows. All zeros
    means empty, so a reset is a fill. Layers overwrite the leaves in place while they run.

    Args:
        leaves: Name -> tensor or nested `State`.
    """

    def __init__(self, leaves: Mapping[str, Tensor | State] | None = None) -> None:
        self._leaves: dict[str, Tensor | State] = dict(leaves or {})

    def __getitem__(self, name: str) -> Any:
        """Return one leaf or subtree."""
        return self._leaves[name]

    def __setitem__(self, name: str, value: Tensor | State) -> None:
        """Replace one leaf, as a growing cache does."""
        self._leaves[name] = value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names at this level."""
        return iter(self._leaves)

    def __len__(self) -> int:
        """Count the names at this level."""
        return len(self._leaves)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the tree with its dotted name."""
        for name, value in self._leaves.items():
            if isinstance(value, State):
                yield from value.tensors(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def clone(self) -> State:
        """Return an independent copy: a fork of the sequence."""
        return State({name: value.clone() for name, value in self._leaves.items()})

    def to(self, dtype: torch.dtype) -> State:
        """Return a copy with its floating-point tensors in another type.

        Decoding many sequences with large states is as slow as the states are read and written: in bfloat16
        they take half of the time and of the memory. A layer computes in float32 all the same and rounds what
        it writes back, at every token. (S4 keeps complex numbers, which PyTorch has in float16 at the least.)

        Args:
            dtype: A floating-point type.

        Returns:
            A state of its own; complex tensors and integers are copied as they are.
        """
        return State(
            {
                name: value.to(dtype)
                if isinstance(value, State)
                else value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
                for name, value in self._leaves.items()
            }
        )

    def select(self, rows: Tensor) -> State:
        """Return a new state holding the given rows of the batch, in that order, repeats allowed.

        Args:
            rows: Row numbers `(k,)`, integers (beam search passes the surviving beams).

        Returns:
            A state of batch size `k`.

        Raises:
            IndexError: A row number lies outside the batch.
        """
        return State(
            {
                name: value.select(rows)
                if isinstance(value, State)
                else (value.index_select(0, rows.to(value.device)) if value.dim() else value.clone())
                for name, value in self._leaves.items()
            }
        )

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the state in place, whole or for some rows of the batch.

        Args:
            rows: Row numbers `(k,)`, integers; `None` empties everything.

        Raises:
            IndexError: A row number lies outside the batch.
        """
        for _, tensor in self.tensors():
            if rows is None:
                tensor.zero_()
            elif tensor.dim():
                tensor[rows.to(tensor.device)] = 0

    @property
    def nbytes(self) -> int:
        """Memory held by all tensors of the tree, in bytes."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the state to a safetensors file (beside the target, then renamed).

        Args:
            path: File to write.
            metadata: Strings kept in the file's header.
        """
        from safetensors.torch import save_file

        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            save_file(
                {name: t.detach().contiguous() for name, t in self.tensors()}, partial, dict(metadata or {})
            )
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Read a state written by `save`.

        Args:
            path: File to read.
            device: Where the tensors go.

        Returns:
            The state, tensor for tensor as saved.

        Raises:
            ValueError: The file is missing, truncated or no safetensors file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            flat = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read a state from {os.fspath(path)!r}: {error}") from None
        tree = cls()
        for name, tensor in flat.items():
            *branches, leaf = name.split(".")
            node = tree
            for branch in branches:
                if branch not in node:
                    node[branch] = State()
                node = node[branch]
            node[leaf] = tensor
        return tree


class MixerConfig(Config, Tagged):
    """Base of all mixer configurations; `type:` in a recipe chooses the member.

    `prenorm` says whether a block normalises what it gives to the mixer; without, the mixer sees the residual
    stream itself.
    """

    mixer: ClassVar[type[Mixer]]
    prenorm: ClassVar[bool] = True

    def build(
        self, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mixer:
        """Make the mixer that this config describes.

        Args:
            d_model: Width of the residual stream, channels.
            device: Where its parameters live.
            dtype: Type of its parameters; state space scalars stay float32.

        Returns:
            A freshly initialised mixer.
        """
        return self.mixer(d_model, self, device=device, dtype=dtype)


class Mixer(nn.Module):
    """A layer mapping `(b, l, d_model)` to `(b, l, d_model)`, with an explicit state.

    A mixer ends in a linear layer named `out_proj`, or says otherwise in `last_weights`. `ssm_parameters`
    lists its own parameters that take part in a recurrence: no weight decay, and their own learning rate
    where the optimiser is given one. `multiplies_first` says that the input goes into a linear layer and
    nowhere else, so that it may come in the type in which autocast multiplies.
    """

    ssm_parameters: ClassVar[frozenset[str]] = frozenset()
    multiplies_first: ClassVar[bool] = False

    def __init_subclass__(cls, config: type[MixerConfig] | None = None, **kwargs: Any) -> None:
        """Tie a mixer to its config: `class Mamba2(Mixer, config=Mamba2Config)`."""
        super().__init_subclass__(**kwargs)
        if config is not None:
            config.mixer = cls

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence; see the subclasses.

        Args:
            x: Activations `(b, l, d_model)`.
            state: Where the sequence stands; overwritten in place with where it ends. `None` starts afresh
                and remembers nothing.
            context: Documents and positions of the tokens.

        Returns:
            Activations `(b, l, d_model)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state.

        Args:
            batch: Number of sequences.
            max_length: Longest sequence to come, in tokens; only caches that grow with length care.
            device: Where it lives; the parameters' device by default.
            dtype: Type of the cached activations; the parameters' type by default. Recurrent states are
                float32 (float64 for float64 parameters) whatever this says.

        Returns:
            A state for `forward`.
        """
        return State()

    def reset_parameters(self) -> None:
        """Initialise the parameters as published."""

    def join(self, shared: nn.ModuleDict) -> None:
        """Find the parts that this mixer shares with other depths, or add them.

        Args:
            shared: The backbone's shared parts by name; their parameters are the backbone's.
        """

    def last_weights(self) -> Iterator[nn.Parameter]:
        """The weights that write to the residual stream, which the backbone scales for depth."""
        yield self.out_proj.weight


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a recurrence runs and its state is kept: float32, or wider where the data is."""
    return torch.promote_types(dtype, torch.float32)


def example(linear: nn.Module) -> Tensor:
    """A tensor on the device and of the type in which a linear layer computes.

    Its weight, or, where that is restored at every use, an empty one.
    """
    kept = getattr(linear, "example", None)
    return linear.weight if kept is None else kept
