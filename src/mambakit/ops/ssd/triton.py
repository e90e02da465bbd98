"""State space duality on GPUs: how the kernels of `triton_kernels.py` and `triton_steps.py` are started.

Inputs may be slices of a larger tensor: only their last axis has to be contiguous. Activations are multiplied
in their own type with float32 sums; float32 activations follow PyTorch's switch for matrix products
(`torch.set_float32_matmul_precision`). All sums are taken in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.ops import cuda, segments, triton_utils
from mambakit.ops.operands import common_type, rows, scalars

device = "cuda"
dtypes = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 16
"""Heads whose step sizes are prepared together."""
CHUNK = 64
"""Tokens of a chunk: the least that fills a matrix unit; longer ones compute more inside the chunk."""
STATES = 128
"""States of a program in `matrix_gradients`."""
MOST_CHANNELS = 128
MOST_STATES = 256
PROGRAMS_PER_PROCESSOR = 2
LAUNCH = {
    "summarise": {"num_warps": 4, "num_stages": 1},
    "forward": {"num_warps": 4, "num_stages": 2},
    "states": {"num_warps": 4, "num_stages": 2},
    "input_gradients": {"num_warps": 4, "num_stages": 1},
    "matrix_gradients": {"num_warps": 8, "num_stages": 2},
}
"""Warps of a program and chunks in flight, by kernel."""
_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def unsupported(x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, *_: Any) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if reason := triton_utils.runs_on(x.device):
        return reason
    common = common_type(x, B, C) if A is None else common_type(x, dt, B, C)
    if common not in dtypes:
        return f"takes float32, bfloat16 and float16, not {common}"
    if x.shape[3] > MOST_CHANNELS:
        return f"takes heads of up to {MOST_CHANNELS} channels, not {x.shape[3]}"
    if B.shape[3] > MOST_STATES:
        return f"takes up to {MOST_STATES} states, not {B.shape[3]}"
    return None


def infer(*inputs: Any, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Outputs and final state, nothing kept for a backward pass."""
    call = _Call(*inputs)
    return call.step(in_place) if call.length == 1 else call.forward(in_place)


def forward(*inputs: Any) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Outputs and final state; the backward pass needs nothing but the inputs."""
    return _Call(*inputs).forward(), []


def saved_like(*inputs: Any) -> list[Tensor]:
    """Nothing."""
    return []


def backward(saved: Sequence[Tensor], grads: Sequence[Tensor], *inputs: Any) -> list[Tensor | None]:
    """Gradients of the tensor inputs, in their order."""
    call = _Call(*inputs)
    found = call.backward(*grads)
    return [found[name] for name, tensor in call.given.items() if tensor is not None]


kernels = triton_utils.Kernels("mambakit.ops.ssd.triton_kernels")
step_kernels = triton_utils.Kernels("mambakit.ops.ssd.triton_steps")


class _Call:
    """One use of the kernels: the inputs as they need them, and the launches."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor | None,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
    ) -> None:
        self.given = {
            "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D,
            "dt_bias": dt_bias, "initial_state": initial_state, "seq_idx": seq_idx,
        }  # fmt: skip
        self.batch, self.length, self.h, self.p = x.shape
        self.groups, self.n = B.shape[2:]
        self.per_group = self.h // self.groups
        # Logarithms keep their digits: they are few, and summed.
        common = common_type(x, B, C) if A is None else common_type(x, dt, B, C)
        self.x, self.B, self.C = (rows(t, common) for t in (x, B, C))
        self.dt = dt.to(torch.float32 if A is None else common)
        self.A, self.D, self.dt_bias, self.initial = (scalars(t) for t in (A, D, dt_bias, initial_state))
        self.seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        self.limits = {"dt_min": dt_min, "dt_max": dt_max}
        self.softplus = {"SOFTPLUS": dt_softplus, "CLAMP": (dt_min, dt_max) != (0.0, torch.inf)}
        self.monotone = dt_softplus or (self.softplus["CLAMP"] and dt_min >= 0)  # no step is negative
        self.sizes = {
            "p": self.p,
            "n": self.n,
            "P": triton_utils.block(self.p),
            "N": triton_utils.block(self.n),
        }
        self.precision = {"PRECISION": _PRECISION[torch.get_float32_matmul_precision()]}
        self.packed = {"PACKED": seq_idx is not None, "EXACT": common == torch.float32}
        self.device = x.device
        self.chunks = -(-self.length // CHUNK)

    def forward(self, in_place: bool = False) -> tuple[Tensor, Tensor]:
        decays = self._prepare()
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.device)
        segment, count = self._segments(1)
        final = self.initial if in_place and count == 1 else self._new_state()
        local, passed = self._summaries(self.x, self.B, decays, segment, count, reverse=False)
        kernels.forward[(self.batch * self.h * count,)](
            self.x, self.B, self.C, self.A, self.D, *decays, self.initial, y, final, local, passed,
            *_strides(self.x, self.B, self.C), *self._skip_strides(),
            self.length, self.h, self.per_group, segment, count, self.chunks,
            Q=CHUNK, **self.sizes, **self.packed, **self.precision, **LAUNCH["forward"],
        )  # fmt: skip
        return self._outputs(y, final, in_place)

    def step(self, in_place: bool = False) -> tuple[Tensor, Tensor]:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.device)
        final = self.initial if in_place else self._new_state()
        kernels.step[(self.batch * self.h,)](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias, self.initial, y, final,
            *(t.stride(axis) for t in (self.x, self.dt, self.B, self.C) for axis in (0, 2)),
            *self._skip_strides(), self.h, self.per_group, **self.limits, **self.sizes, **self.softplus,
            num_warps=4,
        )  # fmt: skip
        return self._outputs(y, final, in_place)

    def backward(self, dy: Tensor, dfinal: Tensor) -> dict[str, Tensor | None]:
        dy, dfinal = rows(dy, self.x.dtype), scalars(dfinal)
        decays = self._prepare()
        steps, logs, since, entry, end, total, borders = decays
        segment, count = self._segments(2)
        local, passed = self._summaries(self.x, self.B, decays, segment, count, reverse=False)
        dlocal, dpassed = self._summaries(dy, self.C, decays, segment, count, reverse=True)
        by_chunk = (self.batch, self.chunks, self.h)
        like_x = {"dtype": self.x.dtype, "device": self.device}
        entering, leaving = (torch.empty(*by_chunk, self.p, self.n, **like_x) for _ in range(2))
        dinitial = None if self.initial is None else self._new_state()
        strides = _strides(self.x, dy, self.B, self.C)
        kernels.states[(self.batch * self.h * count, 2)](
            self.x, dy, self.B, self.C, steps, entry, end, total, self.initial, dfinal,
            entering, leaving, dinitial, local, passed, dlocal, dpassed, *strides,
            self.length, self.h, self.per_group, segment, count, self.chunks,
            Q=CHUNK, **self.sizes, **self.precision, **LAUNCH["states"],
        )  # fmt: skip

        wide = {"dtype": torch.float32, "device": self.device}
        dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in (self.x, self.dt))
        dsteps, dlogs = (torch.empty_like(steps) for _ in range(2))
        dD = None if self.D is None else torch.empty(*by_chunk, self.p, **wide)
        programs = self.batch * self.chunks * self.groups
        together, parts = self._heads_together(programs)
        kernels.input_gradients[(programs * parts,)](
            self.x, dy, self.B, self.C, self.A, self.D, steps, logs, since, end, borders, leaving,
            dx, dsteps, dlogs, dD, *strides, *self._skip_strides(),
            self.length, self.h, self.groups, self.per_group, together, self.chunks,
            Q=CHUNK, **self.sizes, **self.packed, **self.precision, **LAUNCH["input_gradients"],
        )  # fmt: skip
        states_together = min(STATES, self.sizes["N"])
        state_parts = -(-self.n // states_together)
        together, parts = self._heads_together(programs * state_parts)
        dB, dC = (torch.empty(parts, *self.B.shape, **wide) for _ in range(2))
        inflow, overlap = (torch.empty(state_parts, *t.shape, **wide) for t in (steps, total))
        kernels.matrix_gradients[(programs * parts, state_parts)](
            self.x, dy, self.B, self.C, self.A, steps, logs, since, entry, end, borders, entering, leaving,
            dB, dC, inflow, overlap, *strides,
            self.batch, self.length, self.h, self.groups, self.per_group, together, self.chunks,
            Q=CHUNK, p=self.p, n=self.n, P=self.sizes["P"], S=states_together,
            **self.packed, **self.precision, **LAUNCH["matrix_gradients"],
        )  # fmt: skip
        dA, ddt_bias = (torch.empty(by_chunk, **wide) for _ in range(2))
        step_kernels.finish[self._step_grid()](
            self.dt, self.A, self.dt_bias, steps, total, dsteps, dlogs, inflow, overlap, ddt, dA, ddt_bias,
            *self.dt.stride(), self.length, self.h, self.chunks, total.numel(), **self.limits,
            PARTS=state_parts, Q=CHUNK, H=HEADS, **self.softplus,
        )  # fmt: skip
        if dD is not None:
            dD = dD.sum((0, 1)) if self.D.dim() == 2 else dD.sum((0, 1, 3))
        found = {
            "x": dx, "dt": ddt, "A": dA.sum((0, 1)), "B": dB.sum(0), "C": dC.sum(0), "D": dD,
            "dt_bias": ddt_bias.sum((0, 1)), "initial_state": dinitial, "seq_idx": None,
        }  # fmt: skip
        return {
            name: None
            if gradient is None or self.given[name] is None
            else gradient.to(self.given[name].dtype)
            for name, gradient in found.items()
        }

    def _prepare(self) -> tuple[Tensor | None, ...]:
        """What `prepare` makes of the step sizes: steps, logs, since, entry, end, total, borders."""
        wide = {"dtype": torch.float32, "device": self.device}
        shape = (self.batch, self.h, self.chunks, CHUNK)
        steps, entry, end = (torch.empty(shape, **wide) for _ in range(3))
        total = torch.empty(shape[:3], **wide)
        logs = steps if self.A is not None else torch.empty(shape, **wide)
        since, borders = entry, None
        if self.seq_idx is not None:
            since = torch.empty(shape, **wide)
            borders = torch.empty(self.batch, self.chunks, CHUNK, dtype=torch.int32, device=self.device)
        step_kernels.prepare[self._step_grid()](
            self.dt, self.A, self.dt_bias, self.seq_idx, steps, logs, since, entry, end, total, borders,
            *self.dt.stride(), self.length, self.h, self.chunks, **self.limits,
            Q=CHUNK, H=HEADS, **self.softplus, PACKED=self.seq_idx is not None,
        )  # fmt: skip
        return steps, logs, since, entry, end, total, borders

    def _step_grid(self) -> tuple[int, int, int]:
        return self.chunks, -(-self.h // HEADS), self.batch

    def _summaries(
        self,
        u: Tensor,
        v: Tensor,
        decays: tuple[Tensor | None, ...],
        segment: int,
        count: int,
        *,
        reverse: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Each segment's own state (or gradient) and the logarithm of its decay."""
        if count == 1:
            return None, None
        steps, _, _, entry, end, total, _ = decays
        shape = (self.batch, count, self.h)
        local = torch.empty(*shape, self.p, self.n, dtype=torch.float32, device=self.device)
        passed = torch.empty(shape, dtype=torch.float32, device=self.device)
        kernels.summarise[(self.batch * self.h * count,)](
            u, v, steps, entry, end, total, local, passed, *_strides(u, v),
            self.length, self.h, self.per_group, segment, count, self.chunks,
            REVERSE=reverse, MONOTONE=self.monotone, **self.precision, Q=CHUNK, **self.sizes,
            **LAUNCH["summarise"],
        )  # fmt: skip
        return local, passed

    def _segments(self, walks: int) -> tuple[int, int]:
        blocks, processors = self.batch * self.h * walks, cuda.processors(self.device)
        return segments.division(self.length, CHUNK, blocks, processors, PROGRAMS_PER_PROCESSOR)

    def _heads_together(self, programs: int) -> tuple[int, int]:
        """Heads that a program loops over, and programs per group: few, but enough for the GPU."""
        wanted = cuda.processors(self.device) * PROGRAMS_PER_PROCESSOR
        parts = min(self.per_group, max(1, -(-wanted // programs)))
        together = -(-self.per_group // parts)
        return together, -(-self.per_group // together)

    def _skip_strides(self) -> tuple[int, int]:
        if self.D is None:
            return 0, 0
        return self.D.stride(0), self.D.stride(1) if self.D.dim() == 2 else 0

    def _new_state(self) -> Tensor:
        return torch.empty(self.batch, self.h, self.p, self.n, dtype=torch.float32, device=self.device)

    def _outputs(self, y: Tensor, final: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        state = self.given["initial_state"]
        if in_place and final is not state:
            final = state.copy_(final)
        return y.to(self.given["x"].dtype), final


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of rows, tokens and heads (or groups) of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
