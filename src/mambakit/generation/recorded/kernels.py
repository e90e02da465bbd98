"""The kernels of one decoding step: how they are started, and how their work is divided.

Each function starts one kernel of the `.cu` file of its name, which says what it computes. Weights are read
where the model keeps them, in their own type.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops import cuda

MOST_VECTORS = 8
"""Sequences that `linear` multiplies at once."""
MOST_SHARED = 96 << 10
"""Bytes of shared memory for the vectors of `linear`: what every GPU has."""
MOST_TAPS = 8
MOST_STATES = 256
THREADS = 256
WARPS = THREADS // 32
SCAN_THREADS = 128
SCAN_CHANNELS = 16
SCAN_ROWS = 8
"""Rows of the batch of one block of `scan`."""
BLOCKS_PER_PROCESSOR = 2
"""Of `linear`; more would hold fewer registers each, and have fewer reads in flight."""
WARPS_PER_PROCESSOR = 8
"""As many teams of `linear` as there should be at least, so that enough reads are in flight."""


def _struct(pointers: str, numbers: str, floats: str = "") -> type[ctypes.Structure]:
    """A mirror of a kernel's `Params`: pointers first, then whole numbers, then floating-point ones."""
    fields = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_longlong) for name in numbers.split()]
    fields += [(name, ctypes.c_double) for name in floats.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


def _source(pointers: str, numbers: str, floats: str = "") -> cuda.Source:
    return cuda.Source(Path(__file__).parent, "step.cuh", _struct(pointers, numbers, floats))


_LINEAR = _source(
    "weight bias input norm gate out taps taps_bias conv",
    "input_stride gate_stride batch rows k groups first_channel channels sets blocks",
    "eps",
)
_SCAN = _source(
    "x z dt B C dt_weight dt_bias A_log D state y",
    "x_b z_b dt_b BC_b batch d n rank rows channel_blocks",
)
_HEADS = _source(
    "x z dt B C dt_bias A_log D state y",
    "stride batch heads p n heads_per_group parts",
    "least most",
)
_ROWS = _source("input add gate weight out", "input_stride add_stride gate_stride groups size", "eps")
_CONV = _source("x taps taps_bias conv", "stride batch channels")
_EMBED = _source("tokens embedding out", "batch d vocab")


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm in front of a linear layer: of the residual stream, or of Mamba-2's output in groups.

    Attributes:
        weight: Its weight `(k,)`.
        eps: Added to the mean square.
        groups: Groups of channels normalised apart.
        gate: Gates `(b, k)` whose SiLU multiplies the normalised input, or `None`.
    """

    weight: Tensor
    eps: float
    groups: int = 1
    gate: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Conv:
    """The convolution of some columns: its parameters, its state, and the first of these columns.

    Attributes:
        weight: Taps `(d, 1, w)`.
        bias: Its bias `(d,)`, or `None`.
        state: The last inputs `(b, w - 1, d)`, overwritten.
        first: Number of the first column.
    """

    weight: Tensor
    bias: Tensor | None
    state: Tensor
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Where and how the kernels of one step run.

    Attributes:
        device: Where.
        dtype: Type of weights and activations.
        residual: Type of the residual stream.
        overlap: Let a kernel start while the one before it ends, where the GPU can.
    """

    device: torch.device
    dtype: torch.dtype
    residual: torch.dtype
    overlap: bool = False

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """The residual stream of tokens `(b,)`, int64: `(b, d)`. An unknown token becomes NaN."""
        (batch,), (vocab, d) = tokens.shape, weight.shape
        out = torch.empty(batch, d, dtype=self.residual, device=self.device)
        params = _fill(_EMBED, tokens=tokens, embedding=weight, out=out, batch=batch, d=d, vocab=vocab)
        # The first kernel of a step waits for whatever ran before it: the others count on that.
        self._start(_EMBED, "embed", {"ALIGNED": 0}, params, -(-batch * d // THREADS), overlap=False)
        return out

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        conv: Conv | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """A linear layer with what stands before and after it.

        Args:
            x: Inputs `(b, k)`, b <= 8; with `norm`, of the residual's type if that is a norm of one group
                without gate.
            weight: Weight `(rows, k)`.
            bias: Bias `(rows,)`.
            norm: A norm of the inputs.
            conv: The convolution of some of the outputs.
            add_to: The residual stream `(b, rows)`, to which the outputs are added.

        Returns:
            Outputs `(b, rows)`, or `add_to`.
        """
        (batch, k), rows = x.shape, weight.shape[0]
        out = add_to
        if out is None:
            out = torch.empty(batch, rows, dtype=self.dtype, device=self.device)
        of_residual = norm is not None and x.dtype == self.residual and norm.groups == 1 and norm.gate is None
        vectors = padded(batch)
        each, ahead, split = self._division(rows, k, vectors)
        sets = -(-rows // (WARPS // split * each))
        blocks = min(sets, BLOCKS_PER_PROCESSOR * cuda.processors(self.device))
        gate = None if norm is None else norm.gate
        groups = 1 if norm is None else norm.groups
        params = _fill(
            _LINEAR, weight=weight, bias=bias, input=x, out=out, gate=gate,
            input_stride=x.stride(0), gate_stride=0 if gate is None else gate.stride(0),
            batch=batch, rows=rows, k=k, groups=groups, sets=sets, blocks=blocks,
        )  # fmt: skip
        if norm is not None:
            params.norm, params.eps = norm.weight.data_ptr(), norm.eps
        settings = {
            "VECTORS": vectors, "TEAM_ROWS": each, "AHEAD": ahead, "SPLIT": split,
            "NORM": int(of_residual), "GATED": int(norm is not None and not of_residual),
            "ADD": int(add_to is not None), "TAPS": 0, "CONV": "float",
            "ALIGNED": _vectors(k // groups, x, weight, gate, norm and norm.weight),
        }  # fmt: skip
        if conv is not None:
            settings.update(_set_conv(params, conv))
            params.first_channel = conv.first
        held = vectors + (norm is not None)
        shared = held * -(-k // 8) * 8 * weight.element_size() + 4 * WARPS * vectors * (2 * each + 1)
        self._start(_LINEAR, "linear", settings, params, blocks, shared)
        return out

    def normalise(self, x: Tensor, norm: Norm, add: Tensor | None = None) -> Tensor:
        """A norm for larger batches: `x` `(b, k)`, to which `add` is added first (and stays so)."""
        batch, k = x.shape
        out = torch.empty(batch, k, dtype=self.dtype, device=self.device)
        params = _fill(
            _ROWS, input=x, add=add, gate=norm.gate, weight=norm.weight, out=out,
            input_stride=x.stride(0), add_stride=0 if add is None else add.stride(0),
            gate_stride=0 if norm.gate is None else norm.gate.stride(0),
            groups=norm.groups, size=k // norm.groups, eps=norm.eps,
        )  # fmt: skip
        staged = k * self.dtype.itemsize <= MOST_SHARED
        settings = {
            "IN": cuda.TYPES[x.dtype],
            "ALIGNED": _vectors(k // norm.groups, x, add, norm.gate, norm.weight),
            "STAGED": int(staged),
        }
        shared = 4 * WARPS + staged * k * self.dtype.itemsize
        self._start(_ROWS, "rows", settings, params, batch, shared)
        return out

    def convolve(self, x: Tensor, conv: Conv) -> None:
        """The convolution for larger batches, in place on the columns of `x` `(b, columns)`."""
        channels = conv.weight.shape[0]
        x = x[:, conv.first : conv.first + channels]
        params = _fill(_CONV, x=x, stride=x.stride(0), batch=x.shape[0])
        settings = {**_set_conv(params, conv), "ALIGNED": 0}
        self._start(_CONV, "conv", settings, params, -(-x.shape[0] * channels // THREADS))

    def scan(
        self,
        x: Tensor,
        z: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        dt_weight: Tensor | None,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Mamba-1's recurrence.

        Args:
            x: Inputs `(b, d)`.
            z: Gates `(b, d)`.
            dt: Raw step sizes `(b, d)`, or with `dt_weight` their bottleneck `(b, r)`.
            B: Input weights `(b, n)`.
            C: Output weights `(b, n)`, as far apart as `B`.
            dt_weight: Weight of the step sizes `(d, r)`, or `None`.
            dt_bias: Their bias `(d,)`.
            A_log: Logarithms of the decay rates `(d, n)`.
            D: Weight of the skip `(d,)`.
            state: The states `(b, d, n)`, overwritten.

        Returns:
            Gated outputs `(b, d)`.
        """
        batch, d, n = state.shape
        y = torch.empty(batch, d, dtype=self.dtype, device=self.device)
        states, rank = padded(n), dt.shape[1]
        per_thread = min(states, 4) if states <= 128 else 8
        lanes = states // per_thread
        passes = min(
            4 if dt_weight is None else 2,
            padded(-(-min(batch, SCAN_ROWS) * SCAN_CHANNELS * lanes // SCAN_THREADS)),
        )
        channel_blocks = -(-d // SCAN_CHANNELS)
        params = _fill(
            _SCAN, x=x, z=z, dt=dt, B=B, C=C, dt_weight=dt_weight, dt_bias=dt_bias, A_log=A_log, D=D,
            state=state, y=y, x_b=x.stride(0), z_b=z.stride(0), dt_b=dt.stride(0), BC_b=B.stride(0),
            batch=batch, d=d, n=n, rank=rank, rows=SCAN_ROWS, channel_blocks=channel_blocks,
        )  # fmt: skip
        settings = {
            "NPT": per_thread, "LANES": lanes, "PASSES": passes, "RANK": int(dt_weight is not None),
            "WHOLE_N": int(n == states and cuda.is_aligned(state.flatten(), A_log.flatten())),
            "STATE": cuda.TYPES[state.dtype], "ALIGNED": _vectors(rank, dt_weight),
        }  # fmt: skip
        blocks = channel_blocks * -(-batch // SCAN_ROWS)
        self._start(
            _SCAN, "scan", settings, params, blocks, 4 * SCAN_ROWS * SCAN_CHANNELS, threads=SCAN_THREADS
        )
        return y

    def heads(
        self,
        projected: Tensor,
        columns: Mapping[str, int],
        groups: int,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        dt_limit: tuple[float, float],
        state: Tensor,
        gate: bool,
    ) -> Tensor:
        """Mamba-2's recurrence.

        Args:
            projected: Everything that `in_proj` and the convolution made `(b, columns)`.
            columns: Where `x`, `z`, `dt`, `B` and `C` begin in it.
            groups: Groups of heads that share B and C.
            dt_bias: Bias of the step sizes `(h,)`.
            A_log: Logarithms of the decay rates `(h,)`.
            D: Weight of the skip `(h,)`.
            dt_limit: Least and greatest step size.
            state: The states `(b, h, p, n)`, overwritten.
            gate: Whether to multiply by the SiLU of the gate.

        Returns:
            Outputs `(b, h p)`.
        """
        batch, heads, p, n = state.shape
        y = torch.empty(batch, heads * p, dtype=self.dtype, device=self.device)
        at_once = 16 // state.element_size()
        lanes = min(32, padded(-(-n // at_once)))
        loads = -(-n // (lanes * at_once))
        # A thread's channels: many reads in flight, but blocks for every processor.
        channels, side = 1, WARPS * 32 // lanes
        while (
            channels * loads < 8
            and side * channels < p
            and batch * heads * -(-p // (2 * side * channels)) >= 2 * cuda.processors(self.device)
        ):
            channels *= 2
        parts = -(-p // (side * channels))
        params = _fill(
            _HEADS, **{name: projected[:, column:] for name, column in columns.items()}, dt_bias=dt_bias,
            A_log=A_log, D=D, state=state, y=y, stride=projected.stride(0), batch=batch, heads=heads, p=p,
            n=n, heads_per_group=heads // groups, parts=parts, least=dt_limit[0], most=dt_limit[1],
        )  # fmt: skip
        settings = {
            "LANES": lanes, "LOADS": loads, "CPT": channels, "STATE": cuda.TYPES[state.dtype], "ALIGNED": 0,
            "WHOLE_N": int(n % at_once == 0 and cuda.is_aligned(state.flatten())), "GATE": int(gate),
        }  # fmt: skip
        self._start(_HEADS, "heads", settings, params, batch * heads * parts)
        return y

    def _division(self, rows: int, k: int, vectors: int) -> tuple[int, int, int]:
        """Rows of a team, loads ahead, and warps of a team, for a matrix `(rows, k)`."""
        wanted = WARPS_PER_PROCESSOR * cuda.processors(self.device)
        # Rows of a team share what they read of the vectors, which is much where there are many vectors.
        each = 4 if vectors >= 4 else 2
        while each > 1 and rows < wanted * each:
            each //= 2
        split = 1
        loads = k * self.dtype.itemsize // 16
        while split < WARPS and rows * split < wanted * each and loads >= 2 * 32 * split:
            split *= 2
        return each, 8 // each if each > 1 else 4, split

    def _start(
        self,
        source: cuda.Source,
        name: str,
        settings: dict[str, str | int],
        params: ctypes.Structure,
        blocks: int,
        shared: int = 0,
        threads: int = THREADS,
        overlap: bool = True,
    ) -> None:
        types = {"IO": cuda.TYPES[self.dtype], "RES": cuda.TYPES[self.residual]}
        source.launch(
            name,
            {**types, **settings},
            params,
            blocks=blocks,
            threads=threads,
            shared=shared,
            device=self.device,
            overlap=overlap and self.overlap,
        )


def padded(count: int) -> int:
    """The power of two that covers a count."""
    return 1 << (count - 1).bit_length()


def _fill(source: cuda.Source, **values: Tensor | float | None) -> ctypes.Structure:
    """A kernel's parameters; tensors stand for their addresses."""
    return source.params(**{name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in values.items()})


def _set_conv(params: ctypes.Structure, conv: Conv) -> dict[str, str | int]:
    """Fill in a convolution, and its settings."""
    params.taps, params.taps_bias = conv.weight.data_ptr(), cuda.address(conv.bias)
    params.conv, params.channels = conv.state.data_ptr(), conv.weight.shape[0]
    return {"TAPS": conv.weight.shape[-1], "CONV": cuda.TYPES[conv.state.dtype]}


def _vectors(size: int, *tensors: Tensor | None) -> int:
    """Whether rows of `size` numbers can be read 16 bytes at a time."""
    return int(size % 8 == 0 and cuda.is_aligned(*tensors))
