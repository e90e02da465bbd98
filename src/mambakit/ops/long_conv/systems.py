"""A discrete linear system seen through the powers of its state matrix.

`h_t = Abar h_{t-1} + Bbar u_t`, `y_t = C h_t` has the kernel `K_j = C Abar^j Bbar`. Write `j = q m + i`: from
the rows `C Abar^{q m}` and the `q` columns `Abar^i Bbar` the whole kernel is one matrix product per channel,
and both factors grow by doubling, `[X, Abar^{2^k} X]`, from the squarings `Abar, Abar^2, Abar^4, ...`. About
`2 sqrt(l)` vectors per channel exist, never `l` of them, and nothing loops over tokens. The same columns take
a chunk of `q` tokens to the state behind it.

States are complex with their conjugates implied; here they are real vectors of `2n` (real and imaginary part
of each mode side by side, so that complex views cost nothing), because real matrix products take the real
input directly. `Diagonal` (S4D) holds the powers as complex numbers, `Dense` (S4) as real `2n x 2n` matrices.
See MATH.md, sections 4 and 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


class System:
    """What both kinds of system share: everything that needs only products with powers.

    Args:
        transition: `Abar` in the subclass's own form.
        Bbar: Discrete input vectors `(d, n)`, complex.
        C: Output vectors `(d, n)`, complex.
        length: Tokens to come; chunks have the power of two `q` at or above its square root.
    """

    def __init__(self, transition: Tensor, Bbar: Tensor, C: Tensor, length: int) -> None:
        self.log_q = math.ceil(math.log2(length) / 2)
        self.q = 2**self.log_q
        self.chunks = -(-length // self.q)
        self.powers = [transition]  # Abar, Abar^2, Abar^4, ... as far as anyone has asked
        self.output = real_vector(2 * C.conj())[:, None]  # (d, 1, 2n): its product with h is 2 Re(C h)
        self.columns = self.widen(real_vector(Bbar)[:, None], self.log_q)

    def power(self, k: int) -> Tensor:
        """`Abar^{2^k}` in the subclass's own form."""
        while len(self.powers) <= k:
            self.powers.append(self.square(self.powers[-1]))
        return self.powers[k]

    def square(self, power: Tensor) -> Tensor:
        """The square of a power."""
        raise NotImplementedError(f"{type(self).__name__} does not define square")

    def advance(self, k: int, h: Tensor) -> Tensor:
        """`Abar^{2^k} h` for states `(d, ..., 2n)`."""
        raise NotImplementedError(f"{type(self).__name__} does not define advance")

    def observe(self, k: int, rows: Tensor) -> Tensor:
        """`c Abar^{2^k}` for output rows `c` `(d, ..., 2n)`."""
        raise NotImplementedError(f"{type(self).__name__} does not define observe")

    def widen(self, columns: Tensor, log_count: int) -> Tensor:
        """Grow `Abar^{q-1-i} Bbar`, what a chunk's tokens weigh in the state behind it, to `2^log_count`."""
        for k in range(columns.shape[1].bit_length() - 1, log_count):
            columns = torch.cat([self.advance(k, columns), columns], dim=1)
        return columns

    def kernel(self, length: int) -> Tensor:
        """`K_j = C Abar^j Bbar` for `j < length`, as `(d, length)`."""
        rows, k = self.output, self.log_q
        while rows.shape[1] * self.q < length:
            rows = torch.cat([rows, self.observe(k, rows)], dim=1)
            k += 1
        rows = rows[:, : -(-length // self.q)]
        return (rows @ self.columns.mT).flip(-1).flatten(1)[:, :length]

    def readout(self) -> Tensor:
        """`C Abar^{i+1}` for `i < q`, as `(d, q, 2n)`: what a chunk's tokens see of the state before it."""
        rows = self.observe(0, self.output)
        for k in range(self.log_q):
            rows = torch.cat([rows, self.observe(k, rows)], dim=1)
        return rows

    def entries(self, h: Tensor) -> Tensor:
        """`Abar^{q m} h` for every chunk `m`: states `(d, b, 2n)` to `(d, b, chunks, 2n)`."""
        h, k = h[:, :, None], self.log_q
        while h.shape[2] < self.chunks:
            h = torch.cat([h, self.advance(k, h)], dim=2)
            k += 1
        return h[:, :, : self.chunks]

    def total(self, k: int, h: Tensor) -> Tensor:
        """`sum_m Abar^{2^k (c - 1 - m)} h_m` over the chunks of `(d, b, c, 2n)`, in pairs: `(d, b, 2n)`."""
        while h.shape[2] > 1:
            if h.shape[2] % 2:
                h = F.pad(h, (0, 0, 1, 0))
            h = self.advance(k, h[:, :, 0::2]) + h[:, :, 1::2]
            k += 1
        return h[:, :, 0]

    def skip(self, steps: int, h: Tensor) -> Tensor:
        """`Abar^steps h` for states `(d, ..., 2n)`."""
        for k in range(steps.bit_length()):
            if steps >> k & 1:
                h = self.advance(k, h)
        return h


class Diagonal(System):
    """A system with one complex number per mode; `transition` is `(d, n)`, complex."""

    def square(self, power: Tensor) -> Tensor:
        """Square the numbers."""
        return power * power

    def advance(self, k: int, h: Tensor) -> Tensor:
        """Multiply by the power."""
        return _multiply(h, self.power(k))

    def observe(self, k: int, rows: Tensor) -> Tensor:
        """Multiply by the power; a row is held conjugated, so the power is too."""
        return _multiply(rows, self.power(k).conj())


class Dense(System):
    """A system with one real `2n x 2n` matrix per channel; `transition` is `(d, 2n, 2n)`."""

    def square(self, power: Tensor) -> Tensor:
        """Square the matrices."""
        return power @ power

    def advance(self, k: int, h: Tensor) -> Tensor:
        """Multiply by the power from the left."""
        return (h.flatten(1, -2) @ self.power(k).to(h.dtype).mT).view(h.shape)

    def observe(self, k: int, rows: Tensor) -> Tensor:
        """Multiply by the power from the right."""
        return (rows.flatten(1, -2) @ self.power(k).to(rows.dtype)).view(rows.shape)


def dense_transition(decay: Tensor, feedback: Tensor, probe: Tensor) -> Tensor:
    """Write `h -> decay h + feedback 2 Re<probe, h>` out as real matrices, by applying it to the basis.

    Args:
        decay: Diagonal part `(d, n)`, complex.
        feedback: Column factor of the rank-one part `(d, n)`, complex.
        probe: Row factor `(d, n)`, complex.

    Returns:
        Matrices `(d, 2n, 2n)` acting on column vectors.
    """
    n = decay.shape[1]
    basis = complex_vector(torch.eye(2 * n, dtype=decay.real.dtype, device=decay.device))  # (2n, n)
    read = 2 * (probe[:, None] * basis).real.sum(-1, keepdim=True)
    return real_vector(decay[:, None] * basis + feedback[:, None] * read).mT


def parameter_dtype(u: Tensor) -> torch.dtype:
    """Type in which powers are taken: float64, wherever the device has it.

    A relative error made in `Abar` is multiplied by the exponent, so float32 (and TF32 above all) would be
    felt after a thousand steps. Only tensors without batch and length pay for it.
    """
    return torch.float32 if u.device.type == "mps" else torch.float64


def real_vector(h: Tensor) -> Tensor:
    """Complex `(..., n)` as real `(..., 2n)`."""
    return torch.view_as_real(h.resolve_conj()).flatten(-2)


def complex_vector(h: Tensor) -> Tensor:
    """Real `(..., 2n)` as complex `(..., n)`."""
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)))


def _multiply(h: Tensor, factor: Tensor) -> Tensor:
    """Real `(d, ..., 2n)` times complex `(d, n)`, mode by mode."""
    z = complex_vector(h)
    return real_vector(z * factor.to(z.dtype).view(factor.shape[0], *[1] * (z.dim() - 2), -1))
