"""What conformance cases are too small or tame for: extreme decays, long sequences, work cut for threads."""

from __future__ import annotations

import math

import pytest
import torch

from mambakit import ops
from mambakit.ops import native

built = pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))
ABLE = [pytest.param("cpu", marks=built), "chunked"]


@pytest.fixture
def threads():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(b=1, l=300, h=2, p=5, g=1, n=7, dtype=torch.float32, seed=0):
    """Inputs without bias, softplus or limits, so that `dt` and `A` are the decays' own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(b, l, h, p).to(dtype),
        "dt": (0.1 * normal(b, l, h).abs() + 0.01).to(dtype),
        "A": -normal(h).abs().float() - 0.1,
        "B": normal(b, l, g, n).to(dtype),
        "C": normal(b, l, g, n).to(dtype),
        "D": normal(h).float(),
        "initial_state": normal(b, h, p, n).float(),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def replaced(inputs, **values):
    """The same inputs with other values for some."""
    return {**inputs, **{k: v.detach().to(inputs[k].dtype).requires_grad_() for k, v in values.items()}}


def results(inputs, backend, dtype=None, **options):
    """Outputs, final state, and gradients of a fixed random weighting of both, by name."""
    wide = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    y, final = ops.ssd(**wide, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in (y, final)]
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip((y, final), weights, strict=True))
    gradients = torch.autograd.grad(loss, list(wide.values()))
    return {"y": y, "final": final, **{f"d{k}": g for k, g in zip(wide, gradients, strict=True)}}


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check_like(inputs, backend, floor=1e-6):
    """The conformance rule: at most twice the reference's own error in float32, and float32's rounding."""
    exact, reference = (results(inputs, "reference", dtype) for dtype in (torch.float64, torch.float32))
    found = results(inputs, backend)
    for name, value in found.items():
        assert value.isfinite().all(), name
        bound = 2 * error(reference[name], exact[name]) + floor
        assert error(value, exact[name]) <= bound, (name, error(value, exact[name]), bound)


def decays(kind, l):
    """Logarithms of decays by token."""
    t = torch.arange(l)
    return {
        "barely": torch.full((l,), -1e-6),
        "none": torch.zeros(l),
        "single-breaks": torch.where(t % 37 == 5, -100.0, -0.01),
        "breaks-at-tile-borders": torch.where(t % 16 == 0, -100.0, -0.3),
        "breaks-everywhere": torch.full((l,), -100.0),
        "beyond-float32": torch.where(t % 3 == 0, -1000.0, -0.5),
        "just-too-strong-for-a-tile": torch.full((l,), -4.5),
        "one-token-at-the-limit": torch.where(t % 9 == 0, -59.9, -0.2),
        "growing": torch.full((l,), 0.05),
        "growing-and-decaying": torch.where(t % 20 < 10, 3.0, -3.2),
    }[kind]


KINDS = (
    "barely",
    "none",
    "single-breaks",
    "breaks-at-tile-borders",
    "breaks-everywhere",
    "beyond-float32",
    "just-too-strong-for-a-tile",
    "one-token-at-the-limit",
    "growing",
    "growing-and-decaying",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ABLE)
def test_extreme_decays(backend, kind):
    """Decays given by the step sizes (A = -1), which may be negative; every gradient stays right."""
    inputs = draw(l=280)
    dt = -decays(kind, 280)[None, :, None].expand_as(inputs["dt"])
    # A gradient of the decays that is zero to float32's last digit has no relative error to speak of.
    floor = 1e-5 if kind in ("breaks-everywhere", "beyond-float32") else 1e-6
    check_like(replaced(inputs, dt=dt, A=-torch.ones(2)), backend, floor=floor)


@pytest.mark.parametrize("backend", ABLE)
def test_positive_rates(backend):
    inputs = draw(l=60)
    check_like(replaced(inputs, A=torch.tensor([0.9, -0.4])), backend)


@pytest.mark.parametrize("backend", ABLE)
def test_long_sequence(backend):
    """A slow and a fast head over many segments; the sums over time keep their digits."""
    inputs = draw(l=2500, h=2, p=16, n=24)
    dt = inputs["dt"].detach().clone()
    dt[..., 0] *= 1e-3
    check_like(replaced(inputs, dt=dt), backend)


@built
@pytest.mark.slow
def test_very_long_sequence():
    """Against `chunked` in float64, which the reference bounds above: errors grow like a random walk."""
    inputs = draw(l=200_000, h=2, p=16, n=16)
    dt = inputs["dt"].detach().clone()
    dt[..., 0] *= 1e-4
    inputs = replaced(inputs, dt=dt)
    exact, found = results(inputs, "chunked", torch.float64), results(inputs, "cpu")
    for name, value in found.items():
        assert error(value, exact[name]) < 3e-5, (name, error(value, exact[name]))


@pytest.mark.parametrize("sizes", [(64, 1, 1, 16), (8, 8, 33, 9), (6, 3, 100, 1), (3, 1, 1, 200)])
@pytest.mark.parametrize("backend", ABLE)
def test_heads_groups_and_sizes(backend, sizes):
    h, g, p, n = sizes
    check_like(draw(b=2, l=50, h=h, g=g, p=p, n=n), backend)


@built
@pytest.mark.parametrize("empty", ["b", "h", "p", "n"])
def test_empty_dimensions(empty):
    """Nothing to do is done: what does not depend on the empty dimension is as the reference has it."""
    inputs = draw(**{"l": 20, "b": 2, empty: 0})
    exact, found = results(inputs, "reference"), results(inputs, "cpu")
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name])


@pytest.mark.parametrize("backend", ABLE)
def test_type_of_every_input(backend):
    """Mixed types: outputs and gradients have the type of what they belong to."""
    inputs = draw(l=40)
    inputs = {k: v.detach().bfloat16() if k in ("B", "A", "initial_state") else v for k, v in inputs.items()}
    exact = results(inputs, "reference", torch.float64)
    found = results({k: v.requires_grad_() for k, v in inputs.items()}, backend)
    assert found["y"].dtype == found["final"].dtype == torch.float32
    for name, value in found.items():
        if name[1:] in inputs:
            assert value.dtype == inputs[name[1:]].dtype, name
        assert error(value, exact[name]) < 1e-2, name


# How the work is cut depends on the number of threads: a group's heads into parts, which changes nothing, and
# time into chunks, through which states are carried, where there are too few heads.
CUTS = {
    "parts": ({"h": 5, "l": 5000}, 3),
    "chunks": ({"h": 1, "l": 3000}, 5),
    "both": ({"h": 2, "l": 1500}, 5),
}


@built
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_work_is_cut_for_threads(cut, packed, threads):
    sizes, count = CUTS[cut]
    inputs = draw(**sizes, p=24, n=16)
    seq_idx = (torch.arange(sizes["l"]) // 700).expand(1, -1) if packed else None
    threads(1)
    whole = results(inputs, "cpu", seq_idx=seq_idx)
    threads(count)
    cut_up = results(inputs, "cpu", seq_idx=seq_idx)
    again = results(inputs, "cpu", seq_idx=seq_idx)
    for name, value in cut_up.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
        if cut == "parts":
            assert torch.equal(value, whole[name]), f"{name} differs with the number of threads"
        assert error(value, whole[name].double()) < 2e-6, name


@built
@pytest.mark.parametrize("count", [1, 2, 5])
def test_documents_are_isolated_however_time_is_cut(count, threads):
    """No bit of a document moves with the documents before it, even where those are not finite."""
    threads(count)
    inputs = {k: v.detach() for k, v in draw(l=3000, h=1, p=24, n=16).items()}
    seq_idx = (torch.arange(3000) >= 1234).int().expand(1, -1)
    y, final = ops.ssd(**inputs, seq_idx=seq_idx, backend="cpu")
    for value in (3.0, math.inf, math.nan):
        moved = {k: inputs[k].clone() for k in inputs}
        for name in ("x", "B", "C"):
            moved[name][:, :1234] = value
        moved["dt"][:, :1234] *= 2
        moved["initial_state"].fill_(value)
        y2, final2 = ops.ssd(**moved, seq_idx=seq_idx, backend="cpu")
        assert not torch.equal(y2[:, :1234], y[:, :1234])
        assert torch.equal(y2[:, 1234:], y[:, 1234:])
        assert torch.equal(final2, final)


@built
def test_one_token_of_a_large_model(threads):
    """Enough state for several threads; the state is overwritten where it lies."""
    threads(2)
    inputs = {k: v.detach() for k, v in draw(b=2, l=1, h=24, p=64, g=2, n=128).items()}
    exact = ops.ssd(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    state = inputs.pop("initial_state")
    address = state.data_ptr()
    y, final = ops.ssd(**inputs, state=state, backend="cpu")
    assert final.data_ptr() == address
    assert error(y, exact[0]) < 1e-6
    assert error(state, exact[1]) < 1e-6


def test_decays_given_are_those_of_step_sizes_and_rates():
    """Without `A`: the same recurrence with `dt A` and `dt x` made beforehand; step sizes have no say."""
    inputs = {k: v.detach() for k, v in draw(dtype=torch.float64).items()}
    y, final = ops.ssd(**inputs)
    u, steps = inputs["x"] * inputs["dt"].unsqueeze(-1), inputs["dt"] * inputs["A"]
    skip = 0.0 if inputs.get("D") is None else inputs["D"].view(*inputs["D"].shape[:1], -1) * inputs["x"]
    given = {k: v for k, v in inputs.items() if k != "D"} | {"x": u, "dt": steps, "A": None}
    y2, final2 = ops.ssd(**given)
    torch.testing.assert_close(y2 + skip, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final2, final, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="without A, dt is no step size"):
        ops.ssd(**given, dt_softplus=True)
