"""Every operator x backend x case against the float64 reference, and the laws that any backend must obey."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools

import pytest
import torch

from mambakit import ops
from mambakit.ops.dispatch import registry
from mambakit.testing.emulation import NO_INTERPRETER
from mambakit.testing.samples import CASES, Case, Draw

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TRITON = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@dataclasses.dataclass(frozen=True)
class Run:
    """A case, the backend that runs it, and where."""

    case: Case
    backend: str
    device: str

    @property
    def module(self):
        return registry[self.case.op].backends[self.backend]

    @property
    def is_kernel(self):
        return self.backend in registry[self.case.op].kernels

    @property
    def is_interpreted(self):
        """Whether it is a GPU's kernel on a CPU."""
        return self.is_kernel and self.module.device != self.device

    @property
    def exact_dtype(self):
        """The widest type that the backend computes in."""
        return self.module.dtypes[0] if self.is_kernel else torch.float64

    @property
    def close(self):
        """How close two ways to compute the same must come in that type."""
        return {"rtol": 1e-10, "atol": 1e-10} if not self.is_kernel else {"rtol": 5e-4, "atol": 1e-4}

    def __str__(self):
        return f"{self.case}-{self.backend}-{self.device}"


def _runs():
    """Every case on every backend: on a CPU (GPU kernels interpreted there), and on a GPU."""
    for case in CASES:
        for name, module in registry[case.op].backends.items():
            yield Run(case, name, "cpu")
            if getattr(module, "device", "cuda") == "cuda":
                yield Run(case, name, "cuda")


def marked(runs, *more):
    """Parameters for pytest; those of a GPU carry its mark, those of Triton are skipped without it."""
    return [
        pytest.param(
            *values,
            marks=[
                *([pytest.mark.gpu] if run.device == "cuda" else []),
                *([TRITON] if run.backend == "triton" else []),
            ],
            id="-".join(str(v).removeprefix("torch.") for v in values),
        )
        for run in runs
        for values in itertools.product([run], *more)
    ]


@contextlib.contextmanager
def poisoned(where):
    """NaN in every tensor a kernel allocates, so that what it forgets to write is seen."""
    torch.use_deterministic_algorithms(where.is_kernel, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


RUNS = list(_runs())
CHECKED = [run for run in RUNS if run.backend != "reference"]
CARRYING = [run for run in RUNS if run.case.build(Draw(torch.float64)).get("initial_state") is not None]
PACKED = [run for run in RUNS if "packed" in run.case.name]
TRACED = [run for run in CHECKED if run.case.name in ("plain", "packed") and run.device == "cpu"]


def run(case, inputs, backend, **extra):
    """Outputs of an operator as a tuple of tensors."""
    outputs = getattr(ops, case.op)(**inputs, **extra, backend=backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def each(function, *values):
    """Apply a function to tensors, or to the parts of states that are tuples of tensors; others pass."""
    if isinstance(values[0], tuple) and hasattr(values[0], "_fields"):
        return type(values[0])(*(each(function, *parts) for parts in zip(*values, strict=True)))
    return function(*values) if isinstance(values[0], torch.Tensor) else values[0]


def parts(values):
    """Name -> tensor; the parts of a state by dotted names."""
    found = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif hasattr(value, "_fields"):
            found |= {f"{name}.{field}": part for field, part in parts(value._asdict()).items()}
    return found


def leaves(inputs):
    return {name: tensor for name, tensor in parts(inputs).items() if tensor.requires_grad}


def named(outputs):
    """The numbers among an operator's outputs, by name."""
    found = parts({f"output{i}": output for i, output in enumerate(outputs)})
    return {k: v for k, v in found.items() if v.is_floating_point() or v.is_complex()}


def values_and_gradients(case, inputs, backend):
    """Outputs and the gradient of every input under a fixed random weighting of the outputs."""
    outputs = named(run(case, inputs, backend))
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype))
        .sum()
        .to(torch.complex128)
        .real
        for o in outputs.values()
    )
    wanted = leaves(inputs)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return {**{name: o.detach() for name, o in outputs.items()}, **found}


def widened(inputs):
    """The same values in float64 (complex128)."""

    def widen(value):
        if not (value.is_floating_point() or value.is_complex()):
            return value
        wide = torch.complex128 if value.is_complex() else torch.float64
        return value.detach().to(wide).requires_grad_(value.requires_grad)

    return {name: each(widen, value) for name, value in inputs.items()}


def error(found, exact):
    exact = exact.to(torch.complex128)
    return ((found.to(torch.complex128) - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        p
        for p in marked(CHECKED, DTYPES)
        if not p.values[0].is_kernel or p.values[1] in p.values[0].module.dtypes
    ],
)
def test_values_and_gradients(where, dtype):
    """Error at most twice the reference's own in the same type, plus the type's rounding."""
    case, backend, device = where.case, where.backend, where.device
    inputs = case.build(Draw(dtype, device))
    exact = values_and_gradients(case, widened(inputs), "reference")
    reference = values_and_gradients(case, inputs, "reference")
    with poisoned(where):
        found = values_and_gradients(case, inputs, backend)
    assert found.keys() == reference.keys()
    for name, value in found.items():
        assert value.dtype == reference[name].dtype, name
        assert value.shape == reference[name].shape, name
        bound = 2 * error(reference[name], exact[name]) + FLOOR[dtype]
        assert error(value, exact[name]) <= bound, (name, error(value, exact[name]), bound)


@pytest.mark.parametrize("where", marked(CARRYING))
def test_halves_with_carried_state_are_the_whole(where):
    case, backend = where.case, where.backend
    inputs = case.build(Draw(where.exact_dtype, where.device))
    length = inputs[case.sequence[0]].shape[1]
    whole = run(case, inputs, backend)
    for cut in {length // 2, length - 1} - {0}:
        first, second = (
            {**inputs, **{k: part(inputs[k]) for k in case.sequence if inputs.get(k) is not None}}
            for part in (lambda t, cut=cut: t[:, :cut], lambda t, cut=cut: t[:, cut:])
        )
        y1, middle = run(case, first, backend)
        if inputs.get("seq_idx") is not None:
            same = inputs["seq_idx"][:, cut - 1] == inputs["seq_idx"][:, cut]
            middle = each(lambda m, same=same: torch.where(same.view(-1, *[1] * (m.dim() - 1)), m, 0), middle)
        y2, final = run(case, {**second, "initial_state": middle}, backend)
        torch.testing.assert_close(torch.cat([y1, y2], 1), whole[0], **where.close)
        each(lambda a, b: torch.testing.assert_close(a, b, **where.close), final, whole[1])


@pytest.mark.parametrize("where", marked(CARRYING))
def test_token_by_token_in_place_is_the_scan(where):
    case, backend = where.case, where.backend
    inputs = case.build(Draw(where.exact_dtype, where.device))
    inputs = {**inputs, "seq_idx": None}
    if where.is_interpreted:  # a launch per token takes its time there
        inputs = {**inputs, **{k: inputs[k][:, :12] for k in case.sequence if inputs.get(k) is not None}}
    with torch.no_grad():
        whole, final = run(case, inputs, backend)
        state = each(lambda s: s.detach().clone(), inputs.pop("initial_state"))
        addresses, outputs = [s.data_ptr() for s in parts({"": state}).values()], []
        for t in range(whole.shape[1]):
            token = {k: inputs[k][:, t : t + 1] for k in case.sequence if inputs.get(k) is not None}
            y, returned = run(case, {**inputs, **token}, backend, state=state)
            assert [s.data_ptr() for s in parts({"": returned}).values()] == addresses
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **where.close)
    each(lambda a, b: torch.testing.assert_close(a, b, **where.close), state, final)


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        p
        for p in marked(PACKED, (torch.float64, torch.float32))
        if not p.values[0].is_kernel or p.values[1] in p.values[0].module.dtypes
    ],
)
def test_packed_documents_are_separate(where, dtype):
    """A document's outputs are those of the document alone, and no other document moves them by one bit."""
    case, backend = where.case, where.backend
    inputs = case.build(Draw(dtype, where.device))
    seq_idx = inputs["seq_idx"]
    with torch.no_grad():
        packed = run(case, inputs, backend)[0]
        documents = seq_idx[0].unique().tolist()
        assert len(documents) > 2
        for document in documents[1:]:
            where = (seq_idx[0] == document).nonzero().flatten()
            start, stop = where[0].item(), where[-1].item() + 1
            alone = {k: inputs[k][:1, start:stop] for k in case.sequence if inputs.get(k) is not None}
            rest = {k: v[:1] if k in ("initial_state",) and v is not None else v for k, v in inputs.items()}
            rest = {**rest, **alone, "initial_state": None, "seq_idx": None}
            rest = {k: v for k, v in rest.items() if k in inputs}
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(
                run(case, rest, backend)[0], packed[:1, start:stop], rtol=tolerance, atol=tolerance
            )
        # Change everything before the second document of row 0, the initial state included.
        border = (seq_idx[0] == documents[1]).nonzero()[0].item()
        changed = dict(inputs)
        for name in case.sequence:
            if name != "seq_idx" and inputs.get(name) is not None:
                changed[name] = inputs[name].detach().clone()
                changed[name][0, :border] = 3 * changed[name][0, :border] + 1
        changed |= {k: each(lambda s: s * 2 + 1, v) for k, v in inputs.items() if k == "initial_state"}
        moved = run(case, changed, backend)[0]
    assert not torch.equal(moved[0, :border], packed[0, :border])
    assert torch.equal(moved[0, border:], packed[0, border:])


@pytest.mark.parametrize("where", marked(CHECKED))
def test_memory_layout_does_not_matter(where):
    case, backend = where.case, where.backend
    inputs = case.build(Draw(torch.float32, where.device))

    def stride(tensor):
        return tensor.detach().repeat_interleave(2, dim=-1)[..., ::2] if tensor.dim() > 1 else tensor

    strided = {name: each(stride, value) for name, value in inputs.items()}
    with torch.no_grad():
        found, expected = named(run(case, strided, backend)), named(run(case, inputs, backend))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("where", marked(TRACED))
def test_traces_without_graph_breaks(where):
    case, backend = where.case, where.backend
    torch._dynamo.reset()  # otherwise the cases before this one make its shapes symbolic
    inputs = case.build(Draw(torch.float32))
    compiled = torch.compile(lambda **kw: run(case, kw, backend), fullgraph=True, backend="aot_eager")
    found, expected = named(compiled(**inputs)), named(run(case, inputs, backend))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def _small(case):
    inputs = case.build(Draw(torch.float64))
    return {
        k: each(lambda t, k=k: t[:1, :5] if k in case.sequence else t[:1] if k == "initial_state" else t, v)
        for k, v in inputs.items()
    }


@pytest.mark.parametrize("where", marked(run for run in TRACED if not run.is_kernel))
def test_twice_differentiable(where):
    case, backend = where.case, where.backend
    inputs = _small(case)
    wanted = list(leaves(inputs).values())

    def function(*tensors):
        given = {id(old): new for old, new in zip(wanted, tensors, strict=True)}
        replaced = {k: each(lambda t: given.get(id(t), t), v) for k, v in inputs.items()}
        return tuple(named(run(case, replaced, backend)).values())

    leaf = tuple(tensor.detach().requires_grad_() for tensor in wanted)
    assert torch.autograd.gradgradcheck(function, leaf, nondet_tol=1e-12)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_public_function_takes_the_references_arguments(op):
    public = set(inspect.signature(getattr(ops, op)).parameters)
    assert {"backend"} <= public
    assert "reference" in registry[op].backends


def test_every_operator_has_cases():
    assert {case.op for case in CASES} == set(registry)
