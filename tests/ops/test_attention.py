"""Attention: against the dense formula, across cuts, caches, windows and documents, and its derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambakit.ops.attention import KVCache, KVState, attention, chunked

BACKENDS = ["chunked", "reference"]
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries at test sizes."""
    monkeypatch.setattr(chunked, "BLOCK", 4)


def draw(b=2, l=11, h=4, g=2, p=3, m=0, dtype=torch.float64, seed=0):
    """Queries, keys, values, then past keys and values of `m` tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, l, h, p), (b, l, g, p), (b, l, g, p), (b, m, g, p), (b, m, g, p))
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype).requires_grad_() for t in made]


def documents(b, l, seed=0):
    """Random document numbers that also come back: a number alone is no document, a run of it is."""
    return torch.randint(0, 2, (b, l), generator=torch.Generator().manual_seed(seed))


def empty_cache(b, capacity, g, p, dtype=torch.float64):
    """A cache of `capacity` slots."""
    entries = [torch.zeros(b, capacity, g, p, dtype=dtype) for _ in range(2)]
    return KVCache(*entries, torch.zeros(b, capacity, dtype=torch.int64), torch.zeros((), dtype=torch.int64))


def dense(q, k, v, seen, scale=None):
    """Softmax over the whole score matrix, keys repeated per head, by a mask `(b, l, m)`."""
    shared = q.shape[2] // k.shape[2]
    k, v = (torch.stack([t[:, :, i // shared] for i in range(q.shape[2])], 2) for t in (k, v))
    scores = torch.einsum("blhp,bmhp->bhlm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.exp(scores) * seen[:, None]
    return torch.einsum("bhlm,bmhp->blhp", weights / weights.sum(-1, keepdim=True), v)


def seen_by(seq_idx, l, causal, window):
    """The mask in words of the contract, token by token: `(b, l, m)` for the last `l` of `m` tokens."""
    b, m = seq_idx.shape
    seen = torch.zeros(b, l, m, dtype=torch.float64)
    for row, i, s in itertools.product(range(b), range(l), range(m)):
        t = m - l + i
        between = seq_idx[row, min(s, t) : max(s, t) + 1]
        near = window is None or abs(t - s) < window
        seen[row, i, s] = near and (s <= t or not causal) and len(between.unique()) == 1
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 3, 6, 40])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_is_the_dense_formula(packed, causal, window, backend):
    q, k, v, *_ = draw()
    seq_idx = documents(2, 11) if packed else None
    mask = seen_by(torch.zeros(2, 11) if seq_idx is None else seq_idx, 11, causal, window)
    expected = dense(q, k, v, mask, scale=0.3)
    y, _ = attention(q, k, v, causal=causal, window=window, scale=0.3, seq_idx=seq_idx, backend=backend)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert y.shape == q.shape
    loss = [(t**2).sum() for t in (y, expected)]
    for found, right in zip(*(torch.autograd.grad(t, (q, k, v)) for t in loss), strict=True):
        torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 1), (6, 2)])
def test_groups_are_repeated_heads(h, g, window, backend):
    q, k, v, *_ = draw(h=h, g=g)
    repeated = (t.repeat_interleave(h // g, dim=2) for t in (k, v))
    expected, _ = attention(q, *repeated, window=window, backend=backend)
    torch.testing.assert_close(attention(q, k, v, window=window, backend=backend)[0], expected, **CLOSE)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("l", [1, 3, 37])
def test_chunked_is_the_reference(l, window, packed, dtype):
    inputs = draw(l=l, p=8, dtype=dtype)[:3]
    seq_idx = documents(2, l).cumsum(1) // 3 if packed else None

    def results(tensors, backend):
        y, _ = attention(*tensors, window=window, seq_idx=seq_idx, backend=backend)
        return [y, *torch.autograd.grad(y.double().square().sum(), tensors)]

    exact = results([t.detach().double().requires_grad_() for t in inputs], "reference")
    reference = results(inputs, "reference")
    for found, near, true in zip(results(inputs, "chunked"), reference, exact, strict=True):
        assert found.dtype == near.dtype and found.shape == near.shape
        bound = 2 * (near.double() - true).norm() + FLOOR[dtype] * true.norm()
        assert (found.double() - true).norm() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_pieces_with_carried_state_are_the_whole(packed, window, backend):
    q, k, v, *_ = draw()
    seq_idx = documents(2, 11) if packed else None
    y, final = attention(q, k, v, window=window, seq_idx=seq_idx, backend=backend)
    target = torch.randn(y.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((y * target).sum() + final.k.sum() + final.v.sum(), (q, k, v))
    assert final.k.shape[1] == (11 if window is None else window - 1)
    for cuts in ([5, 6], [1] * 11, [9, 1, 1]):
        state, ys = None, []
        ids = itertools.repeat(None) if seq_idx is None else seq_idx.split(cuts, 1)
        for *parts, part_ids in zip(*(t.split(cuts, 1) for t in (q, k, v)), ids, strict=False):
            piece, state = attention(*parts, state, window=window, seq_idx=part_ids, backend=backend)
            ys.append(piece)
        pieces = torch.cat(ys, 1)
        torch.testing.assert_close(pieces, y, **CLOSE)
        for found, right in zip(state, final, strict=True):
            assert torch.equal(found, right)
        loss = (pieces * target).sum() + state.k.sum() + state.v.sum()
        for found, right in zip(torch.autograd.grad(loss, (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("window", "capacity"), [(None, 11), (None, 16), (1, 1), (4, 4), (4, 6), (4, 20), (20, 11)]
)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_cache_in_place_is_the_whole(packed, window, capacity, backend):
    q, k, v, *_ = (t.detach() for t in draw())
    seq_idx = documents(2, 11) if packed else None
    y, _ = attention(q, k, v, window=window, seq_idx=seq_idx, backend=backend)
    for cuts in ([11], [1] * 11, [3, 8], [6, 1, 4], [1, 9, 1]):
        cache, ys = empty_cache(2, capacity, 2, 3), []
        addresses = [t.data_ptr() for t in cache]
        ids = itertools.repeat(None) if seq_idx is None else seq_idx.split(cuts, 1)
        for *parts, part_ids in zip(*(t.split(cuts, 1) for t in (q, k, v)), ids, strict=False):
            piece, final = attention(*parts, state=cache, window=window, seq_idx=part_ids, backend=backend)
            ys.append(piece)
        assert [t.data_ptr() for t in final] == addresses
        assert final.length == 11
        torch.testing.assert_close(torch.cat(ys, 1), y, **CLOSE)


def test_cache_lets_gradients_through_the_new_tokens_only():
    q, k, v, *_ = draw(l=4)
    cache = empty_cache(2, 9, 2, 3)
    attention(q.detach(), k.detach(), v.detach(), state=cache)
    past = KVState(*(t[:, :4].clone() for t in cache[:2]), torch.zeros(2, 4, dtype=torch.int64))
    y, _ = attention(q, k, v, state=cache)
    expected, _ = attention(q, k, v, past)
    torch.testing.assert_close(y, expected, **CLOSE)
    for found, right in zip(
        torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(found, right, **CLOSE)
    assert not cache.k.requires_grad and torch.equal(cache.k[:, 4:8], k)


def test_full_cache_says_its_capacity():
    q, k, v, *_ = (t.detach() for t in draw(l=5))
    cache = empty_cache(2, 8, 2, 3)
    attention(q, k, v, state=cache)
    before = [t.clone() for t in cache]
    with pytest.raises(
        ValueError, match=r"capacity 8 and holds 5 tokens, so it cannot take 5 more; .* >= 10"
    ):
        attention(q, k, v, state=cache)
    with pytest.raises(ValueError, match=r"capacity 8 .* \(a window of 9 needs no more than 9\)"):
        attention(q, k, v, state=cache, window=9)
    assert all(torch.equal(a, b) for a, b in zip(cache, before, strict=True))


def test_narrow_cache_costs_only_its_rounding():
    q, k, v, *_ = (t.detach().float() for t in draw())
    cache = empty_cache(2, 11, 2, 3, dtype=torch.bfloat16)
    ys = [
        attention(*parts, state=cache)[0] for parts in zip(*(t.split(1, 1) for t in (q, k, v)), strict=True)
    ]
    expected, _ = attention(q, k.bfloat16().float(), v.bfloat16().float())
    torch.testing.assert_close(torch.cat(ys, 1), expected)


def test_cleared_rows_start_afresh_while_others_go_on():
    q, k, v, *_ = (t.detach() for t in draw())
    cache = empty_cache(2, 22, 2, 3)
    attention(q, k, v, state=cache)
    for entries in cache[:3]:
        entries[0] = 0
    for backend in BACKENDS:
        here = KVCache(*(t.clone() for t in cache))
        y, _ = attention(q, k, v, state=here, backend=backend)
        torch.testing.assert_close(y[:1], attention(q[:1], k[:1], v[:1])[0], **CLOSE)
        past = KVState(k, v, torch.zeros(2, 11, dtype=torch.int64))
        torch.testing.assert_close(y[1:], attention(q, k, v, past)[0][1:], **CLOSE)


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in-place"])
def test_left_padding_is_a_document_of_its_own(in_place):
    """Rows of lengths 3 and 5, padded to 5, then two more tokens without any mention of documents."""
    q, k, v, *_ = (t.detach() for t in draw(l=7))
    seq_idx = torch.tensor([[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]])
    state = empty_cache(2, 7, 2, 3) if in_place else None
    ys = []
    for first, last, ids in ((0, 5, seq_idx), (5, 6, None), (6, 7, None)):
        part = (t[:, first:last] for t in (q, k, v))
        given = {"state": state} if in_place else {"initial_state": state}
        y, state = attention(*part, **given, seq_idx=ids)
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.testing.assert_close(y[:1, 2:], attention(q[:1, 2:], k[:1, 2:], v[:1, 2:])[0], **CLOSE)
    torch.testing.assert_close(y[1:], attention(q[1:], k[1:], v[1:])[0], **CLOSE)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_meet(backend, window, dtype):
    inputs = draw(b=1, l=40, p=8, dtype=dtype)[:3]
    seq_idx = torch.tensor([[0] * 11 + [1] * 2 + [0] * 13 + [5] * 14])
    y, _ = attention(*inputs, window=window, seq_idx=seq_idx, backend=backend)
    changed = [t.detach().clone() for t in inputs]
    for first, last in ((0, 11), (11, 13), (13, 26), (26, 40)):
        alone, _ = attention(*(t[:, first:last] for t in inputs), window=window, backend=backend)
        torch.testing.assert_close(alone, y[:, first:last])
    for t in changed:
        t[:, :13] = 100 * t[:, :13] + 7
    moved, _ = attention(*changed, window=window, seq_idx=seq_idx, backend=backend)
    assert torch.equal(moved[:, 13:], y[:, 13:]) and not torch.equal(moved[:, :13], y[:, :13])
    for t in torch.autograd.grad(y[:, 13:].float().square().sum(), inputs):
        assert t[:, :13].abs().sum() == 0 and t[:, 13:].abs().sum() > 0


@pytest.mark.parametrize(
    "options", [{}, {"window": 2}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}], ids=str
)
def test_derivatives(options):
    q, k, v, past_k, past_v = draw(b=1, l=5, h=2, g=1, p=2, m=2)

    def function(q, k, v, past_k, past_v):
        past = KVState(past_k, past_v, torch.zeros(1, 2, dtype=torch.int64))
        y, final = attention(q, k, v, past, **options, backend="chunked")
        return y, final.k, final.v

    assert torch.autograd.gradcheck(function, (q, k, v, past_k, past_v))
    assert torch.autograd.gradgradcheck(function, (q, k, v, past_k, past_v))


def test_second_derivative_below_float64():
    """The fused kernels have none and say so; PyTorch's unfused form, asked for, has."""
    single = draw(dtype=torch.float32)[:3]
    double = [t.detach().double().requires_grad_() for t in single]

    def second(inputs):
        first = torch.autograd.grad(
            attention(*inputs, backend="chunked")[0].square().sum(), inputs, create_graph=True
        )
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    with pytest.raises(RuntimeError, match="not implemented"):
        second(single)
    with sdpa_kernel(SDPBackend.MATH):
        found = second(single)
    for a, b in zip(found, second(double), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("window", [None, 5])
def test_recomputed_blocks_give_the_same_gradients(window, monkeypatch):
    inputs = draw(l=19)[:3]
    seq_idx = documents(2, 19)

    def gradients():
        y, _ = attention(*inputs, window=window, seq_idx=seq_idx, backend="chunked")
        return torch.autograd.grad(y.square().sum(), inputs)

    kept = gradients()
    monkeypatch.setattr(chunked, "MASK_ELEMENTS", 0)
    for a, b in zip(gradients(), kept, strict=True):
        assert torch.equal(a, b)


def test_masks_of_a_long_training_sequence_are_not_kept(monkeypatch):
    """What the backward pass holds grows with the length, not with its square."""
    monkeypatch.setattr(chunked, "BLOCK", 16)
    monkeypatch.setattr(chunked, "MASK_ELEMENTS", 2**12)

    def kept(l):
        inputs = draw(b=1, l=l, h=1, g=1, p=2, dtype=torch.float32)[:3]
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(*inputs, seq_idx=torch.zeros(1, l, dtype=torch.int64), backend="chunked")
        return sum(storages.values())

    assert kept(1024) < 2.2 * kept(512)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_layout(backend):
    q, k, v, *_ = (t.detach().float() for t in draw())
    expected, _ = attention(q, k, v, window=5, backend=backend)
    layouts = (
        q.repeat_interleave(2, -1)[..., ::2],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.flip(0).flip(0),
    )
    torch.testing.assert_close(attention(*layouts, window=5, backend=backend)[0], expected)


def test_extreme_scores_stay_finite():
    q, k, v, *_ = (t.detach().float() for t in draw())
    for backend in BACKENDS:
        y, _ = attention(q * 1e3, k * 1e3, v, seq_idx=documents(2, 11), backend=backend)
        assert y.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 3, "seq_idx": documents(2, 11)}], ids=["plain", "masked"])
def test_traces_whole(options):
    inputs = [t.detach().float().requires_grad_() for t in draw()[:3]]

    def function(q, k, v):
        return attention(q, k, v, **options)[0]

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    expected = function(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    for traced, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)


def test_errors_name_what_is_wrong():
    q, k, v, past_k, past_v = (t.detach() for t in draw(m=2))
    past = KVState(past_k, past_v, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 heads do not split evenly into 3 groups"):
        attention(q, *(torch.cat([t, t], 2)[:, :, :3] for t in (k, v)))
    with pytest.raises(ValueError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="initial_state needs causal=True"):
        attention(q, k, v, past, causal=False)
    with pytest.raises(ValueError, match="either initial_state or state"):
        attention(q, k, v, past, state=empty_cache(2, 20, 2, 3))
    with pytest.raises(ValueError, match=r"initial_state\.v has shape \(2, 1, 2, 3\)"):
        attention(q, k, v, past._replace(v=past_v[:, :1]))
    with pytest.raises(ValueError, match=r"state\.k has shape \(3, 20, 2, 3\)"):
        attention(q, k, v, state=empty_cache(3, 20, 2, 3))
    with pytest.raises(ValueError, match="empty"):
        attention(q[:, :0], k[:, :0], v[:, :0])
