"""What conformance cases are too short for: angles over long sequences; and what is refused."""

from __future__ import annotations

import pytest
import torch

from mambakit import ops
from mambakit.ops import native
from mambakit.ops.dispatch import registry
from mambakit.testing.emulation import NO_INTERPRETER

built = pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))


def draw(b=1, l=20_000, h=2, p=3, r=1, g=1, n=6, s=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"x": (b, l, h, p), "dt": (b, l, h), "A": (b, l, h), "B": (b, l, r, g, n), "C": (b, l, r, g, n)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs |= {"dt": inputs["dt"].abs() + 0.1, "A": -0.01 * inputs["A"].abs()}
    inputs |= {"trap": torch.randn(b, l, h), "angles": torch.randn(b, l, s)}
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def test_angles_keep_their_digits_over_long_sequences():
    """A head that turns by up to pi per step and hardly forgets, 20,000 tokens on, in float32."""
    inputs = draw(dtype=torch.float32)
    inputs["angles"] += 3  # nearly all turns have one sign: unreduced, the sum would be some 50,000 rad
    y, state = ops.trapezoidal(**inputs)
    exact, right = ops.trapezoidal(**{name: tensor.double() for name, tensor in inputs.items()})
    turned = (state.angle - right.angle) / (2 * torch.pi)
    assert ((turned - turned.round()) * 2 * torch.pi).abs().max() < 1e-6
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_the_shapes_for_tracing_are_the_real_ones():
    inputs = draw(b=2, l=5, r=3)
    op = registry["trapezoidal"]
    for backend in op.backends:
        y, state = ops.trapezoidal(**inputs, backend=backend)
        for real, traced in zip((y, *state), op.fake(*inputs.values()), strict=True):
            assert (real.shape, real.dtype) == (traced.shape, traced.dtype)


@pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)
@pytest.mark.parametrize("r", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_kernels_of_a_gpu_give_values_and_gradients(r):
    """`ssd`'s Triton kernels under this operator; the conformance tests run those of the CPU."""
    inputs = {k: t.requires_grad_() for k, t in draw(b=1, l=70, r=r, dtype=torch.float32).items()}
    exact = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    with ops.backend(ssd="triton"):
        y, state = ops.trapezoidal(**inputs)
        found = torch.autograd.grad(y.square().sum() + state.ssm.sum(), list(inputs.values()))
    y_exact, right = ops.trapezoidal(**exact, backend="reference")
    wanted = torch.autograd.grad(y_exact.square().sum() + right.ssm.sum(), list(exact.values()))
    for one, other in zip((y, state.ssm, *found), (y_exact, right.ssm, *wanted), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_documents_are_isolated_from_what_is_not_finite():
    """No bit of a document moves with the one before it, even where that is not a number."""
    inputs = draw(l=90, dtype=torch.float32)
    seq_idx = (torch.arange(90) >= 33).int()[None]
    y, state = ops.trapezoidal(**inputs, seq_idx=seq_idx)
    moved = {k: t.clone() for k, t in inputs.items()}
    for name in ("x", "B", "C"):
        moved[name][:, :33] = torch.nan
    y2, state2 = ops.trapezoidal(**moved, seq_idx=seq_idx)
    assert not torch.equal(y2[:, :33], y[:, :33])
    assert torch.equal(y2[:, 33:], y[:, 33:])
    for one, other in zip(state, state2, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=built), "chunked"])
def test_the_backend_of_ssd_can_be_chosen_for_it(backend, monkeypatch):
    called = []
    for name in ("cpu", "chunked"):
        module = registry["ssd"].backends[name]
        function = "infer" if name == "cpu" else "ssd"
        real = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, n=name, f=real, **k: (called.append(n), f(*a, **k))[1]
        )
    with torch.no_grad(), ops.backend(backend):
        ops.trapezoidal(**draw(l=5, dtype=torch.float32))
    assert called == [backend]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"h": 3, "g": 2}, {}, "3 heads do not split evenly into 2 groups"),
        ({"s": 4}, {}, "4 angles, expected 1 to 3, the pairs of 6 columns"),
        ({"n": 5}, {"interleaved": False}, "5 columns have no halves to pair"),
        ({}, {"B_bias": torch.zeros(2, 2, 6)}, r"B_bias has shape \(2, 2, 6\), expected \(h=2, r=1, n=6\)"),
        ({}, {"state": "v"}, r"state.v has shape \(1, 2, 4\), expected \(b=1, h=2, p=3\)"),
        ({}, {"state": "", "initial_state": ""}, "give either initial_state or state, not both"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, options, message):
    inputs = draw(l=4, **sizes)
    state = ops.trapezoidal(**draw(l=4))[1]
    wrong = state._replace(v=torch.zeros(1, 2, 4))
    given = {k: {"v": wrong, "": state}[v] if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        ops.trapezoidal(**inputs, **given)
