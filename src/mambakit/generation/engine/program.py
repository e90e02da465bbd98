"""A language model laid down as the list of phases that `native.cpp` walks through.

The structs here are those of `program.h`, field by field; every field has 8 bytes. A mixer becomes two to
four phases: its input projection with the convolution, its recurrence, its output projection, which adds to
the residual stream.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mambakit.generation.engine.arena import ALIGNMENT, Arena
from mambakit.generation.engine.weights import FORMS, GROUP, PANEL, Form, pack, packed_size
from mambakit.layers.conv import CausalConv1d
from mambakit.layers.mamba1 import Mamba1
from mambakit.layers.mamba2 import Mamba2
from mambakit.layers.mixer import Mixer
from mambakit.layers.mlp import GatedMLP
from mambakit.layers.norm import GatedRMSNorm, RMSNorm
from mambakit.layers.quantised import RoundedLinear
from mambakit.models.language import LanguageModel

MOST_BATCH = 16
"""Sequences that one step takes at most."""
_TASK_BYTES = 32 << 10  # weights that a thread takes at once, at least
_LOG2_E = math.log2(math.e)

_STORE, _ADD, _SILU, _GELU, _RELU2, _STEP, _CONV, _SCAN = range(8)
_ACTIVATIONS = {"silu": _SILU, "gelu": _GELU, "relu2": _RELU2}


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct of pointers and whole numbers; a field written `name!` is a floating-point number."""
    types = [
        (field.rstrip("!"), ctypes.c_double if field.endswith("!") else ctypes.c_int64)
        for field in fields.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": types})


Prepare = _struct("Prepare", "gate gate_stride weight eps! group gate_last")
Product = _struct("Product", "weights bias rows then how out stride")
Step = _struct("Step", "bias least! most!")
Conv = _struct("Conv", "taps bias width state state_bf16")
Scan = _struct("Scan", "dt_bias A D x x_stride gate gate_stride B C BC_stride n state")
Heads = _struct("Heads", "A D dt dt_stride x B C mixed_stride out out_stride heads headdim groups n state")
Phase = _struct("Phase", "heads input stride columns prepare format products count per_task")
Args = _struct(
    "Args",
    "phases phase_count tokens embedding embedding_bf16 d_model residual residual_stride states logits "
    "logits_stride room widest batch threads vnni struct_bytes",
)
STRUCT_BYTES = sum(map(ctypes.sizeof, (Prepare, Product, Step, Conv, Scan, Heads, Phase, Args)))


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Activations `(batch, width)`, rows at a stride; columns beyond the width stay zero."""

    pointer: int
    stride: int

    def column(self, number: int) -> int:
        """The address of a column."""
        return self.pointer + 4 * number


@dataclasses.dataclass(frozen=True)
class Program:
    """What the native step needs of a model.

    Attributes:
        phases: The list of phases, an array of structs.
        residual: The residual stream.
        leaves: Block and name of every tensor of the state, in the order of the table that the step is given.
        widest: Columns of the widest linear layer.
        weight_bytes: Bytes of weights that a step reads.
        kept: Whatever the phases point to.
    """

    phases: ctypes.Array
    residual: Buffer
    leaves: Sequence[tuple[str, str]]
    widest: int
    weight_bytes: int
    kept: Sequence[object]


def build(model: LanguageModel, form: Form) -> Program:
    """Lay down a model.

    Args:
        model: A model whose parts are all of the kinds below.
        form: How the weights are kept.

    Returns:
        The program; it shares no memory with the model.
    """
    return _Builder(model, form).build()


class _Builder:
    def __init__(self, model: LanguageModel, form: Form) -> None:
        self.model, self.form = model, form
        self.arena = Arena(_capacity(model, form))
        self.buffers: dict[tuple[str, int], Buffer] = {}
        self.phases: list[ctypes.Structure] = []
        self.leaves: list[tuple[str, str]] = []
        self.kept: list[object] = [self.arena]
        self.widest = model.config.d_model

    def build(self) -> Program:
        self.residual = self.buffer("residual", self.model.config.d_model)
        for number, block in enumerate(self.model.backbone.blocks):
            _LAY[type(block.mixer)](self, str(number), block.norm, block.mixer)
        head = self.model.lm_head
        norm = self.norm(self.model.backbone.norm_f)
        self.linear(self.residual, head.in_features, [self.product(matrix(head), None, _STORE)], norm)
        phases = (Phase * len(self.phases))(*self.phases)
        return Program(phases, self.residual, self.leaves, self.widest, self.arena.taken, self.kept)

    # -----------------------------------------------------------------------------------------------------
    # Pieces

    def keep(self, struct: ctypes.Structure | ctypes.Array) -> int:
        """The address of a struct, which lives as long as the program."""
        self.kept.append(struct)
        return ctypes.addressof(struct)

    def constant(self, tensor: Tensor | None) -> int:
        """The address of a copy in float32; 0 for none."""
        if tensor is None:
            return 0
        copy = self.arena.take(4 * tensor.numel()).view(torch.float32)
        copy.copy_(tensor.detach().float().flatten())
        return copy.data_ptr()

    def buffer(self, name: str, width: int) -> Buffer:
        """Activations of a name and width, the same for every block."""
        if (name, width) not in self.buffers:
            stride = -(-width // GROUP) * GROUP
            memory = torch.zeros(MOST_BATCH * stride + ALIGNMENT // 4)
            self.kept.append(memory)
            pointer = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
            self.buffers[name, width] = Buffer(pointer, stride)
        return self.buffers[name, width]

    def state(self, block: str, name: str) -> int:
        """The number of a tensor in the table of states."""
        self.leaves.append((block, name))
        return len(self.leaves) - 1

    def norm(self, norm: RMSNorm) -> int:
        """Normalise the phase's input."""
        return self.keep(Prepare(weight=self.constant(norm.weight), eps=norm.eps, group=norm.weight.numel()))

    def product(
        self,
        weight: Tensor,
        bias: Tensor | None,
        then: int,
        out: Buffer | None = None,
        how: ctypes.Structure | None = None,
    ) -> ctypes.Structure:
        """A linear layer, or some of its rows; without a buffer its results are the logits."""
        packed = self.arena.take(packed_size(*weight.shape, self.form))
        pack(weight, self.form, packed)
        return Product(
            weights=packed.data_ptr(),
            bias=self.constant(bias),
            rows=weight.shape[0],
            then=then,
            how=0 if how is None else self.keep(how),
            out=out.pointer if out else 0,
            stride=out.stride if out else 0,
        )

    def linear(
        self, source: Buffer, columns: int, products: Sequence[ctypes.Structure], prepare: int = 0
    ) -> None:
        """A phase of linear layers with one input."""
        self.widest = max(self.widest, columns)
        self.phases.append(
            Phase(
                input=source.pointer,
                stride=source.stride,
                columns=columns,
                prepare=prepare,
                format=FORMS.index(self.form),
                products=self.keep((Product * len(products))(*products)),
                count=len(products),
                per_task=max(1, _TASK_BYTES // packed_size(PANEL, columns, self.form)),
            )
        )

    def parts(self, linear: nn.Linear, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of a linear layer in parts of so many rows."""
        biases = itertools.repeat(None) if linear.bias is None else linear.bias.split(sizes)
        return zip(matrix(linear).split(sizes), biases, strict=False)

    def conv(self, block: str, conv: CausalConv1d) -> ctypes.Structure:
        return Conv(
            taps=self.constant(conv.weight.squeeze(1).t().contiguous()),
            bias=self.constant(conv.bias),
            width=conv.weight.shape[-1],
            state=self.state(block, "conv"),
            state_bf16=conv.weight.dtype == torch.bfloat16,
        )

    # -----------------------------------------------------------------------------------------------------
    # Mixers

    def mamba1(self, block: str, norm: RMSNorm, mixer: Mamba1) -> None:
        ssm, d = mixer.ssm, mixer.out_proj.in_features
        rank, n, _ = ssm.split
        x, gate, y = (self.buffer(name, d) for name in ("x", "gate", "y"))
        projected = self.buffer("dt B C", sum(ssm.split))
        stream_part, gate_part = self.parts(mixer.in_proj, (d, d))
        stream = self.product(*stream_part, _CONV, x, self.conv(block, mixer.conv1d))
        gates = self.product(*gate_part, _SILU, gate)
        self.linear(self.residual, mixer.in_proj.in_features, [stream, gates], self.norm(norm))
        self.linear(x, d, [self.product(matrix(ssm.x_proj), None, _STORE, projected)])
        scan = Scan(
            dt_bias=self.constant(ssm.dt_bias),
            A=self.constant(-torch.exp(ssm.A_log.detach()) * _LOG2_E),
            D=self.constant(ssm.D),
            x=x.pointer,
            x_stride=x.stride,
            gate=gate.pointer,
            gate_stride=gate.stride,
            B=projected.column(rank),
            C=projected.column(rank + n),
            BC_stride=projected.stride,
            n=n,
            state=self.state(block, "ssm"),
        )
        self.linear(projected, rank, [self.product(matrix(ssm.dt_proj), None, _SCAN, y, scan)])
        self.linear(y, d, [self.product(matrix(mixer.out_proj), mixer.out_proj.bias, _ADD, self.residual)])

    def mamba2(self, block: str, norm: RMSNorm, mixer: Mamba2) -> None:
        config, (d, channels, heads) = mixer.config, mixer.split
        gate, y = self.buffer("gate", d), self.buffer("y", d)
        mixed, dt = self.buffer("x B C", channels), self.buffer("dt", heads)
        least, most = config.dt_limit
        step = Step(bias=self.constant(mixer.dt_bias), least=least, most=most)
        z_part, mixed_part, dt_part = self.parts(mixer.in_proj, mixer.split)
        products = [
            self.product(*z_part, _SILU, gate),
            self.product(*mixed_part, _CONV, mixed, self.conv(block, mixer.conv1d)),
            self.product(*dt_part, _STEP, dt, step),
        ]
        self.linear(self.residual, mixer.in_proj.in_features, products, self.norm(norm))
        states = Heads(
            A=self.constant(-torch.exp(mixer.A_log.detach()) * _LOG2_E),
            D=self.constant(mixer.D),
            dt=dt.pointer,
            dt_stride=dt.stride,
            x=mixed.pointer,
            B=mixed.column(d),
            C=mixed.column(d + config.ngroups * config.d_state),
            mixed_stride=mixed.stride,
            out=y.pointer,
            out_stride=y.stride,
            heads=heads,
            headdim=config.headdim,
            groups=config.ngroups,
            n=config.d_state,
            state=self.state(block, "ssm"),
        )
        per_task = max(1, _TASK_BYTES // (64 * config.d_state))
        self.phases.append(Phase(heads=self.keep(states), per_task=per_task))
        out = self.product(matrix(mixer.out_proj), mixer.out_proj.bias, _ADD, self.residual)
        self.linear(y, d, [out], self.gated_norm(mixer.norm, gate))

    def gated_norm(self, norm: GatedRMSNorm, gate: Buffer) -> int:
        return self.keep(
            Prepare(
                gate=gate.pointer,
                gate_stride=gate.stride,
                weight=self.constant(norm.weight),
                eps=norm.eps,
                group=norm.group_size or norm.weight.numel(),
                gate_last=norm.norm_before_gate,
            )
        )

    def mlp(self, block: str, norm: RMSNorm, mixer: GatedMLP) -> None:
        hidden = mixer.out_proj.in_features
        value, gate = self.buffer("value", hidden), self.buffer("gate", hidden)
        value_part, gate_part = self.parts(mixer.in_proj, (hidden, hidden))
        products = [
            self.product(*value_part, _STORE, value),
            self.product(*gate_part, _ACTIVATIONS[mixer.config.activation], gate),
        ]
        self.linear(self.residual, mixer.in_proj.in_features, products, self.norm(norm))
        gated = self.keep(Prepare(gate=gate.pointer, gate_stride=gate.stride))
        out = self.product(matrix(mixer.out_proj), mixer.out_proj.bias, _ADD, self.residual)
        self.linear(value, hidden, [out], gated)


_LAY: dict[type[Mixer], Callable[[_Builder, str, RMSNorm, Mixer], None]] = {
    Mamba1: _Builder.mamba1,
    Mamba2: _Builder.mamba2,
    GatedMLP: _Builder.mlp,
}
MIXERS = tuple(_LAY)
"""Classes of mixers that can be laid down; a subclass may compute something else and is not one of them."""


def matrix(linear: nn.Linear | RoundedLinear) -> Tensor:
    """A linear layer's weight; of a rounded one what it stands for, which packs to the same integers."""
    return linear.restored(torch.float32) if isinstance(linear, RoundedLinear) else linear.weight


def size(model: LanguageModel, form: Form) -> int:
    """Bytes of a model's weights in a form, about."""
    return _capacity(model, form)


def _capacity(model: LanguageModel, form: Form) -> int:
    """At least the bytes that a model takes in the arena.

    Parts of a linear layer are padded each on their own, hence some panels more.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, RoundedLinear)):
            total += packed_size(module.out_features + 3 * PANEL, module.in_features, form) + 4 * ALIGNMENT
    own = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    return total + sum(
        4 * parameter.numel() + ALIGNMENT for parameter in model.parameters() if id(parameter) not in own
    )
