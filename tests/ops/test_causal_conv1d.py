"""The causal convolution: against PyTorch's, across cuts and documents, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambakit.ops.causal_conv1d import causal_conv1d

BACKENDS = ["chunked", "reference"]
TYPES = [torch.float64, torch.float32, torch.bfloat16]
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def draw(b=2, l=11, d=5, w=4, dtype=torch.float64, seed=0):
    """Inputs, taps, bias and initial state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (b, l, d), "weight": (d, w), "bias": (d,), "initial_state": (b, w - 1, d)}
    made = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def documents(b=2, l=11, seed=0):
    """Random document numbers that also come back: 0, 1, 1, 0, ... (a number alone is no document)."""
    return torch.randint(0, 2, (b, l), generator=torch.Generator().manual_seed(seed))


def results(inputs, backend, **options):
    """Outputs, final state and all gradients."""
    y, final = causal_conv1d(**inputs, **options, backend=backend)
    loss = (y.double() ** 2).sum() + (final.double() ** 3).sum()
    return [y, final, *torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)]


def test_reference_is_pytorchs_convolution():
    inputs = draw(l=9, w=4)
    x, weight, bias, state = inputs.values()
    whole = torch.cat([state, x], 1).transpose(1, 2)
    expected = F.silu(F.conv1d(whole, weight[:, None], bias, groups=5)).transpose(1, 2)
    y, final = causal_conv1d(**inputs, activation="silu", backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(final, x[:, -3:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("l", [1, 2, 3, 17])
@pytest.mark.parametrize("w", [1, 2, 4, 8, 12])
def test_chunked_is_the_reference(w, l, packed, dtype):
    inputs = draw(l=l, w=w, dtype=dtype)
    seq_idx = documents(l=l) if packed else None
    exact_inputs = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    exact = results(exact_inputs, "reference", activation="silu", seq_idx=seq_idx)
    reference = results(inputs, "reference", activation="silu", seq_idx=seq_idx)
    for found, near, true in zip(
        results(inputs, "chunked", activation="silu", seq_idx=seq_idx), reference, exact, strict=True
    ):
        assert found.dtype == near.dtype and found.shape == near.shape
        bound = 2 * (near.double() - true).norm() + FLOOR[dtype] * true.norm()
        assert (found.double() - true).norm() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("w", [1, 2, 5])
def test_pieces_with_carried_state_are_the_whole(w, packed, backend):
    inputs = draw(l=9, w=w)
    seq_idx = documents(l=9).cumsum(1) if packed else torch.zeros(2, 9, dtype=torch.int64)
    y, final = causal_conv1d(**inputs, seq_idx=seq_idx, backend=backend)
    x, weight, bias, start = inputs.values()
    for cuts in ([4, 5], [1] * 9, [2, 1, 6]):
        state, ys, before = start, [], seq_idx[:, :1]
        for part, ids in zip(x.split(cuts, 1), seq_idx.split(cuts, 1), strict=True):
            state = torch.where(
                (before == ids[:, :1])[..., None], state, 0.0
            )  # cut at a border: start afresh
            piece, state = causal_conv1d(part, weight, bias, state, seq_idx=ids, backend=backend)
            ys.append(piece)
            before = ids[:, -1:]
        torch.testing.assert_close(torch.cat(ys, 1), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_overwritten_in_place(backend):
    x, weight, bias, start = (t.detach() for t in draw(l=8).values())
    whole, final = causal_conv1d(x, weight, bias, start, activation="silu", backend=backend)
    state, ys = start.clone(), []
    for t in range(8):
        y, returned = causal_conv1d(
            x[:, t : t + 1], weight, bias, activation="silu", state=state, backend=backend
        )
        assert returned is state
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, final)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_meet(backend, dtype):
    inputs = draw(b=1, l=10, dtype=dtype)
    x, weight, bias, start = inputs.values()
    seq_idx = torch.tensor([[3, 3, 3, 3, 7, 7, 3, 3, 3, 3]])
    y, final = causal_conv1d(**inputs, seq_idx=seq_idx, backend=backend)
    for first, last, state in ((0, 4, start), (4, 6, None), (6, 10, None)):
        alone, end = causal_conv1d(x[:, first:last], weight, bias, state, backend=backend)
        torch.testing.assert_close(y[:, first:last], alone)
    torch.testing.assert_close(final, end)

    spoiled = x.detach().clone()
    spoiled[:, :6] = float("nan")
    moved, _ = causal_conv1d(spoiled, weight, bias, start, seq_idx=seq_idx, backend=backend)
    assert torch.equal(moved[:, 6:], y[:, 6:]) and moved[:, :6].isnan().all()
    grad_x, grad_start = torch.autograd.grad(y[:, 6:].sum() + final.sum(), (x, start))
    assert grad_x[:, :6].abs().sum() == 0 and grad_start.abs().sum() == 0 and (grad_x[:, 6:] != 0).any()


def test_final_state_forgets_other_documents():
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    for backend in BACKENDS:
        _, final = causal_conv1d(
            x, torch.ones(1, 4), seq_idx=torch.tensor([[0, 0, 0, 1, 1]]), backend=backend
        )
        assert final.flatten().tolist() == [0.0, 4.0, 5.0]
        _, final = causal_conv1d(
            x[:, :2], torch.ones(1, 4), initial_state=torch.full((1, 3, 1), 9.0), backend=backend
        )
        assert final.flatten().tolist() == [9.0, 1.0, 2.0]


def test_final_state_does_not_keep_the_sequence_alive():
    x, weight, *_ = (t.detach() for t in draw(l=500).values())
    _, final = causal_conv1d(x, weight, backend="chunked")
    assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 1, 1]])], ids=["one-document", "packed"])
def test_derivatives(seq_idx):
    inputs = draw(b=1, l=5, d=2, w=3)

    def function(*tensors):
        return causal_conv1d(*tensors, activation="silu", seq_idx=seq_idx, backend="chunked")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_layout(backend):
    inputs = {k: v.detach().float() for k, v in draw().items()}
    expected = causal_conv1d(**inputs, backend=backend)
    inputs["x"] = inputs["x"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    inputs["initial_state"] = inputs["initial_state"].repeat_interleave(2, 2)[..., ::2]
    for found, right in zip(causal_conv1d(**inputs, backend=backend), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_autocast_does_not_round():
    inputs = {k: v.detach().float() for k, v in draw().items()}
    y, _ = causal_conv1d(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = causal_conv1d(**inputs)
    assert again.dtype == torch.float32 and torch.equal(again, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradient_of_each_sample():
    x, weight = torch.randn(3, 6, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def loss(weight, sample):
        return causal_conv1d(sample[None], weight, activation="silu", backend="chunked")[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(weight, sample) for sample in x]))


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_traces_whole(packed):
    inputs = {k: v.detach().float().requires_grad_() for k, v in draw().items()}
    seq_idx = documents() if packed else None

    def function(x, weight, bias, start):
        return causal_conv1d(x, weight, bias, start, activation="silu", seq_idx=seq_idx)

    def loss(outputs):
        return outputs[0].square().sum() + outputs[1].pow(3).sum()

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs.values())
    expected = function(*inputs.values())
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss(outputs), list(inputs.values())) for outputs in (found, expected))
    for traced, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)


def test_errors_name_what_is_wrong():
    x, weight, bias, state = (t.detach() for t in draw().values())
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(d=5, w\)"):
        causal_conv1d(x, weight[:4])
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2, 5\).*\(2, 3, 5\)"):
        causal_conv1d(x, weight, bias, state[:, 1:])
    with pytest.raises(ValueError, match="did you mean 'silu'"):
        causal_conv1d(x, weight, activation="sillu")
    with pytest.raises(ValueError, match="either initial_state or state"):
        causal_conv1d(x, weight, bias, state, state=state)
    with pytest.raises(ValueError, match="empty"):
        causal_conv1d(x[:, :0], weight)
