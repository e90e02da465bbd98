"""`mamba_ssm.modules.mamba_simple.Mamba`: the Mamba-1 block with their arguments and parameter names.

Differs from `mambakit.layers.Mamba1` in names only: `dt_proj.bias` is where ours has `dt_bias`, states are
channels-first and belong to an `InferenceParams`. Every projection is called as a module, so adapters on any
of them train.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit import ops
from mambakit.compat.conv import causal_conv1d_update
from mambakit.compat.generation import InferenceParams, states_of
from mambakit.config import unknown
from mambakit.layers import init
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.mixer import recurrent_dtype


class LateBiasLinear(nn.Linear):
    """A linear layer whose bias is added later, in float32, by who calls it."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight only: `(..., in)` to `(..., out)`."""
        return F.linear(x, self.weight)


class Mamba(nn.Module):
    """A Mamba-1 block.

    Args:
        d_model: Width of the residual stream, channels.
        d_state: States per channel.
        d_conv: Width of the convolution, tokens.
        expand: Inner channels per channel of the model.
        dt_rank: Bottleneck of the step size; `"auto"` is `ceil(d_model / 16)`.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init: How the step size's projection starts, `"random"` or `"constant"`.
        dt_scale: Its scale.
        dt_init_floor: No initial step size below this.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the first and last projections have one.
        use_fast_path: Which kernels theirs uses; ours is one path with the same result.
        layer_idx: Number under which states are kept.
        device: Where the parameters live.
        dtype: Their type; `A_log` and `D` are float32 or wider.

    Raises:
        ValueError: An unknown `dt_init`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: {unknown('dt_init', dt_init, ('random', 'constant'))}")
        init.check_dt_range(dt_min, dt_max)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        made = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": recurrent_dtype(dtype or torch.get_default_dtype())}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, bias=conv_bias, activation="silu", **made)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = LateBiasLinear(self.dt_rank, self.d_inner, bias=True, **made)
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init.dt_bias_(self.dt_proj.bias, dt_min, dt_max, dt_init_floor)
        self.dt_proj.bias._no_reinit = True
        states = torch.arange(1, d_state + 1, **wide).log()
        self.A_log = nn.Parameter(states.expand(self.d_inner, -1).contiguous())
        self.D = nn.Parameter(torch.ones(self.d_inner, **wide))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """Mix a sequence, or continue one by any number of tokens.

        Args:
            hidden_states: Activations `(b, l, d_model)`.
            inference_params: Where the sequences stand; this layer's states in it are overwritten.

        Returns:
            Activations `(b, l, d_model)`.
        """
        if inference_params is None:
            return self._mix(hidden_states, None, None)
        conv_state, ssm_state = states_of(self, inference_params, len(hidden_states))
        return self._mix(hidden_states, conv_state, ssm_state)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue sequences, states overwritten in place.

        Args:
            hidden_states: Activations `(b, l, d_model)`; theirs takes one token.
            conv_state: Last inputs of the convolution `(b, d, w)`.
            ssm_state: State of the recurrence `(b, d, n)`.

        Returns:
            Activations `(b, l, d_model)` and the two states.
        """
        return self._mix(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def _mix(self, hidden_states: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None) -> Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (b, l, d) each
        x = convolve(self.conv1d, x, conv_state)
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = self.x_proj(x).split(sizes, dim=-1)
        A = -torch.exp(self.A_log.to(recurrent_dtype(self.A_log.dtype)))
        vectors = (B.unsqueeze(2), C.unsqueeze(2))
        bias = self.dt_proj.bias
        y, _ = ops.selective_scan(
            x, self.dt_proj(dt), A, *vectors, self.D, z, bias, dt_softplus=True, state=ssm_state
        )
        return self.out_proj(y)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Make empty states: `(b, d, w)` of the convolution and, in float32 or wider, `(b, d, n)`."""
        device, dtype = self.out_proj.weight.device, dtype or self.conv1d.weight.dtype
        conv = torch.zeros(batch_size, self.d_conv, self.d_inner, device=device, dtype=dtype)
        wide = recurrent_dtype(dtype)
        return conv.transpose(1, 2), torch.zeros(
            batch_size, self.d_inner, self.d_state, device=device, dtype=wide
        )


def convolve(
    conv1d: CausalConv1d, x: Tensor, conv_state: Tensor | None, seq_idx: Tensor | None = None
) -> Tensor:
    """A block's convolution over `(b, l, d)`, continued from and into a state `(b, d, w)` if given."""
    if conv_state is None:
        return conv1d(x, seq_idx=seq_idx)
    weight = conv1d.weight.squeeze(1)
    return causal_conv1d_update(x.transpose(1, 2), conv_state, weight, conv1d.bias, "silu").transpose(1, 2)
