"""The kernels of one decoding step: how they are started, and how their work is divided.

Each function starts one kernel of the `.cu` file of its name, which says what it computes. Weights are read
where the model keeps them, in their own type.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops import cuda

MOST_VECTORS = 8
"""Sequences that `linear` multiplies at once."""
MOST_TOGETHER = 64
"""Sequences that `product` multiplies at once."""
MOST_TAPS = 8
MOST_STATES = 256
THREADS = 256
WARPS = THREADS // 32
SCAN_THREADS = 128
SCAN_CHANNELS = 16
SCAN_ROWS = 8
"""Rows of the batch of one block of `scan`."""
BLOCKS_PER_PROCESSOR = 2
"""Of `linear`, at least: where a multiprocessor gets one block more than others, that should not be much."""
RING = 48 << 10
"""Bytes of weights that are on their way to a block of `linear`: for mamba 2.8B an H200 takes 2.23 ms a token
with 32 KiB, 1.93 with 48, 2.13 with 64."""
MOST_SUMS = 16 << 10
"""Bytes of sums that a block of `linear` keeps."""
HELD = 4
"""Pieces of a row that a thread holds while it is normalised, at most."""
FEW = 16
"""Sequences up to which `product` is better than PyTorch even where it does not divide columns."""
STAGES = 3
"""Steps of `product` whose copies are under way, at most."""
PRODUCT_THREADS = 256
MOST_ACCUMULATORS = 40
"""Tiles of 16 x 8 sums of a warp of `product`: more do not fit into its registers."""
COUNTERS = 1024
CONV_ROWS = 2
"""Rows of the batch of one thread of `conv`."""
SCAN_BLOCKS = 7
"""Blocks of `scan` that a multiprocessor must hold: so many registers may a thread have."""
HEAD_BLOCKS = {2: 4, 4: 3}
"""Bytes of a state -> the same of `heads`, whose threads hold twice as many registers of wide states."""


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
    "input_stride gate_stride batch rows k groups first_channel channels tiles",
    "eps",
)
_PRODUCT = _source(
    "weight bias input out parts counters",
    "input_stride batch rows k row_blocks steps",
)
_SCAN = _source(
    "x z dt B C dt_weight dt_bias A_log D state y",
    "x_b z_b dt_b BC_b batch d n rank channel_blocks",
)
_HEADS = _source(
    "x z dt B C dt_bias A_log D state y",
    "stride batch heads p n heads_per_group parts",
    "least most",
)
_ROWS = _source(
    "input add gate weight parts bias out",
    "input_stride add_stride gate_stride batch groups size",
    "eps",
)
_CONV = _source("x taps taps_bias conv", "stride batch channels channel_blocks")
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
class Parts:
    """What a linear layer gives in parts: their sum and the bias, rounded, are its outputs.

    Attributes:
        sums: Products of parts of the columns `(parts, b, rows)`, float32.
        bias: Bias `(rows,)`, or `None`.
    """

    sums: Tensor
    bias: Tensor | None


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Where and how the kernels of one step run.

    Attributes:
        device: Where.
        dtype: Type of weights and activations.
        residual: Type of the residual stream.
        overlap: Let a kernel start while the one before it ends, where the GPU can.
        counters: `COUNTERS` zeros, int32, which every step leaves as it finds them; without them `product`
            does not divide columns among blocks.
    """

    device: torch.device
    dtype: torch.dtype
    residual: torch.dtype
    overlap: bool = False
    counters: Tensor | None = None

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
        gate = None if norm is None else norm.gate
        groups = 1 if norm is None else norm.groups
        vectors, processors = padded(batch), cuda.processors(self.device)
        tile = 16 if rows >= 16 * processors else 8
        all_tiles = -(-rows // tile)
        most = max(1, MOST_SUMS // (4 * WARPS * vectors * tile))
        tiles = min(most, max(1, round(all_tiles / (BLOCKS_PER_PROCESSOR * processors))))
        params = _fill(
            _LINEAR, weight=weight, bias=bias, input=x, out=out, gate=gate,
            input_stride=x.stride(0), gate_stride=0 if gate is None else gate.stride(0),
            batch=batch, rows=rows, k=k, groups=groups, tiles=tiles,
        )  # fmt: skip
        if norm is not None:
            params.norm, params.eps = norm.weight.data_ptr(), norm.eps
        held = 0 if norm is None else _held(batch, k // groups, THREADS)
        ahead, shared = self._ahead(batch, k, tiles * tile, norm is not None)
        columns = 4 * WARPS * 16 // self.dtype.itemsize * (1 if tile == 16 else 2)
        settings = {
            "THREADS": THREADS, "BLOCKS": 4 if batch == 1 else 2,
            "VECTORS": vectors, "TILE": tile,
            "WHOLE": int(k % columns == 0 and rows % tile == 0 and tiles * tile <= rows),
            "AHEAD": ahead, "HELD": held,
            "NORM": int(of_residual), "GATED": int(norm is not None and not of_residual),
            "ADD": int(add_to is not None), "TAPS": 0, "CONV": "float",
            "ALIGNED": _vectors(k // groups, x, weight, gate, norm and norm.weight),
        }  # fmt: skip
        if conv is not None:
            settings.update(_set_conv(params, conv))
            params.first_channel = conv.first
        self._start(_LINEAR, "linear", settings, params, -(-all_tiles // tiles), shared)
        return out

    def _ahead(self, batch: int, k: int, rows: int, with_norm: bool) -> tuple[int, int]:
        """Rounds of copies of `linear` that shared memory holds, and all bytes of it."""
        vectors, pitch = padded(batch), -(-k // 64) * 64 + 32
        held = (vectors + with_norm) * pitch * self.dtype.itemsize + 4 * WARPS * vectors * (1 + rows)
        ahead = min(RING, cuda.block_memory(self.device) - held) // (32 * THREADS)
        return ahead, ahead * 32 * THREADS + held

    def takes_vectors(self, batch: int, k: int) -> bool:
        """Whether `linear` has the memory for so many vectors of this size."""
        rows = max(16, MOST_SUMS // (4 * WARPS * padded(batch)))
        return batch <= MOST_VECTORS and self._ahead(batch, k, rows, True)[0] >= 1

    def takes_product(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `product` takes these vectors and this weight, and is the better for it.

        A matrix so long that every multiprocessor has several blocks of it is better multiplied by PyTorch.
        """
        (batch, k), rows = x.shape, weight.shape[0]
        return (
            self.dtype.itemsize == 2
            and batch <= MOST_TOGETHER
            and k % 8 == 0
            and rows % 8 == 0
            and cuda.is_aligned(x, weight)
            and self._is_worth_it(rows, k, batch)
        )

    def _is_worth_it(self, rows: int, k: int, batch: int) -> bool:
        tiles, parts = self._parts(rows, k, batch)
        return parts > 1 or (batch <= FEW and tiles * 16 * 2 * cuda.processors(self.device) >= rows)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer for larger batches: `(b, k)` and `(rows, k)` give `(b, rows)`, b <= 64."""
        tiles, parts = self._parts(weight.shape[0], x.shape[1], len(x))
        out = torch.empty(len(x), weight.shape[0], dtype=self.dtype, device=self.device)
        self._multiply(x, weight, tiles, parts, bias=bias, out=out)
        return out

    def product_in_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | Parts:
        """The same, where the caller adds up what parts of the columns gave."""
        tiles, parts = self._parts(weight.shape[0], x.shape[1], len(x))
        if parts == 1:
            return self.product(x, weight, bias)
        return Parts(self._multiply(x, weight, tiles, parts), bias)

    def _multiply(
        self,
        x: Tensor,
        weight: Tensor,
        tiles: int,
        parts: int,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Start `product` by a division of its work; its parts."""
        (batch, k), rows = x.shape, weight.shape[0]
        sums = None
        if parts > 1:
            sums = torch.empty(parts, batch, rows, dtype=torch.float32, device=self.device)
        all_steps = -(-k // 32)
        row_blocks, steps = -(-rows // (tiles * 16)), -(-all_steps // parts)
        params = _fill(
            _PRODUCT, weight=weight, bias=bias, input=x, out=out, parts=sums, counters=self.counters,
            input_stride=x.stride(0), batch=batch, rows=rows, k=k, row_blocks=row_blocks, steps=steps,
        )  # fmt: skip
        groups, warps = -(-batch // 8), PRODUCT_THREADS // 32
        stage = 512 * warps * (2 * tiles + groups)
        sums_bytes = 4 * warps * 8 * groups * (tiles * 16 + 4)
        stages = max(1, min(STAGES, cuda.block_memory(self.device) // stage, -(-steps // warps)))
        settings = {
            "THREADS": PRODUCT_THREADS, "TILES": tiles, "VECTOR_TILES": groups, "STAGES": stages,
            "PARTS": parts, "LAST": int(parts > 1 and out is not None), "ALIGNED": 1,
        }  # fmt: skip
        shared = max(stages * stage, sums_bytes)
        self._start(_PRODUCT, "product", settings, params, row_blocks * parts, shared, PRODUCT_THREADS)
        return sums

    def _parts(self, rows: int, k: int, batch: int) -> tuple[int, int]:
        """Tiles of a block of `product`, and parts of the columns, for a matrix `(rows, k)`."""
        memory = cuda.block_memory(self.device)
        return _division(rows, k, batch, cuda.processors(self.device), memory, self.counters is not None)

    def normalise(self, x: Tensor, norm: Norm, add: Tensor | Parts | None = None) -> Tensor:
        """A norm for larger batches: `x` `(b, k)`, to which `add` is added first (and stays so)."""
        batch, k = x.shape
        out = torch.empty(batch, k, dtype=self.dtype, device=self.device)
        in_parts = isinstance(add, Parts)
        parts, bias = (add.sums, add.bias) if in_parts else (None, None)
        add = None if in_parts else add
        params = _fill(
            _ROWS, input=x, add=add, gate=norm.gate, weight=norm.weight, parts=parts, bias=bias, out=out,
            input_stride=x.stride(0), add_stride=0 if add is None else add.stride(0),
            gate_stride=0 if norm.gate is None else norm.gate.stride(0), batch=batch,
            groups=norm.groups, size=k // norm.groups, eps=norm.eps,
        )  # fmt: skip
        staged = k * self.dtype.itemsize <= 32 << 10
        threads = THREADS if k <= 8 * THREADS else 2 * THREADS
        settings = {
            "THREADS": threads, "IN": cuda.TYPES[x.dtype],
            "ALIGNED": _vectors(k // norm.groups, x, add, norm.gate, norm.weight, parts, bias),
            "STAGED": int(staged), "HELD": _held(1, k // norm.groups, threads),
            "PARTS": 0 if parts is None else len(parts),
        }  # fmt: skip
        shared = threads // 8 + staged * k * self.dtype.itemsize
        self._start(_ROWS, "rows", settings, params, batch, shared, threads)
        return out

    def convolve(self, x: Tensor, conv: Conv) -> None:
        """The convolution for larger batches, in place on the columns of `x` `(b, columns)`."""
        channels = conv.weight.shape[0]
        x = x[:, conv.first : conv.first + channels]
        blocks = -(-channels // THREADS)
        params = _fill(_CONV, x=x, stride=x.stride(0), batch=x.shape[0], channel_blocks=blocks)
        settings = {**_set_conv(params, conv), "ALIGNED": 0, "ROWS": CONV_ROWS}
        self._start(_CONV, "conv", settings, params, -(-x.shape[0] // CONV_ROWS) * blocks)

    def scan(
        self,
        x: Tensor,
        z: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Mamba-1's recurrence.

        Args:
            x: Inputs `(b, d)`.
            z: Gates `(b, d)`.
            dt: Bottleneck of the step sizes `(b, r)`.
            B: Input weights `(b, n)`.
            C: Output weights `(b, n)`, as far apart as `B`.
            dt_weight: Weight of the step sizes `(d, r)`.
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
        passes = min(4, padded(-(-min(batch, SCAN_ROWS) * SCAN_CHANNELS * lanes // SCAN_THREADS)))
        channel_blocks = -(-d // SCAN_CHANNELS)
        params = _fill(
            _SCAN, x=x, z=z, dt=dt, B=B, C=C, dt_weight=dt_weight, dt_bias=dt_bias, A_log=A_log, D=D,
            state=state, y=y, x_b=x.stride(0), z_b=z.stride(0), dt_b=dt.stride(0), BC_b=B.stride(0),
            batch=batch, d=d, n=n, rank=rank, channel_blocks=channel_blocks,
        )  # fmt: skip
        settings = {
            "NPT": per_thread, "LANES": lanes, "PASSES": passes,
            "WHOLE_N": int(n == states and cuda.is_aligned(state.flatten(), A_log.flatten())),
            "STATE": cuda.TYPES[state.dtype], "ALIGNED": _vectors(rank, dt_weight, dt), "BLOCKS": SCAN_BLOCKS,
        }  # fmt: skip
        blocks = channel_blocks * -(-batch // SCAN_ROWS)
        shared = 4 * SCAN_ROWS * (6 * SCAN_CHANNELS + 2 * states)
        self._start(_SCAN, "scan", settings, params, blocks, shared, threads=SCAN_THREADS)
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
            "LANES": lanes, "LOADS": loads, "CPT": channels, "STATE": cuda.TYPES[state.dtype],
            "ALIGNED": _vectors(n, *(projected[:, columns[name] :] for name in "BC")),
            "BLOCKS": HEAD_BLOCKS[state.element_size()],
            "WHOLE_N": int(n % at_once == 0 and cuda.is_aligned(state.flatten())), "GATE": int(gate),
        }  # fmt: skip
        self._start(_HEADS, "heads", settings, params, batch * heads * parts)
        return y

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


@functools.cache
def _division(
    rows: int, k: int, batch: int, processors: int, memory: int, may_divide: bool
) -> tuple[int, int]:
    """The division of `product` that takes the least time.

    The time of a multiprocessor is that of the bytes it brings in: weights, and with them the vectors from
    the second cache, which is faster. To add up parts takes as long as some bytes more.
    """
    groups, warps = -(-batch // 8), PRODUCT_THREADS // 32
    most = min(MOST_ACCUMULATORS // groups, 8, -(-rows // 16), (memory // (32 * warps * groups) - 4) // 16)

    def cost(division: tuple[int, int]) -> float:
        tiles, parts = division
        blocks = -(-rows // (tiles * 16)) * parts
        read = -(-blocks // processors) * max(k / parts, 256) * 2 * (tiles * 16 + 0.6 * batch)
        return read + (16e3 + 1e3 * parts if parts > 1 else 0)

    return min(
        (
            (tiles, parts)
            for tiles in range(1, most + 1)
            for parts in (1, 2, 4, 8)
            if parts == 1 or (may_divide and rows <= COUNTERS * 16 * tiles and k >= 128 * parts)
        ),
        key=cost,
    )


def padded(count: int) -> int:
    """The power of two that covers a count."""
    return 1 << (count - 1).bit_length()


def _held(batch: int, size: int, threads: int) -> int:
    """Pieces of a row that a thread holds while it is normalised; 0 if they are too many."""
    pieces = -(-size // (threads * 8))
    return pieces if batch == 1 and pieces <= HELD else 0


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
