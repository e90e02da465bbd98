"""Every function of the two packages, argument by argument, against its formula in a loop, in float64.

The loops here are written from the formulas alone: channels-first, a token at a time, no operator of ours.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from mambakit.compat.conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from mambakit.compat.gated_norm import layernorm_fn, rmsnorm_fn
from mambakit.compat.residual_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn
from mambakit.compat.selective_scan import mamba_inner_fn, selective_scan_fn, selective_scan_ref
from mambakit.compat.ssd import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from mambakit.compat.state_update import selective_state_update

NO_LIMIT = (0.0, float("inf"))


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def assert_same(ours, naive, inputs, **settings):
    """Values and the gradients of every tensor among the inputs; `None` where an input is absent."""
    grads = []
    for function in (ours, naive):
        leaves = {
            key: value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value
            for key, value in inputs.items()
        }
        outputs = function(**leaves, **settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(7)
        sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs).backward()
        found = {k: v.grad for k, v in leaves.items() if isinstance(v, torch.Tensor)}
        assert all(g is not None for g in found.values()), [k for k, g in found.items() if g is None]
        grads.append((outputs, found))
    (values, gradients), (expected, wanted) = grads
    assert len(values) == len(expected)
    for y, y_naive in zip(values, expected, strict=True):
        torch.testing.assert_close(y, y_naive, rtol=1e-9, atol=1e-10)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[key], rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )


# Mamba-1


def naive_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))

    def at(M, t):  # (b, d, n)
        if M.dim() == 2:
            return M.expand(batch, -1, -1)
        M = M[..., t]
        return (
            M[:, None].expand(-1, channels, -1)
            if M.dim() == 2
            else M.repeat_interleave(channels // M.shape[1], 1)
        )

    h, ys = u.new_zeros(batch, channels, A.shape[1]), []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * at(B, t)
        y = (h * at(C, t)).sum(-1)
        y = y if D is None else y + D * u[:, :, t]
        ys.append(y if z is None else y * z[:, :, t] * torch.sigmoid(z[:, :, t]))
    y = torch.stack(ys, -1)
    return (y, h) if return_last_state else y


def scan_inputs(batch=2, d=6, n=3, length=7):
    return {
        "u": normal(batch, d, length),
        "delta": normal(batch, d, length).abs() * 0.3,
        "A": -normal(d, n).exp(),
        "B": normal(batch, n, length),
        "C": normal(batch, n, length),
    }


@pytest.mark.parametrize("D", [False, True])
@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softplus", "last"), [(False, True), (True, False)])
def test_selective_scan(D, z, bias, softplus, last):
    torch.manual_seed(0)
    inputs = scan_inputs()
    inputs |= {"D": normal(6)} if D else {}
    inputs |= {"z": normal(2, 6, 7)} if z else {}
    inputs |= {"delta_bias": normal(6).abs()} if bias else {}
    settings = {"delta_softplus": softplus, "return_last_state": last}
    assert_same(selective_scan_fn, naive_scan, inputs, **settings)


@pytest.mark.parametrize("shapes", [("g", "g"), ("d", "d"), ("d", "1"), ("g", "1"), ("1", "d")])
def test_selective_scan_takes_every_shape_of_its_vectors(shapes):
    torch.manual_seed(0)
    inputs = scan_inputs()
    made = {"1": (2, 3, 7), "g": (2, 2, 3, 7), "d": (6, 3)}
    inputs |= {name: normal(*made[shape]) for name, shape in zip("BC", shapes, strict=True)}
    assert_same(selective_scan_fn, naive_scan, inputs, return_last_state=True)
    assert_same(selective_scan_ref, naive_scan, inputs)


def test_selective_scan_copies_no_channels_last_memory_and_keeps_types():
    torch.manual_seed(0)
    inputs = {key: value.float() for key, value in scan_inputs().items()}
    inputs["u"], inputs["delta"] = (
        inputs[key].transpose(1, 2).contiguous().transpose(1, 2).bfloat16() for key in ("u", "delta")
    )
    y, last = selective_scan_fn(**inputs, return_last_state=True)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert y.transpose(1, 2).is_contiguous()
    exact = naive_scan(**{key: value.double() for key, value in inputs.items()})
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=2e-2)


def test_what_the_scan_cannot_do_is_refused_by_name():
    inputs = scan_inputs()
    with pytest.raises(NotImplementedError, match=r"A is torch\.complex128"):
        selective_scan_fn(**{**inputs, "A": inputs["A"].to(torch.complex128)})
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan_fn(**{**inputs, "B": normal(2)})
    with pytest.raises(ValueError, match="B has 2 groups, the other one 3"):
        selective_scan_fn(**{**inputs, "B": normal(2, 2, 3, 7), "C": normal(2, 3, 3, 7)})


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_inner(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    x, z = xz.chunk(2, 1)
    x = naive_conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    rows = torch.einsum("rd,bdl->blr", x_proj_weight, x)
    delta = torch.einsum("dr,blr->bld", delta_proj_weight, rows[..., :rank])
    delta = delta if dt_rms_weight is None else rms(delta, dt_rms_weight, b_c_dt_rms_eps)
    rest = rows[..., rank:]
    if B is None:
        B, rest = rest[..., :n], rest[..., n:]
        B = B if B_proj_bias is None else B + B_proj_bias
        B = (B if b_rms_weight is None else rms(B, b_rms_weight, b_c_dt_rms_eps)).transpose(1, 2)
    if C is None:
        C = rest if C_proj_bias is None else rest + C_proj_bias
        C = (C if c_rms_weight is None else rms(C, c_rms_weight, b_c_dt_rms_eps)).transpose(1, 2)
    y = naive_scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    y = torch.einsum("md,bdl->blm", out_proj_weight, y)
    return y if out_proj_bias is None else y + out_proj_bias


INNER = {
    "plain": {},
    "scalars": {"D": (6,), "delta_bias": (6,), "out_proj_bias": (5,), "conv1d_bias": (6,)},
    "biases": {"B_proj_bias": (3,), "C_proj_bias": (3,), "delta_bias": (6,)},
    "norms": {"b_rms_weight": (3,), "c_rms_weight": (3,), "dt_rms_weight": (6,)},
    "given B": {"B": (2, 3, 7), "D": (6,)},
    "given C for all tokens": {"C": (6, 3)},
}


@pytest.mark.parametrize("case", INNER)
def test_mamba_inner(case):
    torch.manual_seed(0)
    more = INNER[case]
    columns = 2 + 3 * (("B" not in more) + ("C" not in more))
    inputs = {
        "xz": normal(2, 12, 7),
        "conv1d_weight": normal(6, 1, 4),
        "conv1d_bias": None,
        "x_proj_weight": normal(columns, 6) * 0.5,
        "delta_proj_weight": normal(6, 2) * 0.5,
        "out_proj_weight": normal(5, 6),
        "out_proj_bias": None,
        "A": -normal(6, 3).exp(),
        **{key: normal(*shape) for key, shape in more.items()},
    }
    eps = {"b_c_dt_rms_eps": 1e-2} if case == "norms" else {}
    assert_same(mamba_inner_fn, naive_inner, inputs, **eps)


def test_mamba_inner_refuses_what_has_no_meaning():
    inputs = (
        normal(2, 12, 7),
        normal(6, 1, 4),
        None,
        normal(8, 6),
        normal(6, 2),
        normal(5, 6),
        None,
        -normal(6, 3).exp(),
    )
    with pytest.raises(ValueError, match="checkpoint_lvl is 2"):
        mamba_inner_fn(*inputs, checkpoint_lvl=2)
    with pytest.raises(ValueError, match="B is given"):
        mamba_inner_fn(*inputs, B=normal(2, 3, 7), B_proj_bias=normal(3))


# Convolution


def naive_conv(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None
):
    batch, channels, length = x.shape
    w = weight.shape[1]
    past = x.new_zeros(batch, channels, w - 1) if initial_states is None else initial_states
    line = torch.cat([past, x], -1)
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long)
    first = seq_idx[:, :1].expand(-1, w - 1)
    documents = torch.cat([first, seq_idx], 1)
    ys = []
    for t in range(length):
        own = (documents[:, t : t + w] == seq_idx[:, t, None]).to(x.dtype)[:, None]
        y = (line[:, :, t : t + w] * own * weight).sum(-1)
        y = y if bias is None else y + bias
        y = y * (seq_idx[:, t] >= 0).to(x.dtype)[:, None]
        ys.append(y if activation is None else y * torch.sigmoid(y))
    out = torch.stack(ys, -1)
    if not return_final_states:
        return out
    own = documents[:, None, documents.shape[1] - (w - 1) :] == seq_idx[:, None, -1:]
    return out, line[:, :, line.shape[-1] - (w - 1) :] * own.to(x.dtype)


@pytest.mark.parametrize("w", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("more", [(), ("bias",), ("bias", "initial_states")])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv1d(w, activation, more, packed):
    more = [key for key in more if w > 1 or key != "initial_states"]  # one tap remembers nothing
    torch.manual_seed(0)
    inputs = {"x": normal(2, 5, 6), "weight": normal(5, w)}
    inputs |= {key: normal(*{"bias": (5,), "initial_states": (2, 5, w - 1)}[key]) for key in more}
    settings = {"activation": activation, "return_final_states": w > 1}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]) if packed else None
    assert_same(
        lambda **i: causal_conv1d_fn(seq_idx=seq_idx, **i),
        lambda **i: naive_conv(seq_idx=seq_idx, **i),
        inputs,
        **settings,
    )


def test_causal_conv1d_padding_gives_zero():
    x, weight, bias = normal(1, 3, 6), normal(3, 3), normal(3)
    seq_idx = torch.tensor([[-1, -1, 0, 0, 1, -1]])
    y = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    torch.testing.assert_close(y, naive_conv(x, weight, bias, seq_idx, activation="silu"))
    assert (y[..., [0, 1, 5]] == 0).all()


def test_causal_conv1d_writes_final_states_where_it_is_told():
    x, weight, out = normal(2, 3, 6), normal(3, 4), torch.full((2, 3, 3), torch.nan, dtype=torch.float64)
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out
    torch.testing.assert_close(out, x[..., 3:])
    with pytest.raises(ValueError, match="final_states_out"):
        causal_conv1d_fn(x, weight, final_states_out=out)
    with pytest.raises(NotImplementedError, match="gelu"):
        causal_conv1d_fn(x, weight, activation="gelu")


@pytest.mark.parametrize("columns", [3, 4, 7])
@pytest.mark.parametrize("length", [None, 1, 2, 9])
def test_causal_conv1d_update_continues(columns, length):
    torch.manual_seed(0)
    line, weight, bias = normal(2, 5, 20), normal(5, 4), normal(5)
    whole = naive_conv(line, weight, bias, activation="silu")
    state = line[..., 10 - columns : 10].clone()
    tokens = line[..., 10] if length is None else line[..., 10 : 10 + length]
    y = causal_conv1d_update(tokens, state, weight, bias, "silu")
    assert y.shape == tokens.shape
    end = 11 if length is None else 10 + length
    torch.testing.assert_close(y.reshape(2, 5, -1), whole[..., 10:end])
    torch.testing.assert_close(state, line[..., end - columns : end])


@pytest.mark.parametrize("length", [1, 3])
def test_causal_conv1d_update_in_a_ring(length):
    torch.manual_seed(0)
    columns, seen = 5, torch.tensor([7, 11], dtype=torch.int32)
    line, weight = normal(2, 3, 20), normal(3, 4)
    whole = naive_conv(line, weight)
    state = torch.full((2, 3, columns), torch.nan, dtype=torch.float64)
    expected = state.clone()
    for row, count in enumerate(seen.tolist()):
        for t in range(count + length):
            if t < count:
                state[row, :, t % columns] = line[row, :, t]
            expected[row, :, t % columns] = line[row, :, t]
    tokens = torch.stack([line[r, :, c : c + length] for r, c in enumerate(seen.tolist())])
    y = causal_conv1d_update(tokens, state, weight, cache_seqlens=seen)
    wanted = torch.stack([whole[r, :, c : c + length] for r, c in enumerate(seen.tolist())])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, expected)
    with pytest.raises(ValueError, match="6 tokens for a ring of 5"):
        causal_conv1d_update(normal(2, 3, 6), state, weight, cache_seqlens=seen)


def test_causal_conv1d_update_on_rows_of_a_pool():
    torch.manual_seed(0)
    pool, x, weight = normal(5, 3, 4), normal(3, 3), normal(3, 4)
    rows, before = torch.tensor([4, -1, 1], dtype=torch.int32), pool.clone()
    y = causal_conv1d_update(x, pool, weight, conv_state_indices=rows)
    for n, row in ((0, 4), (2, 1)):
        state = before[row : row + 1].clone()
        torch.testing.assert_close(y[n : n + 1], causal_conv1d_update(x[n : n + 1], state, weight))
        torch.testing.assert_close(pool[row : row + 1], state)
    assert (y[1] == 0).all()
    assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]])


def test_causal_conv1d_varlen_states():
    x, bounds = normal(9, 2), [0, 5, 7, 7, 9]
    states = causal_conv1d_varlen_states(x, torch.tensor(bounds, dtype=torch.int32), 4)
    assert states.shape == (4, 2, 4)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        kept = min(4, end - start)
        expected = torch.zeros(2, 4, dtype=torch.float64)
        expected[:, 4 - kept :] = x[end - kept : end].T
        assert torch.equal(states[n], expected)


# Mamba-2


def naive_ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
    return_final_states=False,
    ends=None,
):
    batch, length, heads, p = x.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.log1p(dt.exp()) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)
    h = x.new_zeros(batch, heads, p, B.shape[-1]) if initial_states is None else initial_states
    ys, states = [], []
    for t in range(length):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)[:, None, None, None]
        B_t, C_t = (M[:, t].repeat_interleave(heads // M.shape[2], 1) for M in (B, C))
        update = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B_t)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + update
        y = torch.einsum("bhpn,bhn->bhp", h, C_t)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x[:, t]
        ys.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
        if ends is not None and t + 1 in ends:
            states.append(h)
    y = torch.stack(ys, 1)
    found = [y] + ([h] if return_final_states else []) + ([torch.cat(states)] if ends is not None else [])
    return tuple(found) if len(found) > 1 else y


def ssd_inputs(batch=2, length=9, h=4, p=3, g=2, n=5):
    return {
        "x": normal(batch, length, h, p),
        "dt": normal(batch, length, h).abs() * 0.4,
        "A": -normal(h).exp(),
        "B": normal(batch, length, g, n),
        "C": normal(batch, length, g, n),
    }


SSD = {
    "plain": ({}, {}),
    "D per head": ({"D": (4,)}, {}),
    "D per channel": ({"D": (4, 3), "z": (2, 9, 4, 3)}, {}),
    "bias and softplus": ({"dt_bias": (4,)}, {"dt_softplus": True}),
    "softplus without bias": ({}, {"dt_softplus": True}),
    "limit": ({"dt_bias": (4,)}, {"dt_softplus": True, "dt_limit": (0.3, 0.9)}),
    "states": ({"initial_states": (2, 4, 3, 5)}, {"return_final_states": True}),
    "documents": ({"initial_states": (2, 4, 3, 5), "D": (4,)}, {"return_final_states": True, "packed": True}),
    "all": (
        {"D": (4, 3), "z": (2, 9, 4, 3), "dt_bias": (4,), "initial_states": (2, 4, 3, 5)},
        {"dt_softplus": True, "dt_limit": (0.1, 1.1), "return_final_states": True, "packed": True},
    ),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", SSD)
def test_chunk_scan(case, groups):
    torch.manual_seed(0)
    tensors, settings = SSD[case]
    settings = dict(settings)
    inputs = ssd_inputs(g=groups) | {key: normal(*shape) for key, shape in tensors.items()}
    if settings.pop("packed", False):
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 3, 3, 4]], dtype=torch.int32)
        assert_same(
            lambda **i: mamba_chunk_scan_combined(chunk_size=4, seq_idx=seq_idx, **i),
            lambda **i: naive_ssd(seq_idx=seq_idx, **i),
            inputs,
            **settings,
        )
    else:
        assert_same(lambda **i: mamba_chunk_scan_combined(chunk_size=4, **i), naive_ssd, inputs, **settings)


def test_chunk_scan_with_fewer_arguments():
    torch.manual_seed(0)
    inputs = ssd_inputs() | {"D": normal(4), "z": normal(2, 9, 4, 3), "dt_bias": normal(4)}
    ours = lambda **i: mamba_chunk_scan(chunk_size=4, **i)  # noqa: E731
    assert_same(ours, naive_ssd, inputs, dt_softplus=True)


@pytest.mark.parametrize("with_seq_idx", [False, True])
def test_chunk_scan_by_cu_seqlens(with_seq_idx):
    """Documents are told apart by `cu_seqlens` alone; their states come back one by one."""
    torch.manual_seed(0)
    inputs = ssd_inputs(batch=1) | {"D": normal(4), "initial_states": normal(1, 4, 3, 5)}
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    numbers = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2]], dtype=torch.int32)
    more = {"chunk_size": 4, "cu_seqlens": bounds, "seq_idx": numbers if with_seq_idx else None}
    assert_same(
        lambda **i: mamba_chunk_scan_combined(
            return_varlen_states=True, return_final_states=True, **more, **i
        ),
        lambda **i: naive_ssd(seq_idx=numbers, return_final_states=True, ends={4, 5, 9}, **i),
        inputs,
    )
    assert_same(
        lambda **i: mamba_chunk_scan_combined(**more, **i),
        lambda **i: naive_ssd(seq_idx=numbers, **i),
        inputs,
    )


def test_chunk_scan_refuses_what_does_not_fit():
    inputs = ssd_inputs(batch=1)
    for message, more in {
        "chunk_size is 0": {"chunk_size": 0},
        "return_varlen_states needs cu_seqlens": {"return_varlen_states": True},
        "expected numbers that rise from 0 to the 9": {"cu_seqlens": torch.tensor([0, 4])},
        "seq_idx and cu_seqlens": {
            "cu_seqlens": torch.tensor([0, 4, 9]),
            "seq_idx": torch.zeros(1, 9, dtype=torch.int32),
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            mamba_chunk_scan_combined(**inputs, **{"chunk_size": 4, **more})
    with pytest.raises(ValueError, match="not for a batch of 2"):
        mamba_chunk_scan_combined(**ssd_inputs(), chunk_size=4, cu_seqlens=torch.tensor([0, 9]))
    _, final = mamba_chunk_scan_combined(
        **inputs, chunk_size=4, return_final_states=True, state_dtype=torch.bfloat16
    )
    assert final.dtype == torch.bfloat16


def naive_split(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    initial_states=None,
    rmsnorm_weight=None,
    outproj_weight=None,
    outproj_bias=None,
    *,
    heads=4,
    p=3,
    n=5,
    ngroups=2,
    extra=0,
    seq_idx=None,
    dt_limit=NO_LIMIT,
    return_final_states=False,
    activation="silu",
    rmsnorm_eps=1e-6,
    norm_before_gate=True,
):
    d = heads * p
    z0, x0, z, x, B, C, dt = zxbcdt.split([extra, extra, d, d, ngroups * n, ngroups * n, heads], -1)
    xBC = torch.cat([x, B, C], -1).transpose(1, 2)
    xBC = naive_conv(xBC, conv1d_weight, conv1d_bias, seq_idx, activation=activation).transpose(1, 2)
    x, B, C = xBC.split([d, ngroups * n, ngroups * n], -1)
    y, final = naive_ssd(
        x.unflatten(-1, (heads, p)),
        dt,
        A,
        B.unflatten(-1, (ngroups, n)),
        C.unflatten(-1, (ngroups, n)),
        D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y, gate = y.flatten(-2), z * torch.sigmoid(z)
    if rmsnorm_weight is None:
        y = y * gate
    else:
        u = y if norm_before_gate else y * gate
        u = rms(u.unflatten(-1, (ngroups, -1)), 1, rmsnorm_eps).flatten(-2) * rmsnorm_weight
        y = u * gate if norm_before_gate else u
    y = torch.cat([z0 * torch.sigmoid(z0) * x0, y], -1)
    if outproj_weight is not None:
        y = y @ outproj_weight.T
        y = y if outproj_bias is None else y + outproj_bias
    return (y, final) if return_final_states else y


SPLIT = {
    "plain": ({}, {}),
    "norm then gate": ({"rmsnorm_weight": (12,)}, {"rmsnorm_eps": 1e-2}),
    "gate then norm": ({"rmsnorm_weight": (12,)}, {"norm_before_gate": False}),
    "projection": ({"outproj_weight": (7, 12), "outproj_bias": (7,)}, {}),
    "states": ({"initial_states": (2, 4, 3, 5)}, {"return_final_states": True, "dt_limit": (0.2, 0.8)}),
    "mlp": ({"rmsnorm_weight": (12,), "outproj_weight": (7, 14)}, {"extra": 2}),
    "no activation": ({}, {"activation": None}),
    "documents": ({"rmsnorm_weight": (12,)}, {"seq_idx": True}),
}


@pytest.mark.parametrize("D", [(4,), (4, 3)])
@pytest.mark.parametrize("case", SPLIT)
def test_split_conv1d_scan(case, D):
    torch.manual_seed(0)
    tensors, settings = SPLIT[case]
    settings = dict(settings)
    extra = settings.pop("extra", 0)
    inputs = {
        "zxbcdt": normal(2, 9, 2 * extra + 48),
        "conv1d_weight": normal(32, 4) * 0.5,
        "conv1d_bias": normal(32),
        "dt_bias": normal(4),
        "A": -normal(4).exp(),
        "D": normal(*D),
        **{key: normal(*shape) for key, shape in tensors.items()},
    }
    if settings.pop("seq_idx", False):
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2, dtype=torch.int32)
    else:
        seq_idx = None
    assert_same(
        lambda **i: mamba_split_conv1d_scan_combined(
            chunk_size=4, ngroups=2, seq_idx=seq_idx, headdim=3 if len(D) == 1 else None, **i
        ),
        lambda **i: naive_split(extra=extra, seq_idx=seq_idx, **i),
        inputs,
        **settings,
    )


def test_split_conv1d_scan_refuses_what_does_not_fit():
    inputs = (normal(2, 9, 48), normal(32, 4), None, normal(4), -normal(4).exp())
    for message, more in {
        "headdim is None": {"D": normal(4)},
        "headdim is 2": {"D": normal(4, 3), "headdim": 2},
        "outproj_bias is given": {"D": normal(4, 3), "outproj_bias": normal(7)},
        "zxbcdt has 48 channels": {"D": normal(4, 4)},
    }.items():
        with pytest.raises(ValueError, match=message):
            mamba_split_conv1d_scan_combined(*inputs, chunk_size=4, **{"ngroups": 2, **more})


# One step


def naive_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """The formula on (b, h, p, n), every tensor with heads."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.log1p(dt.exp()) if dt_softplus else dt
    B, C = (M.repeat_interleave(x.shape[1] // M.shape[1], 1) for M in (B, C))
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None]
    y = (state * C[:, :, None]).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * z * torch.sigmoid(z)), state


def step_inputs(tied, options, b=2, h=4, p=3, g=2, n=5):
    A, dt, bias = (-normal(h, p, n).exp(), normal(b, h, p).abs(), normal(h, p))
    if tied:
        A = A[:, :1, :1].expand(h, p, n)
        dt, bias = dt[..., :1].expand(b, h, p), bias[:, :1].expand(h, p)
    inputs = {"x": normal(b, h, p), "dt": dt, "A": A, "B": normal(b, g, n), "C": normal(b, g, n)}
    more = {"D": normal(h, p), "z": normal(b, h, p), "dt_bias": bias}
    return inputs | {key: more[key] for key in options}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("options", [(), ("D",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_state_update(tied, softplus, options):
    torch.manual_seed(0)
    inputs, state = step_inputs(tied, options), normal(2, 4, 3, 5)
    y, expected = naive_update(state, **inputs, dt_softplus=softplus)
    found = selective_state_update(state, **inputs, dt_softplus=softplus)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_state_update_in_the_types_of_models(dtype, tied):
    torch.manual_seed(0)
    inputs = step_inputs(tied, ("D", "z", "dt_bias"))
    state = normal(2, 4, 3, 5).to(dtype)
    expected_y, expected = naive_update(state.double(), **inputs, dt_softplus=True)
    narrow = {k: v.to(dtype) if k in ("x", "dt", "B", "C", "z") else v.float() for k, v in inputs.items()}
    if tied:  # a cast keeps no expanded strides
        narrow["A"] = narrow["A"][:, :1, :1].expand(4, 3, 5)
        narrow["dt"], narrow["dt_bias"] = (
            narrow["dt"][..., :1].expand(2, 4, 3),
            narrow["dt_bias"][:, :1].expand(4, 3),
        )
    y = selective_state_update(state, **narrow, dt_softplus=True)
    assert y.dtype == state.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(y.double(), expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double(), expected, rtol=tolerance, atol=tolerance)


def test_state_update_without_heads_is_mamba_1():
    torch.manual_seed(0)
    inputs, state = step_inputs(False, ("D", "z", "dt_bias"), h=1, p=6, g=1), normal(2, 1, 6, 5)
    y, expected = naive_update(state, **inputs, dt_softplus=True)
    flat = {k: v[0] if k in ("A", "D", "dt_bias") else v[:, 0] for k, v in inputs.items()}
    state = state[:, 0].clone()
    torch.testing.assert_close(selective_state_update(state, **flat, dt_softplus=True), y[:, 0])
    torch.testing.assert_close(state, expected[:, 0])


@pytest.mark.parametrize("tied", [False, True])
def test_state_update_on_rows_of_a_pool_and_on_strided_states(tied):
    torch.manual_seed(0)
    inputs = step_inputs(tied, ("D",), b=3)
    pool = normal(5, 3, 4, 5).transpose(1, 2)  # no dense states
    before, rows = pool.clone(), torch.tensor([3, -1, 0], dtype=torch.int32)
    y = selective_state_update(pool, **inputs, state_batch_indices=rows)
    expected, states = naive_update(before[rows.long()], **inputs)
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(pool[[3, 0]], states[[0, 2]])
    assert (y[1] == 0).all() and torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
    strided = before[:3].transpose(1, 2).contiguous().transpose(1, 2)
    expected, states = naive_update(strided.clone(), **inputs)
    torch.testing.assert_close(selective_state_update(strided, **inputs), expected)
    torch.testing.assert_close(strided, states)


def test_state_update_refuses_what_does_not_fit():
    inputs = step_inputs(False, ())
    with pytest.raises(ValueError, match=r"state \(2, 3, 5\)"):
        selective_state_update(normal(2, 3, 5), **inputs)
    with pytest.raises(NotImplementedError, match=r"A is torch\.complex128"):
        selective_state_update(normal(2, 4, 3, 5), **{**inputs, "A": inputs["A"].to(torch.complex128)})


# Norms


def naive_gated(
    x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=False
):
    gate = 1 if z is None else z * torch.sigmoid(z)
    u = x if norm_before_gate else x * gate
    u = u.unflatten(-1, (-1, group_size or x.shape[-1]))
    u = u if is_rms_norm else u - u.mean(-1, keepdim=True)
    y = (u / (u.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * gate if norm_before_gate else y


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("options", [(), ("bias",), ("bias", "z")])
@pytest.mark.parametrize("group_size", [None, 3])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norms(kind, options, group_size, norm_before_gate):
    torch.manual_seed(0)
    inputs = {"x": normal(2, 4, 6), "weight": normal(6), "bias": None}
    inputs |= {key: normal(*{"bias": (6,), "z": (2, 4, 6)}[key]) for key in options}
    settings = {"eps": 1e-2, "group_size": group_size, "norm_before_gate": norm_before_gate}
    is_rms = {"is_rms_norm": kind == "rms"}
    assert_same(
        lambda **i: layernorm_fn(**i, **is_rms), lambda **i: naive_gated(**i, **is_rms), inputs, **settings
    )
    if kind == "rms":
        assert_same(rmsnorm_fn, lambda **i: naive_gated(**i, is_rms_norm=True), inputs, **settings)


def naive_residual(
    x,
    weight,
    bias=None,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    rowscale=None,
    *,
    eps,
    is_rms_norm,
    prenorm,
):
    total = x if rowscale is None else x * rowscale[..., None]
    total = total if x1 is None else total + x1
    total = total if residual is None else total + residual
    outputs = [naive_gated(total, weight, bias, eps=eps, is_rms_norm=is_rms_norm)]
    if weight1 is not None:
        outputs.append(naive_gated(total, weight1, bias1, eps=eps, is_rms_norm=is_rms_norm))
    return (*outputs, total) if prenorm else tuple(outputs)


RESIDUAL = [
    (),
    ("residual",),
    ("bias", "residual"),
    ("x1", "residual"),
    ("rowscale",),
    ("weight1", "bias1", "bias"),
]


@pytest.mark.parametrize("options", RESIDUAL)
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_residual_norms(options, is_rms_norm, prenorm):
    torch.manual_seed(0)
    wide = {"x": (2, 4, 6), "residual": (2, 4, 6), "x1": (2, 4, 6), "rowscale": (2, 4)}
    inputs = {key: normal(*wide.get(key, (6,))) for key in ("x", "weight", *options)}
    ours = rms_norm_fn if is_rms_norm else layer_norm_fn
    assert_same(
        lambda bias=None, **i: ours(bias=bias, eps=1e-2, prenorm=prenorm, **i),
        lambda **i: naive_residual(eps=1e-2, is_rms_norm=is_rms_norm, prenorm=prenorm, **i),
        inputs,
    )


def test_residual_norms_keep_the_types_of_their_kernels():
    x, weight = normal(2, 6, dtype=torch.bfloat16), torch.ones(6)
    y, total = layer_norm_fn(x, weight, None, prenorm=True)
    assert y.dtype == total.dtype == torch.bfloat16
    y, total = layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    residual = normal(2, 6, dtype=torch.float32)
    y, total = rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


def test_dropout_of_the_residual_norms():
    torch.manual_seed(0)
    x, x1, weight = normal(50, 40), normal(50, 40), normal(40)
    y, total, mask, mask1 = layer_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    torch.testing.assert_close(total, x * mask / 0.75 + x1 * mask1 / 0.75)
    torch.testing.assert_close(y, naive_gated(total, weight))
    assert 0.72 < mask.double().mean() < 0.78 and not torch.equal(mask, mask1)
    _, mask, mask1 = layer_norm_fn(x, weight, None, return_dropout_mask=True)
    assert mask is None and mask1 is None
    for message, more in {"rowscale": {"rowscale": normal(50), "x1": x1}, "bias1": {"bias1": weight}}.items():
        with pytest.raises(ValueError, match=message):
            layer_norm_fn(x, weight, None, **more)


def test_norm_and_linear():
    torch.manual_seed(0)
    inputs = {
        "x": normal(2, 6),
        "norm_weight": normal(6),
        "linear_weight": normal(3, 6),
        "residual": normal(2, 6),
    }

    def naive(x, norm_weight, linear_weight, residual):
        total = x + residual
        return naive_gated(total, norm_weight, eps=1e-2, is_rms_norm=True) @ linear_weight.T, total

    assert_same(
        lambda **i: layer_norm_linear_fn(
            norm_bias=None, linear_bias=None, eps=1e-2, is_rms_norm=True, prenorm=True, **i
        ),
        naive,
        inputs,
    )


def test_softplus_of_the_loops_is_the_usual_one():
    x = normal(20)
    torch.testing.assert_close(torch.log1p(x.exp()), F.softplus(x))
