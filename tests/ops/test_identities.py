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
