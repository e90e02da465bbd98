"""How a backend is chosen, and the glue for kernels, held by an operator and a kernel of this file's own."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import Tensor

from mambakit import ops
from mambakit.ops import dispatch
from mambakit.ops.dispatch import Op, registry


def leaky_sum(
    x: Tensor, rate: Tensor, initial_state: Tensor | None = None, double: bool = False
) -> tuple[Tensor, Tensor]:
    """`h_t = rate h_{t-1} + x_t` over `(b, l)`, and twice that on request."""
    state = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    states = []
    for t in range(x.shape[1]):
        state = rate * state + x[:, t]
        states.append(state)
    h = torch.stack(states, 1)
    return (2 * h if double else h), state


class Kernel(types.ModuleType):
    """A kernel in the protocol of `dispatch`, computing with numpy where autograd cannot follow."""

    device = "cpu"
    calls = 0

    def unsupported(self, x, rate, initial_state, double):
        return None if x.dtype == torch.float64 else f"takes float64, not {x.dtype}"

    def infer(self, x, rate, initial_state, double, in_place=False):
        y, final = self.forward(x, rate, initial_state, double)[0]
        return [y, initial_state.copy_(final) if in_place else final]

    def forward(self, x, rate, initial_state, double):
        Kernel.calls += 1
        h, r = x.numpy().copy(), rate.item()
        before = 0.0 if initial_state is None else initial_state.numpy()
        for t in range(h.shape[1]):
            before = h[:, t] = r * before + h[:, t]
        h = torch.from_numpy(h)
        return [h * (2 if double else 1), h[:, -1].clone()], [h]

    def saved_like(self, x, rate, initial_state, double):
        return [torch.empty_like(x)]

    def backward(self, saved, grads, x, rate, initial_state, double):
        (h,), (grad_y, grad_final) = saved, grads
        total = grad_y.numpy() * (2 if double else 1)
        total[:, -1] += grad_final.numpy()
        for t in range(total.shape[1] - 2, -1, -1):
            total[:, t] += rate.item() * total[:, t + 1]
        total = torch.from_numpy(total)
        start = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
        before = torch.cat([start[:, None], h[:, :-1]], 1)
        grad_start = None if initial_state is None else rate * total[:, 0]
        return [total, (total * before).sum().reshape(rate.shape), grad_start]


@pytest.fixture(scope="module")
def op():
    """The operator, registered once for this module (torch.library knows no second time)."""
    plain = types.ModuleType("plain")
    plain.leaky_sum = leaky_sum
    made = Op(
        "leaky_sum",
        {"kernel": Kernel("kernel"), "reference": plain},
        outputs=2,
        fake=lambda x, rate, initial_state, double: [torch.empty_like(x), torch.empty_like(x[:, 0])],
        flops=lambda x, *_: 2 * x.numel(),
    )
    yield made
    del registry["leaky_sum"]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    x, start = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    rate = torch.tensor(0.7, dtype=torch.float64)
    return [x.requires_grad_(), rate.requires_grad_(), start.requires_grad_(), True]


@pytest.mark.parametrize("start", [True, False])
def test_kernel_gradients_are_the_references(op, inputs, start):
    inputs[2] = inputs[2] if start else None
    wanted = [t for t in inputs if isinstance(t, Tensor)]
    results = []
    for name in ("kernel", "reference"):
        y, final = op(*inputs, backend=name)
        results.append((y, final, *torch.autograd.grad((y.sin().sum() + final.cos().sum()), wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_a_kernels_gradients_come_from_the_plain_backend(op, inputs):
    results = []
    for name in ("kernel", "reference"):
        y, final = op(*inputs, backend=name)
        first = torch.autograd.grad(y.sin().sum() + final.cos().sum(), inputs[:3], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:3]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_kernel_runs_without_a_graph_when_no_gradient_is_wanted(op, inputs):
    with torch.no_grad():
        y, _ = op(*inputs)
    assert y.grad_fn is None
    assert op(*inputs)[0].grad_fn is not None


def test_kernel_traces_and_passes_opcheck(op, inputs):
    before = Kernel.calls
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    y, final = compiled(*inputs)
    assert Kernel.calls > before
    for a, b in zip((y, final), op(*inputs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), inputs[0])[0], torch.autograd.grad(op(*inputs)[0].sum(), inputs[0])[0]
    )
    plain = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mambakit.leaky_sum.default, (*plain, True, "kernel"), test_utils=tests)


def test_flops_are_counted(op, inputs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=ops.flop_formulas()) as counter:
        op(*inputs)[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 21


def test_automatic_choice_falls_back_and_says_so_once(op, inputs):
    narrow = [t.detach().float() if isinstance(t, Tensor) else t for t in inputs]
    dispatch._said.clear()
    with pytest.warns(UserWarning, match="leaky_sum: not using the kernel kernels: takes float64"):
        assert op(*narrow)[0].dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(*narrow)


def test_named_backend_that_cannot_raises_with_its_reason(op, inputs):
    narrow = [t.detach().float() if isinstance(t, Tensor) else t for t in inputs]
    with pytest.raises(ValueError, match="backend 'kernel' cannot take these inputs: takes float64"):
        op(*narrow, backend="kernel")
    with pytest.raises(ValueError, match="unknown backend 'referense'; did you mean 'reference'"):
        op(*inputs, backend="referense")


def test_context_forces_where_it_can(op, inputs):
    before = Kernel.calls
    with ops.backend("reference"):
        op(*inputs)
    with ops.backend(leaky_sum="reference"):
        op(*inputs)
    assert Kernel.calls == before
    with ops.backend("kernel"):
        op(*inputs)
        ops.linear_scan(torch.rand(1, 4, 2), torch.rand(1, 4, 2))  # has no such backend, chooses as usual
    assert Kernel.calls == before + 1
    op(*inputs)
    assert Kernel.calls == before + 2


@pytest.mark.parametrize(
    ("name", "per_op", "message"),
    [
        ("chunkd", {}, "unknown backend 'chunkd'; did you mean 'chunked'"),
        (None, {"sdd": "chunked"}, "unknown operator 'sdd'; did you mean 'ssd'"),
        (None, {"ssd": "tritn"}, "ssd: unknown backend 'tritn'"),
    ],
)
def test_context_refuses_unknown_names(name, per_op, message):
    with pytest.raises(ValueError, match=message), ops.backend(name, **per_op):
        pass


def test_state_is_overwritten_in_place(op, inputs):
    with torch.no_grad():
        state = inputs[2].detach().clone()
        _, final = op(inputs[0], inputs[1], None, True, state=state)
        assert final is state
        torch.testing.assert_close(state, op(*inputs)[1])
    with pytest.raises(ValueError, match="either initial_state or state"):
        op(*inputs, state=state)


def test_explain_names_every_backend_and_its_reason(op, inputs):
    narrow = [t.detach().float() if isinstance(t, Tensor) else t for t in inputs]
    table = ops.explain("leaky_sum", *narrow)
    assert "kernel     cannot: takes float64" in table
    assert "reference  used" in table
    with pytest.raises(ValueError, match="did you mean 'ssd'"):
        ops.explain("sssd")


def test_autocast_does_not_round_inside(op):
    x, rate = torch.randn(2, 9), torch.tensor(0.9)
    seen = {}
    plain = registry["leaky_sum"].backends["reference"]
    original = plain.leaky_sum

    def spy(*arguments):
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        return original(*arguments)

    plain.leaky_sum = spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            op(x, rate, None, False, backend="reference")
    finally:
        plain.leaky_sum = original
    assert seen == {"autocast": False}
