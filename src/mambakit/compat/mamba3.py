"""`mamba_ssm.modules.mamba3.Mamba3`: the Mamba-3 block with their arguments.

Parameters and their names are those of `mambakit.layers.Mamba3`, which does the work; only arguments and
states are told in their words. Rates are made positive by softplus, as in their releases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit import layers
from mambakit.compat.documents import check_same_documents, seq_idx_of
from mambakit.compat.generation import InferenceParams, states_of
from mambakit.layers.mixer import Context, State

_STATES = ("angle", "ssm", "k", "v")


class Mamba3(layers.Mamba3):
    """A Mamba-3 block, SISO or MIMO.

    Args:
        d_model: Width of the residual stream, channels.
        d_state: State columns per head.
        expand: Inner channels per channel of the model.
        headdim: Channels per head.
        ngroups: Groups of heads that share B and C.
        rope_fraction: Share of the state's columns that rotate, 0.5 or 1.
        dt_min: Least initial step size.
        dt_max: Greatest initial step size.
        dt_init_floor: No initial step size below this.
        A_floor: No decay rate below this, as `-A`.
        is_outproj_norm: Normalise every head before the gate.
        is_mimo: Several vectors per head and step.
        mimo_rank: How many, with `is_mimo`.
        chunk_size: Tokens per chunk of their kernels; the result is the same.
        dropout: Only 0.
        layer_idx: Number under which states are kept.
        n_layer: Says nothing.
        device: Where the parameters live.
        dtype: Their type; those of the recurrence are float32 or wider.

    Raises:
        ValueError: Sizes that do not fit.
        NotImplementedError: A `dropout`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dropout:
            raise NotImplementedError(f"Mamba3: dropout is {dropout}, expected 0: theirs does not apply it")
        config = layers.Mamba3Config(
            d_state=d_state,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            rope_fraction=rope_fraction,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            A_floor=A_floor,
            is_outproj_norm=is_outproj_norm,
            mimo_rank=mimo_rank if is_mimo else None,
        )
        super().__init__(d_model, config, device=device, dtype=dtype)
        self.d_model, self.d_state, self.headdim, self.chunk_size = d_model, d_state, headdim, chunk_size
        self.d_inner, self.nheads = config.d_inner(d_model), config.nheads(d_model)
        self.is_mimo, self.mimo_rank, self.layer_idx = is_mimo, config.rank, layer_idx
        self.dt_bias._no_weight_decay = self.D._no_weight_decay = True

    def forward(
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix a sequence, or continue one by any number of tokens.

        Args:
            u: Activations `(b, l, d_model)`.
            seq_idx: Document number of each token `(b, l)`.
            cu_seqlens: Where each document of a single row begins `(documents + 1,)`.
            inference_params: Where the sequences stand; this layer's states in it are overwritten.

        Returns:
            Activations `(b, l, d_model)`.

        Raises:
            ValueError: Shapes or documents that do not fit.
            NotImplementedError: `cu_seqlens` or `seq_idx` with `inference_params`.
        """
        if cu_seqlens is not None:
            numbers = seq_idx_of(cu_seqlens, *u.shape[:2], "Mamba3")
            if seq_idx is not None:
                check_same_documents(seq_idx, numbers, "Mamba3")
            seq_idx = numbers
        if inference_params is None:
            return super().forward(u, context=Context(seq_idx=seq_idx))
        if seq_idx is not None:
            raise NotImplementedError(
                "Mamba3: seq_idx or cu_seqlens with inference_params, expected one of them"
            )
        return super().forward(u, self._state(states_of(self, inference_params, len(u))))

    def step(
        self,
        u: Tensor,
        angle_state: Tensor,
        ssm_state: Tensor,
        k_state: Tensor,
        v_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take one token, states overwritten in place.

        Args:
            u: Activations `(b, d_model)`.
            angle_state: `(b, h, s)`.
            ssm_state: `(b, h, p, n)`.
            k_state: `(b, r, h, n)`.
            v_state: `(b, h, p)`.

        Returns:
            Activations `(b, d_model)` and the four states.
        """
        states = (angle_state, ssm_state, k_state, v_state)
        return (super().forward(u.unsqueeze(1), self._state(states)).squeeze(1), *states)

    @staticmethod
    def _state(states: tuple[Tensor, ...]) -> State:
        return State(dict(zip(_STATES, states, strict=True)))

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace_state: None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make the empty states of `step`, in float32 or wider.

        Raises:
            NotImplementedError: An `inplace_state`.
        """
        if inplace_state is not None:
            raise NotImplementedError("Mamba3: inplace_state is given, expected None")
        state = self.init_state(batch_size, device=device, dtype=dtype)
        return tuple(state[name] for name in _STATES)
