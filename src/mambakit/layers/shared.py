"""A block that several depths share: attention and an MLP with one set of weights, adapted at every use.

It sees the residual stream beside what entered the backbone, and nothing of it is added to the stream: its
output, through a linear map of each use, joins the stream in front of the mixer of that depth.

    x ------------------------(+)-> norm -> mixer -> (added to x by the block)
    |-> [x, first] -> shared -> linear ^
                      ^ a low-rank adapter per use on its projections

Attention and MLP have no residual connection of their own. The shared parameters belong to the backbone
(`Backbone.shared`); a use holds its norm, mixer, linear map, adapters, and its own state: the keys and values
that attention keeps differ from depth to depth.

Source: Glorioso et al., "Zamba" (2405.16712), section 2; for the adapters "The Zamba2 suite" (2411.15242),
section 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mambakit.config import unknown
from mambakit.layers.attention import Attention, AttentionConfig
from mambakit.layers.init import check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.norm import RMSNorm

ADAPTED = ("q_proj", "k_proj", "v_proj", "in_proj")
"""Projections of the shared block that a use can adapt: three of attention, one of the MLP."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig(MixerConfig, tag="shared"):
    """Settings of a mixer that hears a shared block first.

    Attributes:
        name: Which shared block; uses of one name share its weights.
        attention: Its attention, over twice the model's channels.
        mlp: Its MLP.
        inner: The mixer of this depth.
        adapted: Projections that each use adapts, out of `q_proj`, `k_proj`, `v_proj` and `in_proj`.
        rank: Width of the adapters' bottleneck.
        norm_eps: Added to the mean square in the norms.
    """

    prenorm = False

    name: str = "a"
    attention: MixerConfig
    mlp: MixerConfig
    inner: MixerConfig
    adapted: tuple[str, ...] = ()
    rank: int = 128
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse other parts, names that modules cannot have, and projections that there are not."""
        check_positive(rank=self.rank)
        for name, kind in (("attention", AttentionConfig), ("mlp", GatedMLPConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name} is a {type(getattr(self, name)).__name__}, expected a {kind.__name__}"
                )
        if not self.name.isidentifier():
            raise ValueError(f"name={self.name!r}, expected a name such as 'a'")
        for name in self.adapted:
            if name not in ADAPTED:
                raise ValueError(unknown("projection", name, ADAPTED))

    @property
    def parts(self) -> tuple[MixerConfig, MixerConfig, float]:
        """What all uses of one name must agree on."""
        return self.attention, self.mlp, self.norm_eps


class LowRank(nn.Module):
    """`y = up(down(x))`, a map through `rank` channels; zero when fresh.

    Args:
        d_in: Channels in.
        d_out: Channels out.
        rank: Channels between.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Source:
        Hu et al., "LoRA" (2106.09685), section 4.1.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, d_out, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map every token.

        Args:
            x: Activations `(b, l, d_in)`.

        Returns:
            Activations `(b, l, d_out)`.
        """
        return self.up(self.down(x))

    def reset_parameters(self) -> None:
        """Draw `down` as `torch.nn.Linear` does; `up` starts at zero."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)


class SharedBlock(nn.Module):
    """Attention and an MLP on `[x, first]`, without residuals: `mlp(norm(attention(norm([x, first]))))`.

    Args:
        d_model: Width of the residual stream, channels.
        config: The settings of a use.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        config: SharedConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parts = config.parts
        made = {"device": device, "dtype": dtype}
        self.norm = RMSNorm(2 * d_model, eps=config.norm_eps, **made)
        self.attention = Attention(2 * d_model, config.attention, d_out=d_model, **made)
        self.mlp_norm = RMSNorm(d_model, eps=config.norm_eps, **made)
        self.mlp = config.mlp.build(d_model, **made)

    def forward(
        self, x: Tensor, adapters: nn.ModuleDict, state: State | None = None, context: Context | None = None
    ) -> Tensor:
        """Run the block for one of its uses.

        Args:
            x: Residual stream beside the first activations `(b, l, 2 d_model)`.
            adapters: The use's own maps, by the name of the projection that they are added to.
            state: The use's cache of attention, overwritten in place.
            context: Documents and positions of the tokens.

        Returns:
            Activations `(b, l, d_model)`.
        """

        def project(x: Tensor, name: str, linear: nn.Linear) -> Tensor:
            return linear(x) + adapters[name](x) if name in adapters else linear(x)

        attention, x = self.attention, self.norm(x).to(self.norm.weight.dtype)
        qkv = (project(x, name, getattr(attention, name)) for name in ADAPTED[:3])
        x = self.mlp_norm(attention.attend(*qkv, state, context))  # (b, l, d_model)
        return self.mlp.finish(project(x, "in_proj", self.mlp.in_proj))

    def reset_parameters(self) -> None:
        """Initialise every part as it is initialised elsewhere."""
        for part in self.children():
            part.reset_parameters()


class Shared(Mixer, config=SharedConfig):
    """A mixer that hears a shared block first: `mixer(norm(x + linear(shared([x, first]))))`.

    Args:
        d_model: Width of the residual stream, channels.
        config: Its settings.
        device: Where the parameters live.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        config: SharedConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        made = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(d_model, d_model, bias=False, **made)
        self.adapters = nn.ModuleDict(
            {name: LowRank(*self._sizes(name), config.rank, **made) for name in config.adapted}
        )
        self.norm = RMSNorm(d_model, eps=config.norm_eps, **made)
        self.mixer = config.inner.build(d_model, **made)
        self._shared: tuple[SharedBlock, ...] = ()  # in a tuple: its parameters are the backbone's

    def join(self, shared: nn.ModuleDict) -> None:
        """Find the shared block, or add it; arguments as for `Mixer.join`.

        Raises:
            ValueError: A block of this name with other settings.
        """
        config = self.config
        if config.name not in shared:
            weight = self.linear.weight
            shared[config.name] = SharedBlock(self.d_model, config, device=weight.device, dtype=weight.dtype)
        elif shared[config.name].parts != config.parts:
            raise ValueError(f"shared block {config.name!r} has several settings, expected one for all uses")
        self._shared = (shared[config.name],)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Residual stream `(b, l, d_model)`, not normalised.
            state: `shared`, the cache of attention, and `mixer`, both overwritten in place.
            context: Its `first` is what entered the backbone.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Used outside a backbone, which provides the shared block and the first activations.
        """
        if not self._shared or context is None or context.first is None:
            raise ValueError("a shared block needs a Backbone: it provides the weights and Context.first")
        both = torch.cat([x, context.first.to(x.dtype)], dim=-1)  # (b, l, 2 d_model)
        heard = self._shared[0](both, self.adapters, None if state is None else state["shared"], context)
        u = self.norm(x + self.linear(heard)).to(self.norm.weight.dtype)
        return self.mixer(u, None if state is None else state["mixer"], context)

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty state: this use's cache of the shared attention, and that of its mixer."""
        made = {"max_length": max_length, "device": device, "dtype": dtype}
        return State(
            {
                "shared": self._shared[0].attention.init_state(batch, **made),
                "mixer": self.mixer.init_state(batch, **made),
            }
        )

    def last_weights(self) -> Iterator[nn.Parameter]:
        """The weights that write to the residual stream."""
        yield from self.mixer.last_weights()

    def reset_parameters(self) -> None:
        """Initialise every part; adapters start at zero."""
        for part in (self.linear, *self.adapters.values(), self.norm, self.mixer):
            part.reset_parameters()

    def _sizes(self, name: str) -> tuple[int, int]:
        """Channels that a projection of the shared block sees and gives."""
        attention, mlp = self.config.attention, self.config.mlp
        if name == "in_proj":
            return self.d_model, mlp.mixer.parts * mlp.hidden(self.d_model)
        heads = attention.n_heads if name == "q_proj" else attention.kv_heads
        return 2 * self.d_model, heads * attention.headdim(2 * self.d_model)
