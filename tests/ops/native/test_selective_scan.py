"""What the C++ selective scan does beyond the cases of the conformance suite: time cut for many threads."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from mambakit import ops
from mambakit.ops import native
from mambakit.testing.samples import Draw

pytestmark = pytest.mark.skipif(native.load().library is None, reason=str(native.load().reason))


def inputs(dtype=torch.float32, b=1, l=2600, d=3, n=9, g=1, slow=False, packed=False):
    """One strip of channels at any instruction level; 2,600 tokens are cut into chunks that fill no tile."""
    draw = Draw(dtype)
    rates = {"low": -0.02, "high": -0.001} if slow else {"low": -4.0, "high": -0.1}
    return {
        "x": draw.normal(b, l, d),
        "dt": draw.normal(b, l, d),
        "A": draw.wide(draw.uniform(d, n, **rates)),
        "B": draw.normal(b, l, g, n),
        "C": draw.normal(b, l, g, n),
        "D": draw.wide(draw.normal(d)),
        "z": draw.normal(b, l, d),
        "dt_bias": draw.wide(draw.normal(d)),
        "initial_state": draw.wide(draw.normal(b, d, n)),
        "dt_softplus": True,
        "seq_idx": draw.documents(b, l, border=0.0008) if packed else None,
    }


def everything(given, backend="cpu"):
    """Outputs, final state and all gradients."""
    y, final = ops.selective_scan(**given, backend=backend)
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, final, *torch.autograd.grad((y * weights).sum() + final.sum(), leaves)


@contextlib.contextmanager
def threads(count):
    """So many threads for PyTorch and the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def double(given):
    """The same values in float64."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in given.items()
    }


@pytest.mark.parametrize("kind", ["forgetting", "remembering", "packed"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_sequence_cut_for_many_threads_is_the_whole(kind, rows):
    """Cut or not, the error is that of one pass: no more than twice as far from float64."""
    given = inputs(b=rows, slow=kind != "forgetting", packed=kind == "packed")
    if kind == "packed":
        assert 0 < given["seq_idx"].max() < 10, "some chunks hold a border, some none"
    exact = everything(double(given), "chunked")
    with threads(1):
        whole = everything(given)
    with threads(9):
        cut = everything(given)
    if kind == "remembering":  # elsewhere the bits may agree
        assert not torch.equal(cut[0], whole[0]), "it was cut"
    for a, b, want in zip(cut, whole, exact, strict=True):
        size = want.abs().max()
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + 1e-6 * size


def test_a_cut_sequence_overwrites_its_state():
    given = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
    with threads(9):
        y, final = ops.selective_scan(**given, backend="cpu")
        state = given.pop("initial_state").clone()
        again, returned = ops.selective_scan(**given, state=state, backend="cpu")
    assert returned is state
    assert torch.equal(again, y)
    assert torch.equal(state, final)


def test_a_cut_changes_no_other_document():
    """Bit for bit, though a chunk's border lies inside the document that is compared."""
    given = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
    given["seq_idx"] = (torch.arange(2600) >= 300)[None].int()
    with threads(9):
        y, final = ops.selective_scan(**given, backend="cpu")
        given["x"][:, :300] = torch.inf
        moved, moved_final = ops.selective_scan(**given, backend="cpu")
    assert torch.equal(moved[:, 300:], y[:, 300:])
    assert torch.equal(moved_final, final)


@pytest.mark.parametrize("n", [256, 300])
def test_many_states(n):
    given = inputs(l=70, d=19, n=n)
    for a, want in zip(everything(given), everything(double(given), "reference"), strict=True):
        assert (a - want).abs().max() <= 5e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_does_not_matter(dtype):
    """Libraries set it while they load a model."""
    given = inputs(l=70)
    want = everything(given)
    torch.set_default_dtype(dtype)
    try:
        found = everything(given)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found[:2], want[:2], strict=True):
        assert torch.equal(a, b)


def _in_a_worker(given):
    """The outputs, and how many threads the process has."""
    y, _ = ops.selective_scan(**given, backend="cpu")
    return y, len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_a_data_loaders_worker_starts_no_threads():
    given = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs(b=4).items()}
    with threads(2):
        want, _ = ops.selective_scan(**given, backend="cpu")
        loader = torch.utils.data.DataLoader([given], batch_size=None, num_workers=1, collate_fn=_in_a_worker)
        ((y, count),) = loader
    assert count <= 2, "the worker's own, and the one that hands its results over"
    torch.testing.assert_close(y, want)
