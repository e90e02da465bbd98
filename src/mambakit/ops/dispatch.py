"""How an operator finds its implementation: registration, choice of backend, and the derivative's glue.

An operator has one contract (its public function) and several backends in order of preference. A *plain*
backend (`chunked`, `reference`) is one differentiable PyTorch function named like the operator. A *kernel*
backend (C++, CUDA, Triton) is a module with

    unsupported(*inputs) -> str | None        why these inputs cannot be taken, or None
    infer(*inputs, in_place=False) -> outputs where no gradient is wanted; outputs as the contract says, final
                                              states after `y`; in place, they overwrite the initial ones
    forward(*inputs) -> (outputs, saved)      the same, with what the backward needs besides the inputs
    backward(saved, grads, *inputs) -> grads  one gradient (or None) per tensor argument, in its type
    saved_like(*inputs) -> list[Tensor]       empty tensors shaped like `saved`, for tracing
    device                                    "cpu" or "cuda": where it is meant to run
    dtypes                                    types of activations that it takes, the most exact first

and, where the backward pass can do without some inputs, so that their memory is free meanwhile,

    spent                                     names of the tensor arguments whose values it never reads
    kept_outputs                              numbers of the outputs that it reads, before `saved`
    rebuilt(saved, *inputs) -> inputs         stand-ins for all inputs with the same derivatives

For each operator that has kernels two low-level `torch.library` operators are registered,
`mambakit::name(..., bool grad, str backend)` and `mambakit::name_backward(..., str backend)`, so kernels
trace under `torch.compile(fullgraph=True)` and selective checkpointing sees one node. A kernel states its
first derivative; a second one is taken through the plain backend. Eager inference calls the kernel directly.
Plain backends are always called directly: PyTorch already knows everything about them.

The choice looks at device, dtype and shapes only, so it is a constant while tracing. It is process-wide, not
per thread.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.config import unknown

registry: dict[str, Op] = {}
"""Every operator by name."""

_library = torch.library.Library("mambakit", "DEF")
_forced: dict[str, str] = {}  # operator name, or "*" for all -> backend name
_said: set[tuple[str, str, str]] = set()
_asked: Op | None = None  # the operator that `explain` asks about, instead of running it


class Op:
    """One operator: its name, its backends in order of preference, and its bookkeeping.

    Args:
        name: The operator's name; also the name of the function in each plain backend.
        backends: Backend name -> module, most preferred first; must include `reference`, whose signature is
            the operator's positional argument list.
        outputs: Number of output tensors; one is returned as it is, several as a tuple.
        fake: `fake(*inputs) -> outputs` of empty tensors, needed once the operator has a kernel backend.
        flops: `flops(*inputs) -> int`, floating-point operations of one forward pass (a multiply-add counts
            two).
    """

    def __init__(
        self,
        name: str,
        backends: dict[str, types.ModuleType],
        *,
        outputs: int = 1,
        fake: Callable[..., Sequence[Tensor]] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self.backends = backends
        self.outputs = outputs
        self.fake = fake
        self.flops = flops
        self.signature = inspect.signature(getattr(backends["reference"], name))
        self.arguments = list(self.signature.parameters)
        self.kernels = {key for key, module in backends.items() if hasattr(module, "forward")}
        self._states = [i for i, name in enumerate(self.arguments) if name.startswith("initial_")]
        if self.kernels:
            _register_kernels(self)
        registry[name] = self

    def __call__(
        self, *inputs: Any, state: Tensor | Sequence[Tensor] | None = None, backend: str | None = None
    ) -> Any:
        """Run the operator on its positional inputs.

        Args:
            *inputs: The operator's arguments in order.
            state: A recurrent state to start from and to overwrite in place with the final one, a tensor for
                each argument named `initial_...`, which they replace.
            backend: A backend's name, or `None` for the enclosing `with backend(...)` or the first able one.

        Returns:
            What the operator's contract says.

        Raises:
            ValueError: Both `state` and `initial_state` are given, the backend's name is unknown, or the
                named backend cannot take these inputs (with its reason).
        """
        if _asked is self:
            raise _Answer({name: self._unsupported(name, inputs) for name in self.backends})
        states = () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)
        if states:
            if len(states) != len(self._states) or any(inputs[i] is not None for i in self._states):
                raise ValueError(f"{self.name}: give either initial_state or state, not both")
            given = dict(zip(self._states, states, strict=True))
            inputs = tuple(given.get(i, value) for i, value in enumerate(inputs))
        chosen = self.choose(inputs, backend)
        if states and chosen in self.kernels and _is_plain_inference(inputs):
            return tuple(self.backends[chosen].infer(*inputs, in_place=True))
        outputs = self._run(chosen, inputs)
        if states:
            for before, after in zip(states, outputs[1:], strict=False):
                before.copy_(after.detach())
            outputs = (outputs[0], *states, *outputs[1 + len(states) :])
        return outputs

    def choose(self, inputs: Sequence[Any], backend: str | None = None) -> str:
        """Name the backend that these inputs go to; see `__call__` for the rules and errors."""
        wanted = backend or _forced.get(self.name) or _forced.get("*")
        if wanted in self.backends:
            reason = self._unsupported(wanted, inputs)
            if reason is not None:
                raise ValueError(f"{self.name}: backend {wanted!r} cannot take these inputs: {reason}")
            return wanted
        if backend is not None:
            raise ValueError(f"{self.name}: {unknown('backend', backend, self.backends)}")
        for name in self.backends:
            reason = self._unsupported(name, inputs)
            if reason is None:
                return name
            self._say_once(name, reason, inputs)
        raise ValueError(f"{self.name}: no backend takes these inputs")

    def _unsupported(self, name: str, inputs: Sequence[Any]) -> str | None:
        if name in self.kernels and _is_transformed():
            return "torch.func cannot look inside it"
        test = getattr(self.backends[name], "unsupported", None)
        return test(*inputs) if test else None

    def _say_once(self, name: str, reason: str, inputs: Sequence[Any]) -> None:
        """Warn, once, that a kernel meant for this device was passed over."""
        meant_for = getattr(self.backends[name], "device", None)
        if torch.compiler.is_compiling() or inputs[0].device.type != meant_for:
            return
        if (self.name, name, reason) not in _said:
            _said.add((self.name, name, reason))
            warnings.warn(f"{self.name}: not using the {name} kernels: {reason}", stacklevel=4)

    def _run(self, name: str, inputs: Sequence[Any]) -> Any:
        device = inputs[0].device.type
        if name in self.kernels:
            found = _call_kernel(self, name, inputs)
            return found[0] if self.outputs == 1 else found
        function = getattr(self.backends[name], self.name)
        if torch.is_autocast_enabled(device):
            # The operators choose their own precision; autocast would round inside the recurrence.
            with torch.autocast(device, enabled=False):
                return function(*inputs)
        return function(*inputs)


@contextlib.contextmanager
def backend(name: str | None = None, **per_op: str) -> Iterator[None]:
    """Force backends inside a `with` block.

    Args:
        name: A backend for every operator that has one of that name; operators without it choose as usual.
        **per_op: `operator=backend` pairs, which win over `name`.

    Yields:
        Nothing.

    Raises:
        ValueError: No operator has a backend of that name, or an operator's name is unknown.
    """
    every = {key for op in registry.values() for key in op.backends}
    if name is not None and name not in every:
        raise ValueError(unknown("backend", name, every))
    for op, choice in per_op.items():
        if op not in registry:
            raise ValueError(unknown("operator", op, registry))
        if choice not in registry[op].backends:
            raise ValueError(f"{op}: {unknown('backend', choice, registry[op].backends)}")
    before = dict(_forced)
    _forced.update(per_op if name is None else {"*": name, **per_op})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def extended(name: str, **per_op: types.ModuleType) -> Iterator[None]:
    """Lend operators one more plain backend inside a `with` block, where it is used for all of them.

    An exporter needs forms of its own, such as ones that hold for every length when they are traced for one.

    Args:
        name: Name of the backend.
        **per_op: Operator -> module with a function of the operator's name.

    Yields:
        Nothing.
    """
    for op, module in per_op.items():
        registry[op].backends[name] = module
    try:
        with backend(**dict.fromkeys(per_op, name)):
            yield
    finally:
        for op in per_op:
            del registry[op].backends[name]


def is_forced() -> bool:
    """Whether a `with backend(...)` around here names backends."""
    return bool(_forced)


def reasons(name: str, *inputs: Any, **options: Any) -> dict[str, str | None]:
    """Ask every backend of an operator whether it can take some inputs.

    Args:
        name: The operator's name.
        *inputs: Its inputs, as for the public function.
        **options: Its keyword arguments, likewise.

    Returns:
        Backend, most preferred first -> why it cannot take them, or `None`.

    Raises:
        ValueError: The operator's name is unknown, or what the operator itself refuses.
    """
    global _asked
    if name not in registry:
        raise ValueError(unknown("operator", name, registry))
    _asked = registry[name]
    try:
        getattr(sys.modules["mambakit.ops"], name, _asked)(*inputs, **options)
    except _Answer as answer:
        return answer.reasons
    finally:
        _asked = None
    raise AssertionError(f"{name}: the public function does not call the operator")


def explain(name: str, *inputs: Any, **options: Any) -> str:
    """Say which backend an operator would use for these inputs, and why not the others.

    Args:
        name: The operator's name.
        *inputs: Its inputs, as for the public function.
        **options: Its keyword arguments, likewise.

    Returns:
        A table with a line per backend.

    Raises:
        ValueError: The operator's name is unknown, or what the operator itself refuses.
    """
    rows = reasons(name, *inputs, **options)
    chosen = next((key for key, reason in rows.items() if reason is None), None)
    width = max(map(len, rows))
    lines = [
        f"  {key:<{width}}  {'used' if key == chosen else 'can' if reason is None else 'cannot: ' + reason}"
        for key, reason in rows.items()
    ]
    return "\n".join([name, *lines])


class _Answer(Exception):
    """Carries, out of an operator's public function, why each backend cannot take the inputs."""

    def __init__(self, reasons: dict[str, str | None]) -> None:
        super().__init__()
        self.reasons = reasons


# ---------------------------------------------------------------------------------------------------------
# Kernels as torch.library operators


_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


def _schema(op: Op) -> str:
    """The operator's arguments in torch's schema language, from the reference's type hints."""
    hints = typing.get_type_hints(getattr(op.backends["reference"], op.name))
    words = []
    for argument in op.arguments:
        options = [t for t in (typing.get_args(hints[argument]) or (hints[argument],)) if t is not type(None)]
        optional = "?" if len(options) < len(typing.get_args(hints[argument])) else ""
        words.append(f"{_SCHEMA_TYPES[options[0]]}{optional} {argument}")
    return ", ".join(words)


def _register_kernels(op: Op) -> None:
    """Define the two low-level operators and their fakes."""
    if op.fake is None:
        raise ValueError(f"{op.name}: an operator with kernel backends needs a fake")
    schema = _schema(op)
    _library.define(f"{op.name}({schema}, bool grad, str backend) -> Tensor[]")
    _library.define(f"{op.name}_backward(Tensor[] saved, Tensor[] grads, {schema}, str backend) -> Tensor[]")

    def forward(*arguments: Any) -> list[Tensor]:
        *inputs, grad, name = arguments
        kernel = op.backends[name]
        if not grad:
            return list(kernel.infer(*inputs))
        outputs, saved = kernel.forward(*inputs)
        return [*outputs, *saved]

    def forward_fake(*arguments: Any) -> list[Tensor]:
        *inputs, grad, name = arguments
        return [*op.fake(*inputs), *(op.backends[name].saved_like(*inputs) if grad else ())]

    def backward(saved: list[Tensor], grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        *inputs, name = arguments
        found = op.backends[name].backward(saved, grads, *inputs)
        given = [_absent(grads[0]) if grad is None else grad for grad in found]
        return [g.clone() if any(g is h for h in given[:i]) else g for i, g in enumerate(given)]

    def backward_fake(saved: list[Tensor], grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        *inputs, _ = arguments
        return [
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            if t.is_floating_point() or t.is_complex()
            else _absent(t)
            for t in inputs
            if isinstance(t, Tensor)
        ]

    for suffix, run, fake in (("", forward, forward_fake), ("_backward", backward, backward_fake)):
        _library.impl(f"{op.name}{suffix}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mambakit::{op.name}{suffix}", fake, lib=_library)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Floating-point operations of the operators that run as kernels, for PyTorch's counter.

    `FlopCounterMode(custom_mapping=ops.flop_formulas())` counts them beside PyTorch's own operators. A
    backward pass counts as two forward passes. (Registering the formulas at import would import Triton.)

    Returns:
        Registered operator -> formula of its arguments.
    """
    found = {}
    for op in registry.values():
        if op.kernels and op.flops is not None:
            formulas = {
                op.name: lambda *a, out_val=None, flops=op.flops, **_: flops(*a[:-2]),
                f"{op.name}_backward": lambda *a, out_val=None, flops=op.flops, **_: 2 * flops(*a[2:-1]),
            }
            for name, formula in formulas.items():
                formula._get_raw = True  # formulas of tensors, not of shapes
                found[getattr(torch.ops.mambakit, name)] = formula
    return found


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _shape_of(tensor: Tensor) -> Tensor:
    """Stands for a tensor whose values nobody will read: its shape and type, without its memory."""
    return tensor.new_empty(1).expand(tensor.shape)


def _call_kernel(op: Op, name: str, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Run a kernel backend, through the derivative's glue only when a gradient is wanted."""
    if _wants_gradient(inputs):
        return _Kernel.apply(op, name, *inputs)
    if _is_plain_inference(inputs):
        return tuple(op.backends[name].infer(*inputs))
    return tuple(getattr(torch.ops.mambakit, op.name)(*inputs, False, name))


def _wants_gradient(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs if isinstance(t, Tensor))


def _is_plain_inference(inputs: Sequence[Any]) -> bool:
    """Whether a kernel may be called as it is: no gradient, and nobody listening."""
    return not _is_listened() and not _wants_gradient(inputs)


def _is_listened() -> bool:
    """Whether operators are traced or counted, so that a kernel must be called as one of them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _is_transformed() -> bool:
    """Whether this runs inside `torch.func.grad`, `vmap` and the like, whose tensors have no memory."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class _Kernel(torch.autograd.Function):
    """The derivative of every kernel: call the low-level forward, keep what it saved, call the backward."""

    @staticmethod
    def forward(ctx: Any, op: Op, name: str, *inputs: Any) -> tuple[Tensor, ...]:
        if _is_listened():
            results = getattr(torch.ops.mambakit, op.name)(*inputs, True, name)
        else:
            outputs, saved = op.backends[name].forward(*inputs)
            results = [*outputs, *saved]
        module = op.backends[name]
        spent = [op.arguments.index(key) for key in getattr(module, "spent", ())]
        tensors = [_shape_of(t) if i in spent else t for i, t in enumerate(inputs) if isinstance(t, Tensor)]
        outputs = [results[i] for i in getattr(module, "kept_outputs", ())]
        ctx.save_for_backward(*tensors, *outputs, *results[op.outputs :])
        ctx.op, ctx.name, ctx.tensor_count = op, name, len(tensors)
        ctx.template = [None if isinstance(t, Tensor) else (t,) for t in inputs]
        ctx.set_materialize_grads(True)
        return tuple(results[: op.outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Asked for once: activation checkpointing recomputes them for one asking.
        op, kept = ctx.op, ctx.saved_tensors
        tensors, saved = kept[: ctx.tensor_count], list(kept[ctx.tensor_count :])
        waiting = iter(tensors)
        inputs = [next(waiting) if slot is None else slot[0] for slot in ctx.template]
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated again
            if hasattr(module := op.backends[ctx.name], "rebuilt"):
                inputs = module.rebuilt(saved, *inputs)
                tensors = [t for t in inputs if isinstance(t, Tensor)]
            found = _differentiable_gradients(op, inputs, tensors, grads)
        else:
            grads = [g.contiguous() for g in grads]
            if _is_listened():
                found = getattr(torch.ops.mambakit, f"{op.name}_backward")(saved, grads, *inputs, ctx.name)
            else:
                found = op.backends[ctx.name].backward(saved, grads, *inputs)
        # An empty gradient stands for none, except of an input that is itself empty.
        gradients = iter(
            None if g is None or g.shape != t.shape else g for g, t in zip(found, tensors, strict=True)
        )
        return (None, None, *(next(gradients) if slot is None else None for slot in ctx.template))


def _differentiable_gradients(
    op: Op, inputs: Sequence[Any], tensors: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients with a graph of their own, through the operator's preferred plain backend."""
    name = next(key for key in op.backends if key not in op.kernels)
    outputs = op._run(name, inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in tensors if t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in tensors]
