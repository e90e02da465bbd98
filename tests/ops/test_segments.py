"""A sequence cut over a GPU is the whole: each segment is summarised, and the summaries carry the state."""

from __future__ import annotations

import pytest
import torch

from mambakit import ops
from mambakit.ops import segments
from mambakit.ops.selective_scan import cuda
from mambakit.testing.emulation import NO_INTERPRETER
from mambakit.testing.samples import CASES, Draw

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = {"selective_scan": "cuda", "ssd": "triton"}
TRITON = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)
OPS = ["selective_scan", pytest.param("ssd", marks=TRITON)]
LENGTH, CUT = 300, {"selective_scan": 48, "ssd": 64}


def inputs(op, device, slow=False, packed=False):
    """A row of each operator, long enough to cut."""
    draw = Draw(torch.float32, device)
    rates = {"low": -0.02, "high": -0.001} if slow else {"low": -4.0, "high": -0.1}
    x, heads, rate, state = {
        "selective_scan": ((20,), (20,), (20, 16), (20, 16)),
        "ssd": ((3, 20), (3,), (3,), (3, 20, 16)),
    }[op]
    return {
        "x": draw.normal(1, LENGTH, *x),
        "dt": draw.normal(1, LENGTH, *heads),
        "A": draw.uniform(*rate, **rates),
        "B": draw.normal(1, LENGTH, 1, 16),
        "C": draw.normal(1, LENGTH, 1, 16),
        "D": draw.normal(*heads),
        "dt_bias": draw.normal(*heads),
        "initial_state": draw.normal(1, *state),
        "dt_softplus": True,
        "seq_idx": draw.documents(1, LENGTH, border=0.02) if packed else None,
    }


def everything(op, given):
    """Outputs, final state and all gradients."""
    y, final = getattr(ops, op)(**given, backend=BACKENDS[op])
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    return y, final, *torch.autograd.grad((y * y.detach().sign()).sum() + final.sum(), leaves)


def cut(monkeypatch, op, whole=False):
    """Cut every sequence at fixed places, or not at all."""
    size = LENGTH if whole else CUT[op]
    monkeypatch.setattr(segments, "division", lambda length, *_, **__: (size, -(-length // size)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["forgetting", "remembering", "packed"])
@pytest.mark.parametrize("op", OPS)
def test_a_split_sequence_is_the_whole(op, kind, device, monkeypatch):
    given = inputs(op, device, slow=kind == "remembering", packed=kind == "packed")
    cut(monkeypatch, op, whole=True)
    whole = everything(op, given)
    cut(monkeypatch, op)
    for a, b in zip(everything(op, given), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_a_split_sequence_overwrites_its_state(op, device, monkeypatch):
    given = inputs(op, device)
    cut(monkeypatch, op)
    with torch.no_grad():
        y, final = getattr(ops, op)(**given, backend=BACKENDS[op])
        state = given.pop("initial_state").detach().clone()
        again, returned = getattr(ops, op)(**given, state=state, backend=BACKENDS[op])
    assert returned is state
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(state, final)


def test_long_sequences_are_cut_by_themselves():
    case = next(c for c in CASES if str(c) == "selective_scan-long-slow")
    length = case.build(Draw(torch.float32))["x"].shape[1]
    assert segments.division(length, 8, blocks=1, processors=3, most=4)[1] > 1


def test_a_sequence_is_cut_where_rows_and_channels_fill_no_gpu():
    gpu = {"processors": 132, "most": 4}
    assert segments.division(2048, 16, blocks=512, **gpu) == (2048, 1)
    assert segments.division(65536, 16, blocks=24, **gpu) == (2992, 22)  # one full round
    assert segments.division(500, 16, blocks=1, **gpu) == (512, 1)  # too short to cut
    segment, count = segments.division(10_000, 64, blocks=3, processors=25, most=4)
    assert segment % 64 == 0
    assert (count - 1) * segment < 10_000 <= count * segment


@pytest.mark.parametrize(
    ("kernel", "batch", "channels", "length", "wanted"),
    [
        ("forward", 8, 1536, 2048, 1),  # 300 us whole, 369 in two
        ("backward", 8, 1536, 2048, 2),  # 1,144 us whole, 883 in two
        ("forward", 4, 4096, 2048, 1),  # 300 us whole, 468 in two
        ("backward", 4, 4096, 2048, 2),  # 1,128 us whole, 1,098 in two
        ("forward", 4, 1536, 2048, 5),  # 219 us whole, 281 in two, 189 in four, 234 in six
        ("backward", 4, 1536, 2048, 5),  # 906, 708, 447, 552 us
        ("forward", 2, 1536, 2048, 8),  # 219, 215 (two), 145 (four), 100 us (eight)
        ("backward", 8, 4096, 2048, 1),
        ("forward", 1, 1536, 2**20, 22),
    ],
)
def test_the_scan_is_cut_as_an_h200_wants(kernel, batch, channels, length, wanted):
    blocks, most = batch * channels // 64, cuda.BLOCKS_PER_PROCESSOR[kernel]
    found = segments.division(length, 16, blocks, 132, most, *cuda.PACES[kernel])
    assert found[1] == wanted
