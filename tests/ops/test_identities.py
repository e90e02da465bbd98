"""Identities between operators, which a mistake copied into reference and fast form alike cannot satisfy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambakit import ops

F64 = {"dtype": torch.float64}


@pytest.fixture
def ssd_inputs():
    torch.manual_seed(0)
    b, l, h, p, g, n = 2, 90, 4, 3, 2, 5
    return {
        "x": torch.randn(b, l, h, p, **F64),
        "dt": F.softplus(torch.randn(b, l, h, **F64)),
        "A": -torch.rand(h, **F64) * 3,
        "B": torch.randn(b, l, g, n, **F64),
        "C": torch.randn(b, l, g, n, **F64),
    }


def heads(M, h):
    """Give every head the matrix of its group: `(b, l, g, n)` to `(b, l, h, n)`."""
    return M.repeat_interleave(h // M.shape[2], dim=2)


def test_ssd_is_the_selective_scan_with_tied_decays(ssd_inputs):
    x, dt, A, B, C = ssd_inputs.values()
    b, l, h, p = x.shape
    n = B.shape[-1]
    y, state = ops.ssd(**ssd_inputs)
    y1, state1 = ops.selective_scan(
        x.reshape(b, l, h * p),
        dt.repeat_interleave(p, dim=2),
        A.repeat_interleave(p)[:, None].expand(h * p, n),
        B,
        C,
    )
    torch.testing.assert_close(y.reshape(b, l, h * p), y1, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.reshape(b, h * p, n), state1, rtol=1e-11, atol=1e-11)


def test_ssd_is_masked_attention(ssd_inputs):
    """The quadratic form `(L * C B^T) (dt x)`, with `L` from differences of one running sum."""
    x, dt, A, B, C = ssd_inputs.values()
    h, l = x.shape[2], x.shape[1]
    sums = (dt * A).cumsum(1)
    L = torch.exp(sums[:, :, None] - sums[:, None]).masked_fill(
        ~torch.ones(l, l).tril().bool()[:, :, None], 0
    )
    scores = torch.einsum("bthn,bshn->btsh", heads(C, h), heads(B, h)) * L
    expected = torch.einsum("btsh,bsh,bshp->bthp", scores, dt, x)
    torch.testing.assert_close(ops.ssd(**ssd_inputs)[0], expected, rtol=1e-10, atol=1e-10)


def test_selective_scan_is_a_linear_scan():
    torch.manual_seed(0)
    b, l, d, n = 2, 70, 3, 4
    x, dt = torch.randn(b, l, d, **F64), F.softplus(torch.randn(b, l, d, **F64))
    A, B, C = -torch.rand(d, n, **F64), torch.randn(b, l, 1, n, **F64), torch.randn(b, l, 1, n, **F64)
    h, final = ops.linear_scan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B)
    y, state = ops.selective_scan(x, dt, A, B, C)
    torch.testing.assert_close(y, (h * C).sum(-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def test_selective_scan_with_one_state_is_a_gated_unit():
    """Theorem 1 of the Mamba paper, up to the Euler rule for B: the decay is `sigmoid(-dt)`."""
    torch.manual_seed(0)
    raw, x = torch.randn(1, 20, 1, **F64), torch.randn(1, 20, 1, **F64)
    one = torch.ones(1, 20, 1, 1, **F64)
    y, _ = ops.selective_scan(x, raw, -torch.ones(1, 1, **F64), one, one, dt_softplus=True)
    h, expected = 0.0, []
    for t in range(20):
        h = torch.sigmoid(-raw[0, t, 0]) * h + F.softplus(raw[0, t, 0]) * x[0, t, 0]
        expected.append(h)
    torch.testing.assert_close(y[0, :, 0], torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_zero_step_skips_a_token_and_a_long_step_forgets():
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 3, 2, **F64), torch.randn(1, 3, 1, 4, **F64), torch.randn(1, 3, 1, 4, **F64)
    A, start = -torch.rand(2, 4, **F64) - 0.5, torch.randn(1, 2, 4, **F64)
    nothing = torch.zeros(1, 3, 2, **F64)
    _, state = ops.selective_scan(x, nothing, A, B, C, initial_state=start)
    assert torch.equal(state, start)
    long = nothing + 2000
    y, _ = ops.selective_scan(x, long, A, B, C, initial_state=start)
    other, _ = ops.selective_scan(x, long, A, B, C, initial_state=start * 100)
    assert torch.equal(y, other)


def test_s4d_convolution_is_a_linear_scan():
    """The convolution with the Vandermonde kernel equals the discretised recurrence, scanned."""
    torch.manual_seed(0)
    b, l, d, n = 2, 65, 3, 4
    u, dt = torch.randn(b, l, d, **F64), torch.rand(d, **F64) * 0.2 + 0.01
    A = torch.complex(-torch.rand(d, n, **F64), 3 * torch.randn(d, n, **F64))
    B, C = (torch.randn(d, n, dtype=torch.complex128) for _ in range(2))
    decay = torch.exp(dt[:, None] * A)
    inputs = (decay - 1) / A * B
    h, final = ops.linear_scan(decay.expand(b, l, d, n), inputs * u[..., None])
    y, state = ops.s4d_conv(u, dt, A, B, C)
    torch.testing.assert_close(y, 2 * (h * C).sum(-1).real, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_selective_scan_with_constant_inputs_is_an_lti_system():
    """With dt, B and C the same everywhere, the scan is a convolution."""
    torch.manual_seed(0)
    l, d, n = 40, 3, 4
    x, dt = torch.randn(2, l, d, **F64), torch.rand(d, **F64)
    A, B, C = -torch.rand(d, n, **F64), torch.randn(n, **F64), torch.randn(n, **F64)
    powers = torch.exp(dt[:, None, None] * A[:, None] * torch.arange(l, **F64)[:, None])  # (d, l, n)
    kernel = (powers * B * C).sum(-1) * dt[:, None]
    y, _ = ops.selective_scan(x, dt.expand(2, l, d), A, B.expand(2, l, 1, n), C.expand(2, l, 1, n))
    torch.testing.assert_close(ops.fft_conv(x, kernel), y, rtol=1e-10, atol=1e-10)


@pytest.fixture
def trapezoidal_inputs():
    torch.manual_seed(0)
    b, l, h, p, r, g, n, s = 2, 90, 4, 3, 2, 2, 6, 2
    return {
        "x": torch.randn(b, l, h, p, **F64),
        "dt": F.softplus(torch.randn(b, l, h, **F64)),
        "A": -3 * torch.rand(b, l, h, **F64),
        "B": torch.randn(b, l, r, g, n, **F64),
        "C": torch.randn(b, l, r, g, n, **F64),
        "trap": torch.randn(b, l, h, **F64),
        "angles": torch.randn(b, l, s, **F64),
        "B_bias": torch.randn(h, r, n, **F64),
        "C_bias": torch.randn(h, r, n, **F64),
        "mimo_x": torch.randn(h, r, p, **F64),
    }


@pytest.mark.parametrize("backend", ["ssd", "reference"])
def test_trapezoidal_at_the_right_end_without_rotation_is_ssd(ssd_inputs, backend):
    """All weight on this token (`sigmoid(100)` is 1), no turn, one rank: Mamba-2's rule."""
    x, dt, A, B, C = ssd_inputs.values()
    b, l, h, _ = x.shape
    angles = torch.zeros(b, l, 2, **F64)
    inputs = (x, dt, A.expand(b, l, h), B.unsqueeze(2), C.unsqueeze(2), torch.full_like(dt, 100.0), angles)
    y, state = ops.trapezoidal(*inputs, backend=backend)
    y1, state1 = ops.ssd(**ssd_inputs)
    torch.testing.assert_close(y.squeeze(2), y1, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.ssm, state1, rtol=1e-11, atol=1e-11)


def test_trapezoidal_is_the_mean_of_two_rules(trapezoidal_inputs):
    """With a constant weight `w`, `w` times the rule of the right end plus `1 - w` times the left end's.

    The left end's rule is `ssd` with a token's input delayed by one and entering before the decay.
    """
    i = {k: v for k, v in trapezoidal_inputs.items() if k not in ("B_bias", "C_bias", "mimo_x")}
    i |= {"B": i["B"][:, :, :1], "C": i["C"][:, :, :1], "angles": torch.zeros_like(i["angles"])}
    A = i["A"][:1, :1].expand_as(i["A"])
    y, _ = ops.trapezoidal(**{**i, "A": A, "trap": torch.full_like(i["trap"], 0.3)})
    w = torch.sigmoid(torch.tensor(0.3, **F64))
    delayed, B = (F.pad(t, (*(t.dim() - 2) * (0, 0), 1, 0))[:, :-1] for t in (i["x"], i["B"][:, :, 0]))
    C, rate = i["C"][:, :, 0], A[0, 0]
    right = ops.ssd(i["x"], i["dt"], rate, i["B"][:, :, 0], C)[0]
    left = ops.ssd(delayed * torch.exp(i["dt"] * A)[..., None], i["dt"], rate, B, C)[0]
    torch.testing.assert_close(y.squeeze(2), w * right + (1 - w) * left, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("interleaved", [True, False])
def test_trapezoidal_has_complex_decays(trapezoidal_inputs, interleaved):
    """A state of complex numbers that itself turns by `pi tanh(angles) dt`, over inputs that do not.

    Pairs are cut out of B and C by indexing, products of pairs are real parts of complex ones.
    """
    i = trapezoidal_inputs
    b, l, h, p = i["x"].shape
    n, s = i["B"].shape[-1], i["angles"].shape[-1]
    first = torch.arange(s) * (2 if interleaved else 1)
    second = first + (1 if interleaved else n // 2)
    alone = torch.tensor([c for c in range(n) if c not in {*first.tolist(), *second.tolist()}])

    def complex_columns(vectors, bias):
        v = vectors.repeat_interleave(h // vectors.shape[3], dim=3) + bias.transpose(0, 1)  # (b, l, r, h, n)
        pairs = torch.complex(v[..., first], v[..., second])
        return torch.cat([pairs, v[..., alone].to(pairs.dtype)], -1)

    k, q = complex_columns(i["B"], i["B_bias"]), complex_columns(i["C"], i["C_bias"])
    turn = F.pad(torch.pi * torch.tanh(i["angles"]), (0, n - 2 * s))  # (b, l, s + n - 2 s)
    x, w = i["x"].unsqueeze(2) * i["mimo_x"].transpose(0, 1), torch.sigmoid(i["trap"])
    state = torch.zeros(b, h, p, s + n - 2 * s, dtype=torch.complex128)
    before, expected = torch.zeros_like(state), []
    for t in range(l):
        dt = i["dt"][:, t, :, None, None]
        # (u, v) turns to (u cos - v sin, u sin + v cos): by e^(i theta). Inputs turned on by theta_t, read by
        # outputs turned on likewise, are a state that turns back.
        decay = torch.exp(dt * torch.complex(i["A"][:, t, :, None, None], -turn[:, t, None, None]))
        now = torch.einsum("brhp,brhn->bhpn", x[:, t].to(k.dtype), k[:, t])
        share = w[:, t, :, None, None]
        state = decay * (state + (1 - share) * dt * before) + share * dt * now
        expected.append(torch.einsum("bhpn,brhn->brhp", state, q[:, t].conj()).real)
        before = now
    y, _ = ops.trapezoidal(**i, interleaved=interleaved)
    torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-10, atol=1e-10)


def test_a_turn_by_pi_counts_modulo_two():
    """Parity by hand: one pair, no decay, a step for every one that turns by pi; zeros stand still."""
    torch.manual_seed(0)
    bits = (torch.rand(3, 500) < 0.5).double()
    one = torch.ones(3, 500, 1, 1, 1, **F64)
    start = torch.cat([torch.ones(3, 1, **F64), torch.zeros(3, 499, **F64)], 1)
    y, _ = ops.trapezoidal(
        start[..., None, None],  # the first token writes
        torch.ones(3, 500, 1, **F64),
        torch.zeros(3, 500, 1, **F64),
        F.pad(one, (0, 1)),
        F.pad(one, (0, 1)),
        torch.full((3, 500, 1), 100.0, **F64),
        100 * bits[..., None],  # tanh(100) is 1
    )
    turns = bits.cumsum(1) - bits[:, :1]
    torch.testing.assert_close(y.flatten(1), 1 - 2 * (turns % 2), rtol=1e-9, atol=1e-9)
