"""What the GPU kernels of the selective scan do beyond the cases of the conformance suite."""

from __future__ import annotations

import pytest
import torch

from mambakit import ops
from mambakit.testing.samples import Draw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(device, b=1, l=300, d=136, n=16, g=1):
    draw = Draw(torch.float32, device)
    return {
        "x": draw.normal(b, l, d),
        "dt": draw.normal(b, l, d),
        "A": draw.uniform(d, n, low=-4.0, high=-0.1),
        "B": draw.normal(b, l, g, n),
        "C": draw.normal(b, l, g, n),
        "D": draw.normal(d),
        "z": draw.normal(b, l, d),
        "dt_bias": draw.normal(d),
        "initial_state": draw.normal(b, d, n),
        "dt_softplus": True,
    }


def everything(given):
    """Outputs, final state and all gradients."""
    y, final = ops.selective_scan(**given, backend="cuda")
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor)]
    return y, final, *torch.autograd.grad((y * y.detach().sign()).sum() + final.sum(), leaves)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_in_a_fixed_order_are_those_in_any(device, request):
    given = inputs(device, l=40, d=264)  # three blocks of channels add to each gradient of B and C
    anyhow = everything(given)
    request.getfixturevalue("deterministic")
    fixed = everything(given)
    for a, b in zip(anyhow, fixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(fixed, everything(given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_one_projection_are_taken_as_they_are(device):
    given = inputs(device, b=2, l=33, d=64)
    joined = torch.cat([given["x"], given["z"], given["dt"]], dim=-1).detach()
    parts = dict(zip(("x", "z", "dt"), joined.split(64, dim=-1), strict=True))
    assert not parts["z"].is_contiguous()
    with torch.no_grad():
        a, b = (ops.selective_scan(**{**given, **more}, backend="cuda")[0] for more in ({}, parts))
    assert torch.equal(a, b)


def test_activations_of_several_types_meet_in_the_widest():
    given = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs("cpu", l=20, d=9).items()}
    given["B"] = given["B"].bfloat16()
    y, _ = ops.selective_scan(**given, backend="cuda")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, ops.selective_scan(**given, backend="reference")[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.float64}, "takes float32, bfloat16 and float16, not torch.float64"),
        ({"A": 300}, "takes up to 256 states, not 300"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, reason):
    given = inputs("cpu", l=4, d=3)
    if "x" in change:
        given["x"] = given["x"].double()
    else:
        given = inputs("cpu", l=4, d=3, n=change["A"])
    with pytest.raises(ValueError, match=reason):
        ops.selective_scan(**given, backend="cuda")
