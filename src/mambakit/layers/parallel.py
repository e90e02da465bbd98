"""Mixers side by side in one block: the `P` of patterns such as `"P-"`.

All see the same input and their outputs are added, so that a layer may remember exactly (attention) and in
constant memory (a state space model) at once.

Source: Falcon-LLM team, "Falcon-H1" (2507.22448), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mambakit.layers.mixer import Context, Mixer, MixerConfig, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig, tag="parallel"):
    """Settings of mixers side by side.

    Attributes:
        branches: Name -> mixer; names are those of the parameters and of the states.
        in_scales: Name -> factor on what a branch sees; 1 by default.
        out_scales: Name -> factor on what it gives; 1 by default.
    """

    branches: Mapping[str, MixerConfig]
    in_scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    out_scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an empty list, names that modules cannot have, and factors of no branch."""
        if not self.branches:
            raise ValueError("branches is empty, expected at least one mixer")
        for name in self.branches:
            if not name.isidentifier():
                raise ValueError(f"branches: {name!r}, expected a name such as 'mamba'")
        for field in ("in_scales", "out_scales"):
            if strange := sorted(set(getattr(self, field)) - set(self.branches)):
                raise ValueError(f"{field}: {strange[0]!r}, expected names out of {', '.join(self.branches)}")


class Parallel(Mixer, config=ParallelConfig):
    """Mixers side by side: `sum_k out_k mixer_k(in_k x)`.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        config: ParallelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleDict(
            {name: one.build(d_model, device=device, dtype=dtype) for name, one in config.branches.items()}
        )

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: The state of each branch by its name, overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        config, total = self.config, None
        for name, branch in self.branches.items():
            before, after = config.in_scales.get(name, 1), config.out_scales.get(name, 1)
            y = branch(x if before == 1 else before * x, None if state is None else state[name], context)
            y = y if after == 1 else after * y
            total = y if total is None else total + y
        return total

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: that of each branch, by its name."""
        made = {"max_length": max_length, "device": device, "dtype": dtype}
        return State({name: branch.init_state(batch, **made) for name, branch in self.branches.items()})

    def last_weights(self) -> Iterator[nn.Parameter]:
        """The weights that write to the residual stream."""
        for branch in self.branches.values():
            yield from branch.last_weights()

    def reset_parameters(self) -> None:
        """Initialise every branch as published."""
        for branch in self.branches.values():
            branch.reset_parameters()
