"""Long convolutions and the linear time-invariant state space models behind them: S4D and S4.

A linear system with constant `A, B, C` is a convolution with its impulse response, so training needs no
recurrence: `s4d_conv` (diagonal `A`) and `s4_conv` (diagonal plus low rank, as HiPPO-LegS is) compute the
kernel once per call, share it over the batch and convolve by FFT; token by token they are the recurrence, and
their states join the two. `fft_conv` is the convolution alone. Selective scan and SSD differ in that their
step depends on the token, which rules out a fixed kernel. See MATH.md beside this file.

Files: `discretisation.py` (continuous to discrete), `systems.py` (kernels from powers), `reference.py`
(recurrences), `chunked.py` (convolutions with states), `cauchy.py` (S4's published kernel algorithm).
"""

from __future__ import annotations

import math

from torch import Tensor

from mambakit.config import unknown
from mambakit.ops import shapes
from mambakit.ops.dispatch import Op
from mambakit.ops.long_conv import cauchy, chunked, reference

DISCRETIZATIONS = ("zoh", "bilinear")
"""The rules by which `s4d_conv` turns continuous time into steps."""


def _conv_flops(u: Tensor, *_: object) -> int:
    # A real transform of n points takes 2.5 n log2(n); the product 6 per complex number. The kernel's own
    # transform is one in b and left out.
    n = 2 * u.shape[1]
    return int(u.shape[0] * u.shape[2] * (5 * n * math.log2(n) + 3 * n))


def _system_flops(u: Tensor, dt: Tensor, A: Tensor, *_: object) -> int:
    # The convolution, the kernel's product of rows and columns, and the final state.
    length, n = u.shape[1], A.shape[1]
    return _conv_flops(u) + 4 * A.shape[0] * length * n + 4 * u.numel() * n


_fft_conv = Op("fft_conv", {"chunked": chunked, "reference": reference}, flops=_conv_flops)
_s4d_conv = Op("s4d_conv", {"chunked": chunked, "reference": reference}, flops=_system_flops)
_s4_conv = Op("s4_conv", {"chunked": chunked, "cauchy": cauchy, "reference": reference}, flops=_system_flops)


def fft_conv(u: Tensor, k: Tensor, D: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolve every channel with its own long kernel, causally.

    `y_t = sum_{s=0}^{min(t, w-1)} k_s u_{t-s} + D u_t`: a convolution (the kernel runs backwards over the
    past), not the cross-correlation that deep learning libraries call one; what lies before the sequence is
    zero. Through the FFT, an output also carries roundings of later inputs, about `1e-7` of the largest in
    float32.

    Args:
        u: Inputs `(b, l, d)`, real.
        k: Kernels `(d, w)`, real, `k[:, 0]` at lag zero; taps beyond the sequence are ignored.
        D: Skip weights `(d,)`.
        backend: `"chunked"` (FFT) or `"reference"`; chosen automatically by default.

    Returns:
        Outputs `(b, l, d)` in the type of `u`, computed in float32 or wider.

    Raises:
        ValueError: Shapes that do not fit, an empty sequence, or an unknown backend.

    Source:
        Gu, Johnson, Goel et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear
        State-Space Layers" (2110.13985), section 3.2; Cooley and Tukey (1965).
    """
    shapes.check("fft_conv", u=(u, "b l d"), k=(k, "d w"), D=(D, "d"))
    return _fft_conv(u, k, D, backend=backend)


def s4d_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    discretization: str = "zoh",
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one diagonal state space model per channel over a sequence (S4D).

    With `z = dt A`, and each of the `n` modes standing for itself and its complex conjugate:

        h_t = Abar h_{t-1} + Bbar u_t                    y_t = 2 Re(sum_n C_n h_{t,n}) + D u_t
        zoh:       Abar = exp(z)                         Bbar = dt B (exp(z) - 1) / z
        bilinear:  Abar = (1 + z/2) / (1 - z/2)          Bbar = dt B / (1 - z/2)

    Args:
        u: Inputs `(b, l, d)`, real.
        dt: Step sizes `(d,)`, positive, in the time unit of `1 / A`.
        A: Diagonal state matrices `(d, n)`, complex, real part negative for a stable system.
        B: Input vectors `(d, n)`, complex.
        C: Output vectors `(d, n)`, complex.
        D: Skip weights `(d,)`, real.
        initial_state: State before the first token `(b, d, n)`, complex; differentiable.
        discretization: `"zoh"` or `"bilinear"`.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: `"chunked"` or `"reference"`; chosen automatically by default.

    Returns:
        Outputs `(b, l, d)` in the type of `u`, and the final state `(b, d, n)` in complex64 (complex128 for
        float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, a state that is not complex, an unknown discretization or
            backend, or an empty sequence.

    Source:
        Gu, Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models"
        (2206.11893), sections 3.1 and 3.2.
    """
    vectors = {name: (t, "d n") for name, t in (("A", A), ("B", B), ("C", C))}
    _check("s4d_conv", u, dt, D, vectors, initial_state, state, seq_idx)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"s4d_conv: {unknown('discretization', discretization, DISCRETIZATIONS)}")
    return _s4d_conv(u, dt, A, B, C, D, initial_state, seq_idx, discretization, state=state, backend=backend)


def s4_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one state space model with a diagonal-plus-low-rank state matrix per channel over a sequence (S4).

    The state matrix is `M = diag(A) - P P^*` over the `n` modes and their complex conjugates, discretised by
    the bilinear transform:

        (I - dt/2 M) h_t = (I + dt/2 M) h_{t-1} + dt B u_t          y_t = 2 Re(sum_n C_n h_{t,n}) + D u_t

    `C` is the true output vector, not the length-dependent `C (I - Abar^L)` that some implementations train,
    so one set of parameters serves every length, and convolution and recurrence are the same function.

    Args:
        u: Inputs `(b, l, d)`, real.
        dt: Step sizes `(d,)`, positive, in the time unit of `1 / A`.
        A: Diagonal part `(d, n)`, complex, real part negative; with `- P P^*` it can only become more stable.
        P: Low-rank factor `(d, n)`, complex.
        B: Input vectors `(d, n)`, complex.
        C: Output vectors `(d, n)`, complex.
        D: Skip weights `(d,)`, real.
        initial_state: State before the first token `(b, d, n)`, complex; differentiable.
        state: The same as `initial_state`, overwritten in place with the final state (inference).
        seq_idx: Document number of each token `(b, l)`, integers; the initial state belongs to the first
            document of each row.
        backend: `"chunked"` (kernel from dense powers), `"cauchy"` (kernel from the generating function, as
            published) or `"reference"`; chosen automatically by default.

    Returns:
        Outputs `(b, l, d)` in the type of `u`, and the final state `(b, d, n)` in complex64 (complex128 for
        float64 inputs).

    Raises:
        ValueError: Shapes that do not fit, a state that is not complex, an unknown backend, or an empty
            sequence.

    Source:
        Gu, Goel and Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2111.00396),
        section 3 and appendix C; the form `A - P P^*` from Goel, Gu, Donahue and Re, "It's Raw!"
        (2202.09729), section 4.
    """
    vectors = {name: (t, "d n") for name, t in (("A", A), ("P", P), ("B", B), ("C", C))}
    _check("s4_conv", u, dt, D, vectors, initial_state, state, seq_idx)
    return _s4_conv(u, dt, A, P, B, C, D, initial_state, seq_idx, state=state, backend=backend)


def _check(
    op: str,
    u: Tensor,
    dt: Tensor,
    D: Tensor | None,
    vectors: dict[str, tuple[Tensor, str]],
    initial_state: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    states = {"initial_state": initial_state, "state": state}
    shapes.check(
        op,
        u=(u, "b l d"),
        dt=(dt, "d"),
        **vectors,
        D=(D, "d"),
        seq_idx=(seq_idx, "b l"),
        **{name: (h, "b d n") for name, h in states.items()},
    )
    for name, h in states.items():
        if h is not None and not h.is_complex():
            raise ValueError(f"{op}: {name} is {h.dtype}, expected a complex type such as torch.complex64")
