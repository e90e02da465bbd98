"""Attention as a mixer: grouped heads, optional rotary positions, optional sliding window.

The `*` of hybrid patterns such as `"M-M-*-"`. Differs from the state space mixers in its state: a cache of
past keys and values that grows with the sequence (or up to the window) instead of a fixed-size summary.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from mambakit.layers import rotary
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.init import check_positive
from mambakit.layers.mixer import Context, Mixer, MixerConfig, State, example, recurrent_dtype
from mambakit.ops.attention import KVCache, attention

FIRST_CAPACITY = 64
"""Tokens for which a cache of unknown length makes room at first; it doubles when full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig, tag="attention"):
    """Settings of attention.

    Attributes:
        n_heads: Query heads.
        n_kv_heads: Key and value heads, a divisor of `n_heads`; as many as query heads by default.
        head_dim: Channels per head; `d_model / n_heads` by default.
        rope: Base of the rotary embedding, or `None` for no positions at all (as Jamba).
        rope_fraction: Share of each head's channels that the rotary embedding turns.
        rope_interleaved: Pair neighbouring channels instead of the two halves of a head.
        window: Tokens a query looks back, itself included; all by default.
        causal: Whether a token sees only itself and earlier ones.
        scale: Factor on the scores; `head_dim ** -0.5` by default.
        key_scale: Factor on the keys, and so on the scores.
        qkv_bias: Whether the query, key and value projections have biases.
        out_bias: Whether the output projection has one.
        d_conv: Width of a causal convolution of queries, keys and values, tokens; none by default.
    """

    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope: float | None = 10000.0
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    window: int | None = None
    causal: bool = True
    scale: float | None = None
    key_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    d_conv: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no attention can have."""
        for name in ("n_heads", "n_kv_heads", "head_dim", "rope", "window", "d_conv"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}, expected a divisor of n_heads={self.n_heads}")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction={self.rope_fraction}, expected a share in (0, 1]")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def headdim(self, d_model: int) -> int:
        """Channels per head for a model of width `d_model`.

        Raises:
            ValueError: `d_model` does not split into `n_heads` and `head_dim` is not given.
        """
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"d_model={d_model} does not split into n_heads={self.n_heads}; give head_dim")
        return self.head_dim or d_model // self.n_heads

    def rotary_dims(self, d_model: int) -> int:
        """Channels per head that turn for a model of width `d_model`.

        Raises:
            ValueError: Their number is zero or odd.
        """
        if self.rope is None:
            return 0
        dims = int(self.headdim(d_model) * self.rope_fraction + 1e-9)  # a share such as 0.29 is not exact
        if dims == 0 or dims % 2:
            raise ValueError(
                f"rope_fraction={self.rope_fraction} turns {dims} of {self.headdim(d_model)} channels a "
                "head, expected a positive even number"
            )
        return dims


class Attention(Mixer, config=AttentionConfig):
    """Softmax attention with grouped heads.

    Args:
        d_model: Channels that it sees.
        config: Its settings.
        d_out: Channels that it gives; as many by default.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: Sizes that do not fit `d_model`.

    Source:
        Vaswani et al. (1706.03762), section 3.2; Ainslie et al. (2305.13245); Su et al. (2104.09864).
    """

    multiplies_first: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig = AttentionConfig(),
        *,
        d_out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim, self.rotary_dims = config.headdim(d_model), config.rotary_dims(d_model)
        made = {"device": device, "dtype": dtype}
        q_size, kv_size = config.n_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, q_size, bias=config.qkv_bias, **made)
        self.k_proj = nn.Linear(d_model, kv_size, bias=config.qkv_bias, **made)
        self.v_proj = nn.Linear(d_model, kv_size, bias=config.qkv_bias, **made)
        self.out_proj = nn.Linear(q_size, d_out or d_model, bias=config.out_bias, **made)
        self.conv1d = None
        if config.d_conv is not None:
            self.conv1d = CausalConv1d(q_size + 2 * kv_size, config.d_conv, activation=None, **made)
        self._reset_biases()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> Tensor:
        """Mix a sequence, or continue one.

        Args:
            x: Activations `(b, l, d_model)`.
            state: Cache `k`, `v` `(b, capacity, g, p)`, `seq_idx` `(b, capacity)` and `length` `()`, with
                rotary positions the next `position` of each row `(b,)`, with a convolution its last inputs
                `conv` `(b, w-1, (h + 2 g) p)`; overwritten in place; a full cache is replaced by one of twice
                the capacity.
            context: Its `seq_idx` separates documents; its `positions` replace the count from the state's
                `position`, which goes on from them.

        Returns:
            Activations `(b, l, d_out)`.

        Raises:
            ValueError: Shapes that do not fit, or a state without `causal`.
        """
        return self.attend(*(proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)), state, context)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, context: Context | None = None
    ) -> Tensor:
        """Mix projected tokens; a block that adds something to the projections calls this.

        Args:
            q: Queries `(b, l, h p)`, as `q_proj` gives them.
            k: Keys `(b, l, g p)`.
            v: Values `(b, l, g p)`.
            state: As for `forward`.
            context: As for `forward`.

        Returns:
            Activations `(b, l, d_out)`.
        """
        config, context = self.config, context or Context()
        if self.conv1d is not None:
            q, k, v = self._convolve(q, k, v, state, context)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (b, l, h, p), 2 (b, l, g, p)
        if config.rope is not None:
            positions = self._count(q, state) if context.positions is None else context.positions
            cos, sin = rotary.angles(positions, self.rotary_dims, config.rope, recurrent_dtype(q.dtype))
            q, k = (rotary.rotate(t, cos, sin, interleaved=config.rope_interleaved) for t in (q, k))
            if state is not None:
                state["position"].copy_(positions[..., -1] + 1)
        scale = config.scale
        if config.key_scale != 1:  # taken with the scores: the cache holds the keys themselves
            scale = config.key_scale * (self.head_dim**-0.5 if scale is None else scale)
        if state is not None:
            _make_room(state, q.shape[1], config.window)
        y, _ = attention(
            q,
            k,
            v,
            causal=config.causal,
            window=config.window,
            scale=scale,
            state=None if state is None else KVCache(*(state[name] for name in KVCache._fields)),
            seq_idx=context.seq_idx,
        )
        return self.out_proj(y.flatten(-2))

    def init_state(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Make an empty cache; arguments as for `Mixer.init_state`.

        It has room for `max_length` tokens (64 by default), at most for the window, and grows by doubling.
        """
        weight, window = example(self.k_proj), self.config.window
        device, dtype = device or weight.device, dtype or weight.dtype
        capacity = FIRST_CAPACITY if max_length is None else max_length
        capacity = capacity if window is None else min(capacity, window)
        entries = (batch, capacity, self.config.kv_heads, self.head_dim)
        leaves = {
            "k": torch.zeros(entries, device=device, dtype=dtype),
            "v": torch.zeros(entries, device=device, dtype=dtype),
            "seq_idx": torch.zeros(entries[:2], device=device, dtype=torch.int64),
            "length": torch.zeros((), dtype=torch.int64),  # read on the host, hence on the CPU
        }
        if self.conv1d is not None:
            channels, _, width = self.conv1d.weight.shape
            leaves["conv"] = torch.zeros(batch, width - 1, channels, device=device, dtype=dtype)
        if self.config.rope is not None:
            # Apart from the length: rows padded on the left, and documents in one row, count for themselves.
            leaves["position"] = torch.zeros(batch, device=device, dtype=torch.int64)
        return State(leaves)

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases start at zero."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            proj.reset_parameters()
        self._reset_biases()
        if self.conv1d is not None:
            self.conv1d.reset_parameters()

    def _convolve(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, ...]:
        """Filter queries, keys and values along time, each channel by itself."""
        together = torch.cat([q, k, v], dim=-1)  # (b, l, (h + 2 g) p)
        conv = None if state is None else state["conv"]
        together = self.conv1d(together, state=conv, seq_idx=context.seq_idx)
        return together.split([t.shape[-1] for t in (q, k, v)], dim=-1)

    def _reset_biases(self) -> None:
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    @staticmethod
    def _count(x: Tensor, state: State | None) -> Tensor:
        """Positions `(l,)` or `(b, l)` of the new tokens."""
        count = torch.arange(x.shape[1], device=x.device)
        return count if state is None else state["position"][:, None] + count


def _make_room(state: State, new: int, window: int | None) -> None:
    """Replace a cache that cannot take `new` tokens by a larger one, at least twice its capacity.

    A cache as large as the window rolls over and never grows.
    """
    needed = int(state["length"]) + new
    capacity = state["k"].shape[1]
    if window is not None:
        needed = min(needed, window)
    if needed <= capacity:
        return
    larger = max(needed, 2 * capacity)
    larger = larger if window is None else min(larger, window)
    for name in ("k", "v", "seq_idx"):
        old = state[name]
        state[name] = torch.cat([old, old.new_zeros(old.shape[0], larger - capacity, *old.shape[2:])], dim=1)
