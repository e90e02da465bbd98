"""S4 as published: the kernel from its generating function at the roots of unity.

The truncated generating function `sum_{j<L} K_j z^j` at the `L`-th roots of unity is
`C~ (I - Abar z)^{-1} Bbar` with `C~ = C (I - Abar^L)`; an inverse FFT gives the kernel. The bilinear
transform turns the resolvent of `Abar` into that of `A`, Woodbury's identity turns that into four Cauchy
products `sum_n v_n / (g - A_n)`, and the pairs of conjugates are summed as real rational functions.

Differs from `chunked` only in how it gets the kernel. `C` is the true output vector here, so `C~` costs the
dense power `Abar^L` (squarings, `O(n^3 log L)` per channel), which is all that `chunked` needs: that is why
`chunked` is preferred. The paper avoids the power by training `C~` in place of `C`, at one fixed length.
See MATH.md, section 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambakit.ops.long_conv import chunked, discretisation, reference
from mambakit.ops.long_conv.systems import Dense, complex_vector, dense_transition


def s4_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cauchy-kernel form of `mambakit.ops.s4_conv`."""
    if u.shape[1] == 1:
        return reference.s4_conv(u, dt, A, P, B, C, D, initial_state, seq_idx)
    system = Cauchy(*chunked.wide(u, dt, A, P, B, C), u.shape[1])
    return chunked.run(u, system, D, initial_state, seq_idx)


class Cauchy(Dense):
    """An S4 system that takes its kernel from the generating function.

    Args:
        dt: Step sizes `(d,)`.
        A: Diagonal part `(d, n)`, complex.
        P: Low-rank factor `(d, n)`, complex.
        B: Input vectors `(d, n)`, complex.
        C: Output vectors `(d, n)`, complex.
        length: Tokens to come.
    """

    def __init__(self, dt: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> None:
        *transition, Bbar = discretisation.low_rank(dt, A, P, B)
        super().__init__(dense_transition(*transition), Bbar, C, length)
        self.continuous = dt, A, P, B

    def kernel(self, length: int) -> Tensor:
        """`K_j` for `j < length`, as `(d, length)`, by an inverse FFT of the generating function."""
        dt, A, P, B = self.continuous
        L = chunked.fast_length(length)
        row = self.output
        for k in range(L.bit_length()):
            if L >> k & 1:
                row = self.observe(k, row)
        C_tilde = complex_vector(self.output - row)[:, 0].conj() / 2

        # At z = exp(-2i theta), taking out 2 exp(-i theta) leaves sines and cosines, regular up to z = -1.
        theta = torch.arange(L // 2 + 1, device=dt.device, dtype=dt.dtype) * (math.pi / L)
        sin, cos = theta.sin(), theta.cos()
        half = dt[:, None] / 2
        pairs = torch.stack([C_tilde * B, C_tilde * P, P.conj() * B, P.conj() * P], dim=1)
        cb, cp, pb, pp = _cauchy(pairs, half * A, sin, cos).unbind(1)
        spectrum = half * (cb - half * cos * cp * pb / (1 + half * cos * pp)) * torch.complex(cos, sin)
        return torch.fft.irfft(spectrum, n=L)[:, :length]


def _cauchy(v: Tensor, a: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """`sum_n v_n / (i sin - a_n cos) + conj(v_n) / (i sin - conj(a_n) cos)`, `(d, r, n)` to `(d, r, L/2+1)`.

    The two fractions of a pair have the real numerator coefficients `2 Re v` and `-2 Re(v conj(a))` and the
    common denominator `(|a| cos)^2 - sin^2 - 2 i sin cos Re a`.
    """
    modulus, decay = a.abs()[..., None], a.real[..., None]
    re = (modulus * cos - sin) * (modulus * cos + sin)  # factored: resonances lie where it vanishes
    im = -2 * sin * cos * decay
    scale = 1 / (re * re + im * im)
    numerators = torch.cat([2 * v.real, -2 * (v * a[:, None].conj()).real], dim=1)  # (d, 2r, n)
    sums = torch.complex(numerators @ (re * scale), numerators @ (-im * scale))
    with_sin, with_cos = sums.chunk(2, 1)
    return 1j * sin * with_sin + cos * with_cos
