"""Normalisation: against PyTorch's and against its own formula, its gates, groups, types and derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from mambakit.ops.norm import norm

BACKENDS = ["chunked", "reference"]
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def draw(*shape, dtype=torch.float64, seed=0):
    """Activations, weight, bias and gate."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape, shape[-1:], shape[-1:], shape)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype).requires_grad_() for t in made]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_norms_are_pytorchs(backend):
    x, weight, bias, _ = draw(3, 4, 6)
    torch.testing.assert_close(
        norm(x, weight, eps=1e-3, backend=backend), F.rms_norm(x, (6,), weight, 1e-3), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        norm(x, weight, bias, kind="layer", eps=1e-3, backend=backend),
        F.layer_norm(x, (6,), weight, bias, 1e-3),
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gate_before_after_and_groups(kind, backend):
    x, weight, bias, z = draw(2, 3, 8)
    gate = z * torch.sigmoid(z)
    before = norm(x, weight, bias, kind=kind, z=z, backend=backend)
    torch.testing.assert_close(before, norm(x * gate, weight, bias, kind=kind, backend=backend))
    after = norm(x, weight, bias, kind=kind, z=z, norm_before_gate=True, backend=backend)
    torch.testing.assert_close(after, norm(x, weight, bias, kind=kind, backend=backend) * gate)
    assert not torch.allclose(before, after)
    grouped = norm(x, weight, bias, kind=kind, group_size=2, backend=backend)
    pieces = [
        norm(*parts, kind=kind, backend=backend)
        for parts in zip(x.split(2, -1), weight.split(2), bias.split(2), strict=True)
    ]
    torch.testing.assert_close(grouped, torch.cat(pieces, -1))


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_chunked_is_the_reference(kind, dtype):
    for group_size, late, *used in itertools.product((None, 4), (False, True), (0, 1), (0, 1), (0, 1)):
        drawn = draw(2, 5, 8, dtype=dtype)
        exact_drawn = [t.detach().double().requires_grad_() for t in drawn]
        options = {"kind": kind, "group_size": group_size, "norm_before_gate": late}

        def results(tensors, backend, used=used, options=options):
            x, *rest = tensors
            weight, bias, z = (t if wanted else None for t, wanted in zip(rest, used, strict=True))
            y = norm(x, weight, bias, z=z, **options, backend=backend)
            wanted = [t for t in (x, weight, bias, z) if t is not None]
            return [y, *torch.autograd.grad(y.double().pow(3).sum(), wanted)]

        exact = results(exact_drawn, "reference")
        reference = results(drawn, "reference")
        for found, near, true in zip(results(drawn, "chunked"), reference, exact, strict=True):
            assert found.dtype == near.dtype and found.shape == near.shape
            bound = 2 * (near.double() - true).norm() + FLOOR[dtype] * true.norm()
            assert (found.double() - true).norm() <= bound, (options, used)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_once_at_the_end(backend):
    x, weight = torch.randn(64, 16).bfloat16(), torch.rand(16) + 0.5
    exact = norm(x.double(), weight.double(), backend="reference").bfloat16()
    y = norm(x, weight, backend=backend)
    assert y.dtype == torch.bfloat16
    # A weight applied after rounding would change at least a quarter of the values by a last bit.
    assert (y != exact).float().mean() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_and_zero_inputs(backend):
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = norm(x, eps=1e-4, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(x))
    torch.testing.assert_close(grad, torch.full_like(x, 100.0))  # 1 / sqrt(eps)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group_size", [None, 2])
def test_derivatives(kind, group_size):
    inputs = draw(2, 3, 4)

    def function(x, weight, bias, z):
        return norm(x, weight, bias, kind=kind, z=z, group_size=group_size, backend="chunked")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 1, 5, 8)])
def test_any_number_of_axes_and_layout(shape):
    x, weight, *_ = (t.detach() for t in draw(*shape))
    y = norm(x, weight, backend="reference")
    assert y.shape == x.shape
    strided = x.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(norm(strided, weight, backend="chunked"), y)
    swapped = x.movedim(0, -1).contiguous().movedim(-1, 0)
    torch.testing.assert_close(norm(swapped, weight, backend="chunked"), y)


def test_gradient_of_each_sample():
    x, weight = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def loss(weight, sample):
        return norm(sample, weight, backend="chunked").pow(3).sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(weight, sample) for sample in x]))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_traces_whole(kind):
    inputs = [t.detach().float().requires_grad_() for t in draw(2, 3, 8)]

    def function(x, weight, bias, z):
        return norm(x, weight, bias, kind=kind, z=z, group_size=4)

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    expected = function(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.pow(3).sum(), inputs) for y in (found, expected))
    for traced, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)


def test_errors_name_what_is_wrong():
    x, weight, _, z = (t.detach() for t in draw(2, 8))
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"z has shape \(1, 8\), expected \(2, 8\)"):
        norm(x, z=z[:1])
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        norm(x, kind="layr")
    with pytest.raises(ValueError, match="8 channels do not split evenly into groups of 3"):
        norm(x, group_size=3)
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        norm(torch.tensor(1.0))
