"""The selective scan on NVIDIA GPUs: what the kernels need to be told, and how its work is divided.

Inputs may be slices of a larger tensor: only their last axis has to be contiguous. Gradients of B and C are
added up by atomic operations, in no fixed order, unless `torch.use_deterministic_algorithms(True)` asks for a
fixed one; that costs memory for one partial sum per block of channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambakit.ops import cuda, segments
from mambakit.ops.operands import common_type, rows, scalars

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)
MOST_STATES = 256
THREADS = 128
CHANNELS_PER_THREAD = 2
SUB = 4
"""Tokens whose states the backward pass holds at once."""
BLOCKS_PER_PROCESSOR = {"forward": 4, "backward": 4}
PACES = {
    "forward": (segments.Pace(60, 47), segments.Pace(66, 33)),
    "backward": (segments.Pace(300, 135), segments.Pace(66, 35)),
}
"""Nanoseconds of a block per token, and of its summary: measured on an H200 with 16 states, in bfloat16, with
states that last (a summary of states that vanish takes less)."""

_POINTERS = """
    x dt z dy B C y dx ddt dz A D dt_bias initial dfinal seq_idx final checkpoints local passed
    dA dD ddt_bias dinitial dB dC
"""
_INTEGERS = """
    x_b x_l dt_b dt_l z_b z_l dy_b dy_l B_b B_l B_g C_b C_l C_g
    batch length d n groups segment segments partial
"""


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_longlong) for name in _INTEGERS.split()),
    ]


SOURCE = cuda.Source(Path(__file__).parent, "tile.cuh", _Params, {"summarise_backward": "summarise.cu"})


def unsupported(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := cuda.runs_on(x.device):
        return reason
    if common_type(x, dt, B, C, z) not in dtypes:
        return f"takes float32, bfloat16 and float16, not {common_type(x, dt, B, C, z)}"
    if A.is_complex():
        return "takes real decay rates only"
    if A.shape[1] > MOST_STATES:
        return f"takes up to {MOST_STATES} states, not {A.shape[1]}"
    return None


def infer(*inputs: Tensor | bool | None, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Outputs and final state, nothing kept for a backward pass."""
    call = _Call(*inputs)
    return call.step(in_place) if call.length == 1 else call.forward(in_place)


def forward(*inputs: Tensor | bool | None) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Outputs and final state, and the states at every tile's start."""
    call = _Call(*inputs)
    call.checkpoints = call.new_checkpoints()
    return call.forward(), [call.checkpoints]


def saved_like(*inputs: Tensor | bool | None) -> list[Tensor]:
    """The states at every tile's start, unfilled."""
    x, dt, A, B, C, _, z, *_ = inputs
    tiles = -(-x.shape[1] // _tile(A.shape[1]))
    return [x.new_empty(x.shape[0], tiles, *A.shape, dtype=common_type(x, dt, B, C, z))]


def backward(
    saved: Sequence[Tensor], grads: Sequence[Tensor], *inputs: Tensor | bool | None
) -> list[Tensor | None]:
    """Gradients of the tensor inputs, in their order."""
    call = _Call(*inputs)
    (call.checkpoints,) = saved
    found = call.backward(*grads)
    return [found[name] for name, tensor in call.given.items() if tensor is not None]


class _Call:
    """One use of the kernels: the inputs as they need them, and the launches."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        self.given = {
            "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z,
            "dt_bias": dt_bias, "initial_state": initial_state, "seq_idx": seq_idx,
        }  # fmt: skip
        self.batch, self.length, self.d = x.shape
        self.n, self.groups = A.shape[1], B.shape[2]
        common = common_type(x, dt, B, C, z)
        self.x, self.dt, self.B, self.C, self.z = (rows(t, common) for t in (x, dt, B, C, z))
        self.A, self.D, self.dt_bias, self.initial = (scalars(t) for t in (A, D, dt_bias, initial_state))
        self.seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        self.softplus, self.device = dt_softplus, x.device
        self.checkpoints: Tensor | None = None
        self.per_state, self.lanes = _division(self.n)
        self.channels = THREADS // self.lanes * CHANNELS_PER_THREAD  # of a block
        self.channel_blocks = -(-self.d // self.groups // self.channels)  # of a group

    def forward(self, in_place: bool = False) -> tuple[Tensor, Tensor]:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.device)
        final = self._final(in_place)
        segment, count = self._segments("forward")
        params = self._params(segment, count)
        params.y, params.checkpoints = y.data_ptr(), cuda.address(self.checkpoints)
        summaries = self._summarise("summarise", params)
        if count > 1 and final is self.initial:
            final = torch.empty_like(final)  # other blocks still read the initial state
        params.final = final.data_ptr()
        self._launch("forward", params, self._shared(2 + (self.z is not None), _tile(self.n)))
        del summaries
        return self._outputs(y, final, in_place)

    def step(self, in_place: bool = False) -> tuple[Tensor, Tensor]:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.device)
        final = self._final(in_place)
        params = self._params(1, 1)
        params.y, params.final = y.data_ptr(), final.data_ptr()
        self._launch("step", params, 0)
        return self._outputs(y, final, in_place)

    def backward(self, dy: Tensor, dfinal: Tensor) -> dict[str, Tensor | None]:
        given = self.given
        dy, dfinal = rows(dy, self.x.dtype), scalars(dfinal)
        segment, count = self._segments("backward")
        params = self._params(segment, count, dy)
        params.dy, params.dfinal, params.checkpoints = (t.data_ptr() for t in (dy, dfinal, self.checkpoints))
        summaries = self._summarise("summarise_backward", params)

        like_x = {"dtype": self.x.dtype, "device": self.device}
        dx, ddt = (torch.empty(self.x.shape, **like_x) for _ in range(2))
        dz = None if self.z is None else torch.empty(self.x.shape, **like_x)
        wide = {"dtype": torch.float32, "device": self.device}
        dA = torch.empty(self.batch * count, self.d, self.n, **wide)
        dD, ddt_bias = (torch.empty(self.batch * count, self.d, **wide) for _ in range(2))
        dinitial = None if self.initial is None else torch.empty(self.initial.shape, **wide)
        params.partial = self.channel_blocks == 1 or torch.are_deterministic_algorithms_enabled()
        copies = self.channel_blocks if params.partial else 1
        make = torch.empty if params.partial else torch.zeros
        dBC = make(2, copies, *self.B.shape, **wide)
        for name, tensor in (
            ("dx", dx), ("ddt", ddt), ("dz", dz), ("dA", dA), ("dD", dD), ("ddt_bias", ddt_bias),
            ("dinitial", dinitial), ("dB", dBC[0]), ("dC", dBC[1]),
        ):  # fmt: skip
            setattr(params, name, cuda.address(tensor))

        tile, padded = _tile(self.n), self.per_state * self.lanes
        extra = 4 * (tile // SUB - 1) * CHANNELS_PER_THREAD * THREADS * self.per_state  # starts
        extra += 4 * 2 * (THREADS // 32) * SUB * 2 * padded  # slots
        self._launch("backward", params, self._shared(3 + (self.z is not None), tile) + extra)
        del summaries
        dB, dC = (dBC.sum(1) if copies > 1 else dBC.squeeze(1)).to(common_type(given["B"], given["C"]))
        found = {
            "x": dx, "dt": ddt, "z": dz, "A": dA.sum(0), "B": dB, "C": dC, "D": dD.sum(0),
            "dt_bias": ddt_bias.sum(0), "initial_state": dinitial, "seq_idx": None,
        }  # fmt: skip
        return {
            name: None if gradient is None or given[name] is None else gradient.to(given[name].dtype)
            for name, gradient in found.items()
        }

    def new_checkpoints(self) -> Tensor:
        tiles = -(-self.length // _tile(self.n))
        return torch.empty(self.batch, tiles, self.d, self.n, dtype=self.x.dtype, device=self.device)

    def _final(self, in_place: bool) -> Tensor:
        if in_place:
            return self.initial
        return torch.empty(self.batch, self.d, self.n, dtype=torch.float32, device=self.device)

    def _outputs(self, y: Tensor, final: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        state = self.given["initial_state"]
        if in_place and final is not state:
            final = state.copy_(final)
        return y.to(self.given["x"].dtype), final

    def _segments(self, kernel: str) -> tuple[int, int]:
        blocks = self.batch * self.groups * self.channel_blocks
        processors, most = cuda.processors(self.device), BLOCKS_PER_PROCESSOR[kernel]
        return segments.division(self.length, _tile(self.n), blocks, processors, most, *PACES[kernel])

    def _summarise(self, kernel: str, params: _Params) -> tuple[Tensor, Tensor] | None:
        """Each segment's own state and decay, for the blocks of the segments beyond it."""
        if params.segments == 1:
            return None
        shape = (2, self.batch, params.segments, self.d, self.n)
        local, passed = torch.empty(shape, dtype=torch.float32, device=self.device)
        params.local, params.passed = local.data_ptr(), passed.data_ptr()
        streams = 2 + (self.z is not None and kernel == "summarise_backward")
        self._launch(kernel, params, self._shared(streams, _tile(self.n)))
        return local, passed

    def _params(self, segment: int, segments: int, dy: Tensor | None = None) -> _Params:
        params = _Params()
        for name in ("x", "dt", "z", "B", "C", "A", "D", "dt_bias", "initial", "seq_idx"):
            setattr(params, name, cuda.address(getattr(self, name)))
        for name, tensor in (("x", self.x), ("dt", self.dt), ("z", self.z), ("dy", dy)):
            if tensor is not None:
                setattr(params, f"{name}_b", tensor.stride(0))
                setattr(params, f"{name}_l", tensor.stride(1))
        for name, tensor in (("B", self.B), ("C", self.C)):
            for letter, stride in zip("blg", tensor.stride()[:3], strict=True):
                setattr(params, f"{name}_{letter}", stride)
        params.batch, params.length, params.d = self.batch, self.length, self.d
        params.n, params.groups, params.segment, params.segments = self.n, self.groups, segment, segments
        self.aligned = self.d // self.groups % 8 == 0 and cuda.is_aligned(self.x, self.dt, self.z, dy)
        whole_rows = self.n == self.per_state * self.lanes and self.n * self.x.element_size() % 16 == 0
        self.aligned_BC = whole_rows and cuda.is_aligned(self.B, self.C)
        return params

    def _launch(self, name: str, params: _Params, shared: int) -> None:
        settings = {
            "IO": cuda.TYPES[self.x.dtype],
            "NPT": self.per_state,
            "LANES": self.lanes,
            "ALIGNED": int(self.aligned),
            "ALIGNED_BC": int(self.aligned_BC),
            "WHOLE_N": int(self.n == self.per_state * self.lanes),
            "PACKED": int(self.seq_idx is not None),
            "GATED": int(self.z is not None),
            "SOFTPLUS": int(self.softplus),
        }
        blocks = self.batch * params.segments * self.groups * self.channel_blocks
        SOURCE.launch(
            name, settings, params, blocks=blocks, threads=THREADS, shared=shared, device=self.device
        )

    def _shared(self, streams: int, tile: int) -> int:
        """Bytes of shared memory: tiles staged twice, and `Tile` (see tile.cuh)."""
        padded, size = self.per_state * self.lanes, self.x.element_size()
        staged = 2 * tile * (streams * (self.channels * size + 32) + 2 * padded * size)
        row = 8 * (self.channels + 2) + 4 * (self.channels + 4) + 8 * padded + 4
        return staged + tile * row + 8 * self.channels


def _division(n: int) -> tuple[int, int]:
    """States per thread and threads per channel that hold `n` states."""
    padded = 1 << (n - 1).bit_length()
    per_state = min(padded, 4) if padded <= 128 else 8
    return per_state, padded // per_state


def _tile(n: int) -> int:
    """Tokens of a tile, and between saved states."""
    return min(4 * _division(n)[1], 32)
