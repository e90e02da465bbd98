"""HiPPO-LegS and the initial state matrices of S4 and S4D.

HiPPO-LegS is the state matrix whose states are the coefficients of the input's whole history in Legendre
polynomials. It is not normal, so it cannot be diagonalised stably, but it is a normal matrix minus a rank-one
term, which a unitary change of basis turns into S4's `diag(A) - P P^*`. S4D keeps only the diagonal, or
replaces it by a formula with the same shape.

Everything is computed in float64 on the CPU, once, when a layer is initialised. Real systems of size `N` are
returned as the `N / 2` modes with positive imaginary part; the other half are their conjugates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NormalPlusLowRank(NamedTuple):
    """HiPPO-LegS in the basis where its normal part is diagonal.

    With `V` extended by its conjugate to the unitary `[V, conj(V)]`, and `A`, `P`, `B` likewise,
    `dense A = V (diag(A) - P P^*) V^*` and `dense B = V B`.

    Attributes:
        A: Eigenvalues of the normal part with positive imaginary part `(N/2,)`, complex, ascending.
        P: Low-rank factor `(N/2,)`, complex.
        B: Input vector `(N/2,)`, real and positive by the choice of phases, stored as complex.
        V: Eigenvectors `(N, N/2)`, complex.
    """

    A: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def legs(size: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: the real state matrix and input vector.

    `A[n, k] = -sqrt((2n+1) (2k+1))` for `n > k`, `-(n+1)` for `n = k`, else 0, and `B[n] = sqrt(2n+1)`: the
    normalised Legendre coefficients of the past, without the `1/t` that scales time in the original.

    Args:
        size: State size `N`.

    Returns:
        `A` of shape `(N, N)` and `B` of shape `(N,)`, float64.

    Raises:
        ValueError: `size` is not positive.

    Source:
        Gu, Dao, Ermon, Rudra and Re, "HiPPO" (2008.07669), theorem 2; Gu, Goel and Re, S4 (2111.00396),
        equation 2.
    """
    if size < 1:
        raise ValueError(f"the state size of HiPPO-LegS is {size}, expected at least 1")
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    return -torch.tril(torch.outer(root, root), -1) - torch.diag(n + 1), root


def legs_nplr(size: int) -> NormalPlusLowRank:
    """HiPPO-LegS as a diagonal matrix minus a rank-one term, by a unitary change of basis.

    `A + P P^T` with `P[n] = sqrt(n + 1/2)` is `-1/2 I` plus a skew-symmetric matrix, hence normal: its
    eigenvalues have real part `-1/2` exactly, and the Hermitian eigenproblem of the skew part finds the rest.

    Args:
        size: State size `N`, even.

    Returns:
        Eigenvalues, low-rank factor, input vector and eigenvectors, complex128. The phase of every
        eigenvector is chosen so that `B` is positive, which makes the result unique.

    Raises:
        ValueError: `size` is odd or not positive.

    Source:
        S4 (2111.00396), theorem 1 and appendix C.1; Goel, Gu, Donahue and Re, "It's Raw!" (2202.09729),
        section 4 for the form `A - P P^*`.
    """
    _half(size)
    A, B = legs(size)
    P = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(size, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)
    frequency, V = frequency[size // 2 :], V[:, size // 2 :]
    V = V * torch.sgn(V.mH @ B.to(V.dtype))
    return NormalPlusLowRank(
        torch.complex(torch.full_like(frequency, -0.5), frequency),
        V.mH @ P.to(V.dtype),
        V.mH @ B.to(V.dtype),
        V,
    )


def s4d_legs(size: int) -> tuple[Tensor, Tensor]:
    """S4D-LegS: the diagonal part of HiPPO-LegS, with half its input vector.

    The rank-one term is dropped. It feeds back the reconstruction of the newest input, and half the input
    vector makes up for that: as `N` grows, the states of both systems agree for any smooth input.

    Args:
        size: State size `N`, even.

    Returns:
        `A` and `B` of shape `(N/2,)`, complex128.

    Raises:
        ValueError: `size` is odd or not positive.

    Source:
        Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models"
        (2206.11893), section 4.
    """
    full = legs_nplr(size)
    return full.A, full.B / 2


def s4d_lin(size: int) -> tuple[Tensor, Tensor]:
    """S4D-Lin: `A[n] = -1/2 + i pi n`, `B[n] = 1`: damped Fourier modes.

    Args:
        size: State size `N`, even.

    Returns:
        `A` and `B` of shape `(N/2,)`, complex128.

    Raises:
        ValueError: `size` is odd or not positive.

    Source:
        S4D (2206.11893), section 4.
    """
    n = torch.arange(_half(size), dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n), torch.ones_like(n).to(torch.complex128)


def s4d_inv(size: int) -> tuple[Tensor, Tensor]:
    """S4D-Inv: `A[n] = -1/2 + i (N/pi) (N/(2n+1) - 1)`, `B[n] = 1`: the law that LegS's eigenvalues approach.

    Args:
        size: State size `N`, even.

    Returns:
        `A` and `B` of shape `(N/2,)`, complex128.

    Raises:
        ValueError: `size` is odd or not positive.

    Source:
        S4D (2206.11893), section 4.
    """
    n = torch.arange(_half(size), dtype=torch.float64)
    frequency = size / math.pi * (size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), frequency), torch.ones_like(n).to(torch.complex128)


def s4d_real(size: int) -> tuple[Tensor, Tensor]:
    """S4D-Real: `A[n] = -(n+1)`, `B[n] = 1`: pure decays, the diagonal of HiPPO-LegS.

    Mamba starts from these. As conjugate pairs they count twice; training may give them frequencies.

    Args:
        size: State size `N`, even.

    Returns:
        `A` and `B` of shape `(N/2,)`, complex128 with zero imaginary parts.

    Raises:
        ValueError: `size` is odd or not positive.

    Source:
        S4D (2206.11893), section 4.
    """
    n = torch.arange(_half(size), dtype=torch.float64)
    return torch.complex(-(n + 1), torch.zeros_like(n)), torch.ones_like(n).to(torch.complex128)


def _half(size: int) -> int:
    """Number of conjugate pairs in a real system."""
    if size < 2 or size % 2:
        raise ValueError(f"the state size is {size}, expected an even number: modes come in conjugate pairs")
    return size // 2
