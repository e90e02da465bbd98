"""Checks of module 1."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coursekit.exercises import Exercise, close

# ---------------------------------------------------------------------------------------------------------
# Discretisation

zoh = Exercise("m1-zoh", "zoh", "Zero-order hold of a diagonal system", stars=2, minutes=15)


def _modes(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps `(d,)`, stable diagonals `(d, n)` and inputs `(d, n)` in double precision."""
    d, n = 3, 5
    dt = torch.rand(d, generator=rng, dtype=torch.float64) + 0.05
    real, imaginary = torch.rand(2, d, n, generator=rng, dtype=torch.float64)
    A = torch.complex(-2 * real - 0.1, 6 * imaginary)
    B = torch.randn(d, n, generator=rng, dtype=torch.complex128)
    return dt, A, B


def _exact(dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One mode by the exponential of `[[a, b], [0, 0]]`: independent of any formula for the integral."""
    joint = torch.zeros(2, 2, dtype=torch.complex128)
    joint[0, 0], joint[0, 1] = a, b
    power = torch.linalg.matrix_exp(joint * dt)
    return power[0, 0], power[0, 1]


@zoh.part("agrees with the matrix exponential of the joint system", points=2)
def _(zoh, rng):
    dt, A, B = _modes(rng)
    Abar, Bbar = zoh(dt, A, B)
    expected = [[_exact(dt[i], A[i, j], B[i, j]) for j in range(A.shape[1])] for i in range(A.shape[0])]
    close(Abar, torch.stack([torch.stack([a for a, _ in row]) for row in expected]), "Abar", 1e-10)
    close(Bbar, torch.stack([torch.stack([b for _, b in row]) for row in expected]), "Bbar", 1e-10)


@zoh.part("two half steps are one step")
def _(zoh, rng):
    dt, A, B = _modes(rng)
    Abar, Bbar = zoh(dt, A, B)
    half_A, half_B = zoh(dt / 2, A, B)
    close(half_A * half_A, Abar, "Abar of two half steps", 1e-10)
    close(half_A * half_B + half_B, Bbar, "Bbar of two half steps", 1e-10)


@zoh.part("a mode with A = 0 integrates its input: Bbar = dt B")
def _(zoh, rng):
    dt, A, B = _modes(rng)
    A = A.clone()
    A[:, 0] = 0
    Abar, Bbar = zoh(dt, A, B)
    close(Abar[:, 0], torch.ones_like(B[:, 0]), "Abar at A = 0", 1e-12)
    close(Bbar[:, 0], dt * B[:, 0], "Bbar at A = 0", 1e-12)


zoh.wrong(
    "Euler's rule for B",
    """
import torch
def zoh(dt, A, B):
    return torch.exp(dt[:, None] * A), dt[:, None] * B
""",
)
zoh.wrong(
    "Euler's rule for A",
    """
import torch
def zoh(dt, A, B):
    dt = dt[:, None]
    A = torch.where(A == 0, 1e-9, A)
    return 1 + dt * A, B * (torch.exp(dt * A) - 1) / A
""",
)
zoh.wrong(
    "no limit at A = 0",
    """
import torch
def zoh(dt, A, B):
    dt = dt[:, None]
    return torch.exp(dt * A), B * (torch.exp(dt * A) - 1) / A
""",
)
zoh.wrong(
    "the bilinear rule",
    """
import torch
def zoh(dt, A, B):
    z = dt[:, None] * A
    return (2 + z) / (2 - z), 2 * dt[:, None] * B / (2 - z)
""",
)

bilinear = Exercise(
    "m1-bilinear", "bilinear", "The bilinear rule for a full matrix", stars=2, minutes=20, graded=True
)


def _dense(rng: torch.Generator) -> tuple[float, torch.Tensor, torch.Tensor]:
    n = 4
    A = torch.randn(n, n, generator=rng, dtype=torch.float64) - 2 * torch.eye(n, dtype=torch.float64)
    B = torch.randn(n, generator=rng, dtype=torch.float64)
    return 0.05 + 0.5 * torch.rand(1, generator=rng).item(), A, B


@bilinear.part("the step solves the trapezoid equation", points=3)
def _(bilinear, rng):
    dt, A, B = _dense(rng)
    Abar, Bbar = bilinear(dt, A, B)
    h = torch.randn(len(B), generator=rng, dtype=torch.float64)
    u = torch.randn(1, generator=rng, dtype=torch.float64)
    after = Abar @ h + Bbar * u
    close(after - h, dt * (A @ (h + after) / 2 + B * u), "h_t - h_{t-1}", 1e-10)


@bilinear.part("a rotation stays a rotation: for skew-symmetric A no length changes", points=1)
def _(bilinear, rng):
    dt, A, B = _dense(rng)
    Abar, _ = bilinear(dt, A - A.T, B)
    close(Abar.T @ Abar, torch.eye(len(B), dtype=torch.float64), "Abar^T Abar", 1e-10)


@bilinear.part("the error falls with the square of the step", points=1)
def _(bilinear, rng):
    _, A, B = _dense(rng)

    def error(dt: float) -> float:
        Abar, _ = bilinear(dt, A, B)
        return (
            (torch.linalg.matrix_power(Abar, round(0.4 / dt)) - torch.linalg.matrix_exp(0.4 * A))
            .abs()
            .max()
            .item()
        )

    ratio = error(0.02) / error(0.01)
    assert 3.5 < ratio < 4.5, f"half the step divides the error by {ratio:.2f}, expected about 4"


bilinear.wrong(
    "Euler, forwards",
    """
import torch
def bilinear(dt, A, B):
    return torch.eye(len(B), dtype=A.dtype) + dt * A, dt * B
""",
)
bilinear.wrong(
    "Euler, backwards",
    """
import torch
def bilinear(dt, A, B):
    inverse = torch.linalg.inv(torch.eye(len(B), dtype=A.dtype) - dt * A)
    return inverse, dt * inverse @ B
""",
)
bilinear.wrong(
    "elements instead of matrices",
    """
import torch
def bilinear(dt, A, B):
    z = dt * A
    return (2 + z) / (2 - z), dt * B
""",
)
bilinear.wrong(
    "B left as it is",
    """
import torch
def bilinear(dt, A, B):
    one = torch.eye(len(B), dtype=A.dtype)
    return torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A), dt * B
""",
)
bilinear.wrong(
    "the exponential",
    """
import torch
def bilinear(dt, A, B):
    Abar = torch.linalg.matrix_exp(dt * A)
    return Abar, torch.linalg.solve(A, (Abar - torch.eye(len(B), dtype=A.dtype)) @ B)
""",
)

# ---------------------------------------------------------------------------------------------------------
# Convolution

kernel = Exercise("m1-kernel", "kernel", "The kernel of a diagonal system by doubling", stars=2, minutes=15)


def _system(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Discrete diagonal systems `(d, n)` whose modes lie inside the circle."""
    d, n = 3, 4
    size, angle = torch.rand(2, d, n, generator=rng, dtype=torch.float64)
    Abar = torch.polar(0.7 + 0.29 * size, 3 * angle)
    return Abar, *torch.randn(2, d, n, generator=rng, dtype=torch.complex128)


def _impulse_response(Abar, Bbar, C, length: int) -> torch.Tensor:
    """The kernel by its meaning: what the loop answers to a one and zeros."""
    h, answer = Bbar, []
    for _ in range(length):
        answer.append(2 * (C * h).real.sum(-1))
        h = Abar * h
    return torch.stack(answer, dim=-1)


@kernel.part("is the answer of the recurrence to an impulse", points=2)
def _(kernel, rng):
    system = _system(rng)
    for length in (1, 2, 33, 64):
        close(
            kernel(*system, length),
            _impulse_response(*system, length),
            f"the kernel of length {length}",
            1e-10,
        )


@kernel.part("a longer kernel begins with the shorter one")
def _(kernel, rng):
    system = _system(rng)
    close(kernel(*system, 45)[:, :20], kernel(*system, 20), "the first 20 of 45 entries", 1e-12)
    assert kernel(*system, 45).shape == (3, 45), "a kernel of length 45 has another length"


kernel.wrong(
    "one power too late",
    """
import torch
def kernel(Abar, Bbar, C, length):
    powers = Abar[..., None] ** torch.arange(1, length + 1)
    return 2 * ((C * Bbar)[..., None] * powers).sum(1).real
""",
)
kernel.wrong(
    "the conjugates forgotten",
    """
import torch
def kernel(Abar, Bbar, C, length):
    powers = Abar[..., None] ** torch.arange(length)
    return ((C * Bbar)[..., None] * powers).sum(1).real
""",
)
kernel.wrong(
    "powers of two only",
    """
import torch
def kernel(Abar, Bbar, C, length):
    columns, power = Bbar[..., None], Abar
    while columns.shape[-1] < length:
        columns = torch.cat([columns, power[..., None] * columns], dim=-1)
        power = power * power
    return 2 * (C[..., None] * columns).sum(1).real
""",
)

fft_conv = Exercise(
    "m1-fft-conv", "causal_conv", "A causal convolution by FFT", stars=2, minutes=20, graded=True
)


def _signals(rng: torch.Generator, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    u = torch.randn(2, 37, 3, generator=rng, dtype=torch.float64)
    return u, torch.randn(3, width, generator=rng, dtype=torch.float64)


def _summed(u: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """The definition, term by term."""
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for s in range(min(t + 1, K.shape[1])):
            y[:, t] += K[:, s] * u[:, t - s]
    return y


@fft_conv.part("equals the sum that defines it", points=2)
def _(causal_conv, rng):
    u, K = _signals(rng, 37)
    close(causal_conv(u, K), _summed(u, K), "y", 1e-9)


@fft_conv.part("takes kernels shorter and longer than the sequence", points=1)
def _(causal_conv, rng):
    for width in (1, 5, 50):
        u, K = _signals(rng, width)
        close(causal_conv(u, K), _summed(u, K), f"y with a kernel of {width}", 1e-9)


@fft_conv.part("sees no future: a changed input changes no earlier output", points=1)
def _(causal_conv, rng):
    u, K = _signals(rng, 37)
    changed = u.clone()
    changed[:, 30:] += 5
    close(causal_conv(changed, K)[:, :30], causal_conv(u, K)[:, :30], "the outputs before the change", 1e-9)


@fft_conv.part("a later input gives the same output later", points=1)
def _(causal_conv, rng):
    u, K = _signals(rng, 37)
    late = torch.cat([torch.zeros_like(u[:, :6]), u[:, :-6]], dim=1)
    close(causal_conv(late, K)[:, 6:], causal_conv(u, K)[:, :-6], "the output of the later input", 1e-9)


fft_conv.wrong(
    "on a circle: no zeros behind the sequence",
    """
import torch
def causal_conv(u, K):
    n = u.shape[1]
    spectrum = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(K.T, n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)
""",
)
fft_conv.wrong(
    "a correlation",
    """
import torch
def causal_conv(u, K):
    n = u.shape[1] + K.shape[1]
    spectrum = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(K.flip(-1).T, n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.shape[1]]
""",
)
fft_conv.wrong(
    "a sum that begins one token late",
    """
import torch
def causal_conv(u, K):
    n = u.shape[1] + K.shape[1]
    spectrum = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(K.T, n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, 1 : u.shape[1] + 1]
""",
)
fft_conv.wrong(
    "a kernel scaled by the position",
    """
import torch
def causal_conv(u, K):
    n = u.shape[1] + K.shape[1]
    scale = torch.arange(1, u.shape[1] + 1)[None, :, None] / u.shape[1]
    spectrum = torch.fft.rfft(scale * u, n=n, dim=1) * torch.fft.rfft(K.T, n=n, dim=0)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, : u.shape[1]]
""",
)

# ---------------------------------------------------------------------------------------------------------
# The scan from scratch

selective_scan = Exercise(
    "m1-selective-scan", "selective_scan", "Mamba's scan, with a beginning", stars=1, minutes=15
)


def _tokens(rng: torch.Generator, length: int = 21) -> tuple[torch.Tensor, ...]:
    b, d, n = 2, 3, 4
    x = torch.randn(b, length, d, generator=rng, dtype=torch.float64)
    dt = torch.rand(b, length, d, generator=rng, dtype=torch.float64)
    A = -torch.rand(d, n, generator=rng, dtype=torch.float64) - 0.1
    B, C = torch.randn(2, b, length, n, generator=rng, dtype=torch.float64)
    return x, dt, A, B, C, torch.randn(b, d, n, generator=rng, dtype=torch.float64)


def _unrolled(x, dt, A, B, C, h):
    """The outputs as sums over all earlier tokens: no recurrence anywhere."""
    passed = dt.cumsum(1)  # (b, l, d)
    y = torch.einsum("bln,bldn,bdn->bld", C, torch.exp(passed[..., None] * A), h)
    for t in range(x.shape[1]):
        for s in range(t + 1):
            fade = torch.exp((passed[:, t] - passed[:, s])[..., None] * A)  # (b, d, n)
            y[:, t] += torch.einsum("bn,bdn,bn,bd->bd", C[:, t], fade, B[:, s], dt[:, s] * x[:, s])
    return y


@selective_scan.part("equals the sum over all earlier tokens", points=2)
def _(selective_scan, rng):
    inputs = _tokens(rng)
    close(selective_scan(*inputs)[0], _unrolled(*inputs), "y", 1e-10)


@selective_scan.part("two halves with the state carried over are the whole")
def _(selective_scan, rng):
    x, dt, A, B, C, h = _tokens(rng)
    y, last = selective_scan(x, dt, A, B, C, h)
    first, middle = selective_scan(x[:, :9], dt[:, :9], A, B[:, :9], C[:, :9], h)
    second, end = selective_scan(x[:, 9:], dt[:, 9:], A, B[:, 9:], C[:, 9:], middle)
    close(torch.cat([first, second], dim=1), y, "the outputs of the halves", 1e-10)
    close(end, last, "the state after the second half", 1e-10)


@selective_scan.part("a step of zero changes no state")
def _(selective_scan, rng):
    x, dt, A, B, C, h = _tokens(rng)
    close(selective_scan(x, 0 * dt, A, B, C, h)[1], h, "the state after tokens with dt = 0", 1e-12)


selective_scan.wrong(
    "the step left out of the input",
    """
import torch
def selective_scan(x, dt, A, B, C, h):
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + x[:, t, :, None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1), h
""",
)
selective_scan.wrong(
    "the state before forgotten",
    """
import torch
def selective_scan(x, dt, A, B, C, h):
    h, y = torch.zeros_like(h), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return torch.stack(y, dim=1), h
""",
)
selective_scan.wrong(
    "read before the token is written",
    """
import torch
def selective_scan(x, dt, A, B, C, h):
    y = []
    for t in range(x.shape[1]):
        y.append((h * C[:, t, None]).sum(-1))
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
    return torch.stack(y, dim=1), h
""",
)

parallel_scan = Exercise(
    "m1-parallel-scan", "parallel_scan", "A scan in rounds", stars=3, minutes=40, graded=True
)


class _Counted(TorchDispatchMode):
    """Counts the operations that PyTorch executes."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def _looped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def _steps(rng: torch.Generator, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = 2 * torch.rand(2, length, 3, generator=rng, dtype=torch.float64) - 1
    return a, torch.randn(2, length, 3, generator=rng, dtype=torch.float64)


@parallel_scan.part("equals the loop, for lengths that are no powers of two, too", points=2)
def _(parallel_scan, rng):
    for length in (1, 2, 7, 64, 100):
        a, b = _steps(rng, length)
        close(parallel_scan(a, b), _looped(a, b), f"the states of {length} tokens", 1e-10)


@parallel_scan.part("a decay of zero forgets")
def _(parallel_scan, rng):
    a, b = _steps(rng, 50)
    a[:, 20] = 0
    close(parallel_scan(a, b)[:, 20:], _looped(a[:, 20:], b[:, 20:]), "the states after the zero", 1e-10)


@parallel_scan.part("the number of operations grows with the logarithm of the length", points=2)
def _(parallel_scan, rng):
    counts = []
    for length in (256, 4096):
        with _Counted() as counted:
            parallel_scan(*_steps(rng, length))
        counts.append(counted.calls)
    more = counts[1] - counts[0]
    assert more <= 120, f"{counts[0]} operations for 256 tokens, {counts[1]} for 4,096: this is no logarithm"


@parallel_scan.part("leaves its inputs as they were")
def _(parallel_scan, rng):
    a, b = _steps(rng, 40)
    kept = a.clone(), b.clone()
    parallel_scan(a, b)
    close(a, kept[0], "a after the call", 0.0)
    close(b, kept[1], "b after the call", 0.0)


parallel_scan.wrong(
    "the loop",
    """
import torch
def parallel_scan(a, b):
    h, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)
""",
)
parallel_scan.wrong(
    "division by the product of the decays",
    """
import torch
def parallel_scan(a, b):
    product = a.cumprod(1)
    return product * (b / product).cumsum(1)
""",
)
parallel_scan.wrong(
    "the decays not combined",
    """
import torch
def parallel_scan(a, b):
    reach = 1
    while reach < b.shape[1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], dim=1)
        reach *= 2
    return b
""",
)
parallel_scan.wrong(
    "in place",
    """
import torch
def parallel_scan(a, b):
    reach = 1
    while reach < b.shape[1]:
        later, decay = a[:, reach:] * b[:, :-reach], a[:, reach:] * a[:, :-reach]
        b[:, reach:] += later
        a[:, reach:] = decay
        reach *= 2
    return b
""",
)
