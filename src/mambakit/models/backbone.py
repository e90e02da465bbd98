"""The backbone: a flat list of residual blocks written as a pattern string.

`"M-M-*-"` reads: mixer M, mixer `-`, mixer M, ... Each letter names a mixer config, so Mamba, Jamba, Zamba
and plain transformers are all values of this one class. Repeats are written before what they repeat: `"24M"`,
`"4(M-)"`, `"3(2M*)M"`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambakit.config import Config, unknown
from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mixer import Context, MixerConfig, State
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.norm import NORMS
from mambakit.models.block import Block

_STATELESS = State()
_GROUP = re.compile(r"(\d+)(?:\(([^()]*)\)|([^\d()]))")


def pattern(text: str, **mixers: MixerConfig) -> tuple[MixerConfig, ...]:
    """Spell out a pattern string as the list of its mixers.

    Args:
        text: One letter per block; `"4(M-)"` and `"24M"` repeat.
        **mixers: Letter -> config. `M` (Mamba-2), `-` (gated MLP) and `*` (attention) have defaults; letters
            that are no Python name are passed as `**{"-": config}`.

    Returns:
        One config per block, in order.

    Raises:
        ValueError: An empty pattern, unbalanced brackets, or a letter without a config.
    """
    known = {**DEFAULT_MIXERS, **mixers}
    flat = text.replace(" ", "")
    while True:
        spread = _GROUP.sub(lambda m: int(m[1]) * (m[2] if m[2] is not None else m[3]), flat)
        if spread == flat:
            break
        flat = spread
    if not flat or set(flat) & set("()0123456789"):
        raise ValueError(f"pattern {text!r} cannot be read; write it like 'M-M-*-', '24M' or '4(M-)'")
    for letter in flat:
        if letter not in known:
            raise ValueError(f"pattern {text!r}: {unknown('mixer', letter, known)}")
    return tuple(known[letter] for letter in flat)


DEFAULT_MIXERS: Mapping[str, MixerConfig] = {
    "M": Mamba2Config(),
    "-": GatedMLPConfig(),
    "*": AttentionConfig(),
}
"""Mixers of the letters that need no definition."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Settings of a backbone.

    Attributes:
        d_model: Width of the residual stream, channels.
        pattern: One letter per block, see `pattern`.
        mixers: Letter -> mixer config, laid over the defaults.
        norm: Norms of the blocks: `rms`, or `layer` with a mean and a bias.
        final_norm: The last norm; of the same kind by default.
        norm_eps: Added to the mean square, or the variance, in every norm.
        residual_scale: Factor on every branch.
        residual_in_fp32: Keep the residual stream in float32 when the parameters are narrower.
        dropout: Probability of dropping an element of a branch in training.
    """

    d_model: int
    pattern: str
    mixers: Mapping[str, MixerConfig] = dataclasses.field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    final_norm: Literal["rms", "layer"] | None = None
    norm_eps: float = 1e-5
    residual_scale: float = 1.0
    residual_in_fp32: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a width or dropout outside its range and a pattern that cannot be read."""
        if self.d_model <= 0:
            raise ValueError(f"d_model={self.d_model}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected a probability below 1")
        for name in ("norm", "final_norm"):
            if getattr(self, name) not in (*NORMS, *((None,) if name == "final_norm" else ())):
                raise ValueError(unknown(name, getattr(self, name), NORMS))
        pattern(self.pattern, **self.mixers)

    @property
    def blocks(self) -> tuple[MixerConfig, ...]:
        """Mixer config of each block, in order."""
        return pattern(self.pattern, **self.mixers)


class Backbone(nn.Module):
    """A stack of residual blocks and a final norm.

    Args:
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters; state space scalars stay float32.

    Attributes:
        blocks: The blocks, in order.
        shared: Parts that several blocks share, by name; `None` for most models.
        checkpoint_blocks: Recompute each block in the backward pass instead of storing its activations.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        made = {"norm": config.norm, "norm_eps": config.norm_eps}
        made |= {"scale": config.residual_scale, "dropout": config.dropout}
        self.blocks = nn.ModuleList(
            Block(config.d_model, mixer, **made, device=device, dtype=dtype) for mixer in config.blocks
        )
        shared = nn.ModuleDict()
        for block in self.blocks:
            block.mixer.join(shared)
        self.shared = shared or None
        last = NORMS[config.final_norm or config.norm]
        self.norm_f = last(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        self._scale_for_depth()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Run every block.

        Args:
            x: Embedded inputs `(b, l, d_model)`.
            state: One state per block, overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            Normalised activations `(b, l, d_model)` in the parameters' type.

        Raises:
            ValueError: Shapes that do not fit.
        """
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.shared is not None:  # the same list of losses
            context = dataclasses.replace(context or Context(), first=x)
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        branch = None  # what the last block adds, not added yet
        for number, block in enumerate(self.blocks):
            block_state = None if state is None else state.get(str(number), _STATELESS)
            if recompute:
                x, branch = checkpoint(block.advance, x, branch, block_state, context, use_reentrant=False)
            else:
                x, branch = block.advance(x, branch, block_state, context)
        x = x if branch is None else x + branch
        return self.norm_f(x).to(self.norm_f.weight.dtype)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: one per block, named by its number; arguments as for `Mixer.init_state`."""
        made = {"max_length": max_length, "device": device, "dtype": dtype}
        return State({str(n): block.mixer.init_state(batch, **made) for n, block in enumerate(self.blocks)})

    def reset_parameters(self) -> None:
        """Initialise every block as published and scale the output projections for depth."""
        for part in (*self.blocks, *(self.shared or {}).values()):
            part.reset_parameters()
        self.norm_f.reset_parameters()
        self._scale_for_depth()

    def _scale_for_depth(self) -> None:
        """Divide each branch's last projection by the root of the number of branches (GPT-2's rule)."""
        with torch.no_grad():
            for block in self.blocks:
                for weight in block.mixer.last_weights():
                    weight.div_(math.sqrt(len(self.blocks)))
