"""Checks of module 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coursekit.exercises import Exercise, close


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor made inside it holds; views hold none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, size)
        return result


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers in double precision."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def uniform(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Numbers between 0 and 1 in double precision."""
    return torch.rand(*shape, generator=rng, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------
# Structured matrices

toeplitz = Exercise("m2-toeplitz", "toeplitz", "A Toeplitz product by FFT", stars=2, minutes=20)


@toeplitz.part("equals the dense product", points=2)
def _(toeplitz, rng):
    l = 37
    column, row, x = normal(rng, l), normal(rng, l), normal(rng, l)
    row[0] = column[0]
    M = torch.stack(
        [torch.stack([column[i - j] if i >= j else row[j - i] for j in range(l)]) for i in range(l)]
    )
    close(toeplitz(column, row, x), M @ x, "M x", 1e-10)


@toeplitz.part("nothing wraps around: a lower triangular matrix is causal")
def _(toeplitz, rng):
    column, x = normal(rng, 20), normal(rng, 20)
    row = torch.zeros(20, dtype=torch.float64)
    row[0] = column[0]
    changed = x.clone()
    changed[12:] += 10
    close(toeplitz(column, row, changed)[:12], toeplitz(column, row, x)[:12], "the first 12 outputs", 1e-10)


@toeplitz.part("no tensor of l x l numbers")
def _(toeplitz, rng):
    column, x = normal(rng, 4096), normal(rng, 4096)
    with Largest() as seen:
        toeplitz(column, column, x)
    assert seen.numbers <= 16 * 4096, f"a tensor of {seen.numbers} numbers was made, for 4096 tokens"


toeplitz.wrong(
    "a transform too short, so that it wraps around",
    """
import torch
def toeplitz(column, row, x):
    return torch.fft.irfft(torch.fft.rfft(column) * torch.fft.rfft(x), n=len(x))
""",
)
toeplitz.wrong(
    "the row not reversed",
    """
import torch
def toeplitz(column, row, x):
    l = len(x)
    circle = torch.cat([column, column.new_zeros(1), row[1:]])
    return torch.fft.irfft(torch.fft.rfft(circle) * torch.fft.rfft(x, n=2 * l), n=2 * l)[:l]
""",
)
toeplitz.wrong(
    "the matrix written out",
    """
import torch
def toeplitz(column, row, x):
    lag = torch.arange(len(x))[:, None] - torch.arange(len(x))
    return torch.where(lag >= 0, column[lag.clamp(min=0)], row[(-lag).clamp(min=0)]) @ x
""",
)

causal_product = Exercise("m2-causal-low-rank", "causal_product", "Causal and low rank", stars=2, minutes=15)


@causal_product.part("equals the masked product", points=2)
def _(causal_product, rng):
    C, B, X = normal(rng, 40, 3), normal(rng, 40, 3), normal(rng, 40, 5)
    close(causal_product(C, B, X), (C @ B.T).tril() @ X, "tril(C B^T) X", 1e-10)


@causal_product.part("a token sees itself")
def _(causal_product, rng):
    C, B, X = normal(rng, 1, 3), normal(rng, 1, 3), normal(rng, 1, 5)
    close(causal_product(C, B, X), (C @ B.T) * X, "the first row", 1e-12)


@causal_product.part("no tensor of l x l or l x n x p numbers")
def _(causal_product, rng):
    l, n, p = 600, 24, 24
    C, B, X = normal(rng, l, n), normal(rng, l, n), normal(rng, l, p)
    with Largest() as seen:
        causal_product(C, B, X)
    assert seen.numbers <= 2 * l * (n + p), f"a tensor of {seen.numbers} numbers was made"


causal_product.wrong(
    "no mask",
    """
import torch
def causal_product(C, B, X):
    return C @ (B.T @ X)
""",
)
causal_product.wrong(
    "the past without the token itself",
    """
import torch
def causal_product(C, B, X):
    return (C @ B.T).tril(-1) @ X
""",
)
causal_product.wrong(
    "all states at once",
    """
import torch
def causal_product(C, B, X):
    return torch.einsum("ln,lnp->lp", C, torch.einsum("ln,lp->lnp", B, X).cumsum(0))
""",
)

# ---------------------------------------------------------------------------------------------------------
# Semiseparable matrices

segsum = Exercise("m2-segsum", "segsum", "Segment sums", stars=1, minutes=10)


@segsum.part("sums of the right segments", points=2)
def _(segsum, rng):
    log_a = -uniform(rng, 9)
    expected = torch.full((9, 9), -torch.inf, dtype=torch.float64)
    for i in range(9):
        for j in range(i + 1):
            expected[i, j] = log_a[j + 1 : i + 1].sum()
    got = segsum(log_a)
    assert got.shape == (9, 9), f"the result has shape {tuple(got.shape)}, expected (9, 9)"
    assert bool((got.triu(1).exp().triu(1) == 0).all()), (
        "above the diagonal there is something else than -inf"
    )
    close(got.tril().nan_to_num(neginf=99.0), expected.tril().nan_to_num(neginf=99.0), "a sum", 1e-12)


@segsum.part("any leading dimensions")
def _(segsum, rng):
    log_a = -uniform(rng, 2, 3, 7)
    close(segsum(log_a)[1, 2].exp(), segsum(log_a[1, 2]).exp(), "one of the batch", 1e-12)


@segsum.part("as many digits as float32 has, over 2,000 tokens", points=2)
def _(segsum, rng):
    log_a = -uniform(rng, 2000)
    got = segsum(log_a.float())[-20:, -20:].double()
    for i in range(20):
        for j in range(i + 1):
            exact = log_a.float().double()[1980 + j + 1 : 1980 + i + 1].sum()
            off = (got[i, j] - exact).abs().item()
            assert off < 1e-5, f"the sum of {i - j} numbers is off by {off:.1e}"


segsum.wrong(
    "a difference of running sums",
    """
import torch
def segsum(log_a):
    s = log_a.cumsum(-1)
    out = s[..., :, None] - s[..., None, :]
    return out.masked_fill(~torch.ones(out.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
""",
)
segsum.wrong(
    "the first decay counted, too",
    """
import torch
def segsum(log_a):
    l = log_a.shape[-1]
    ones = torch.ones(l, l, dtype=torch.bool)
    terms = log_a[..., :, None].expand(*log_a.shape, l).masked_fill(~ones.tril(), 0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)
""",
)
segsum.wrong(
    "zeros above the diagonal",
    """
import torch
def segsum(log_a):
    l = log_a.shape[-1]
    ones = torch.ones(l, l, dtype=torch.bool)
    return log_a[..., :, None].expand(*log_a.shape, l).masked_fill(~ones.tril(-1), 0).cumsum(-2)
""",
)
segsum.wrong(
    "one sequence only",
    """
import torch
def segsum(log_a):
    l = log_a.shape[0]
    ones = torch.ones(l, l, dtype=torch.bool)
    terms = log_a[:, None].expand(l, l).masked_fill(~ones.tril(-1), 0)
    return terms.cumsum(0).masked_fill(~ones.tril(), -torch.inf)
""",
)

matrix = Exercise("m2-matrix", "matrix", "The matrix of any SSM", stars=2, minutes=20, graded=True)


def _generators(rng: torch.Generator, l: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices `(l, n, n)` and vectors `(l, n)`, twice."""
    return 0.6 * normal(rng, l, n, n), normal(rng, l, n), normal(rng, l, n)


def _run(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The recurrence itself, on one channel."""
    h, y = torch.zeros_like(B[0]), []
    for A_t, B_t, C_t, x_t in zip(A, B, C, x, strict=True):
        h = A_t @ h + B_t * x_t
        y.append(C_t @ h)
    return torch.stack(y)


@matrix.part("its product with an input is the recurrence", points=3)
def _(matrix, rng):
    A, B, C = _generators(rng, 14, 3)
    x = normal(rng, 14)
    close(matrix(A, B, C) @ x, _run(A, B, C, x), "M x", 1e-9)


@matrix.part("zeros above the diagonal")
def _(matrix, rng):
    M = matrix(*_generators(rng, 14, 3))
    close(M.triu(1), torch.zeros(14, 14, dtype=torch.float64), "the part above the diagonal", 1e-15)


@matrix.part("blocks below the diagonal have rank n")
def _(matrix, rng):
    M = matrix(*_generators(rng, 16, 3))
    assert M.shape == (16, 16), f"the matrix has shape {tuple(M.shape)}, expected (16, 16)"
    values = torch.linalg.svdvals(M[8:, :8])
    found = int((values > 1e-9 * values[0]).sum())
    assert found == 3, f"rows from 8, columns before 8: rank {found}, expected 3"


matrix.wrong(
    "products in the wrong order",
    """
import torch
def matrix(A, B, C):
    l = len(B)
    M = B.new_zeros(l, l)
    for j in range(l):
        P = torch.eye(B.shape[1], dtype=B.dtype)
        for i in range(j, l):
            if i > j:
                P = P @ A[i]
            M[i, j] = C[i] @ P @ B[j]
    return M
""",
)
matrix.wrong(
    "one decay too many",
    """
import torch
def matrix(A, B, C):
    l = len(B)
    M = B.new_zeros(l, l)
    for j in range(l):
        h = B[j]
        for i in range(j, l):
            h = A[i] @ h
            M[i, j] = C[i] @ h
    return M
""",
)
matrix.wrong(
    "no mask",
    """
import torch
def matrix(A, B, C):
    l = len(B)
    M = C @ B.T
    for j in range(l):
        h = B[j]
        for i in range(j + 1, l):
            h = A[i] @ h
            M[i, j] = C[i] @ h
    return M
""",
)
matrix.wrong(
    "no decay, entry by entry random",
    """
import torch
def matrix(A, B, C):
    return ((C @ B.T) * A[:, :1, 0].cos() + torch.sin(C[:, :1] * B[:, 0])).tril()
""",
)

parallel = Exercise("m2-parallel", "parallel", "The sum of two models", stars=2, minutes=15)


@parallel.part("its outputs are the sum of the two", points=2)
def _(parallel, rng):
    first, second = _generators(rng, 10, 2), _generators(rng, 10, 3)
    x = normal(rng, 10)
    close(_run(*parallel(first, second), x), _run(*first, x) + _run(*second, x), "the sum", 1e-9)


@parallel.part("a state of n1 + n2 numbers")
def _(parallel, rng):
    A, B, C = parallel(_generators(rng, 6, 2), _generators(rng, 6, 3))
    assert (A.shape, B.shape, C.shape) == ((6, 5, 5), (6, 5), (6, 5)), (
        f"shapes {tuple(A.shape)}, {tuple(B.shape)}, {tuple(C.shape)}, expected (6, 5, 5), (6, 5), (6, 5)"
    )


parallel.wrong(
    "generators added",
    """
import torch
def parallel(first, second):
    n = first[1].shape[1]
    return tuple(a + b[..., :n] if a.dim() == 2 else a + b[:, :n, :n]
                 for a, b in zip(first, second))
""",
)
parallel.wrong(
    "the two in a row",
    """
import torch
def parallel(first, second):
    (A1, B1, C1), (A2, B2, C2) = first, second
    l, n1, n2 = len(B1), B1.shape[1], B2.shape[1]
    A = A1.new_zeros(l, n1 + n2, n1 + n2)
    A[:, :n1, :n1], A[:, n1:, n1:] = A1, A2
    A[:, n1:, :n1] = B2[:, :, None] * C1[:, None, :]
    return A, torch.cat([B1, 0 * B2], 1), torch.cat([0 * C1, C2], 1)
""",
)

# ---------------------------------------------------------------------------------------------------------
# Duality

crossing = Exercise("m2-crossing", "crossing", "Where the forms meet", stars=1, minutes=10)


@crossing.part("at that length the recurrence costs less, one token earlier it does not", points=2)
def _(crossing, rng):
    for n, p in [(1, 1), (7, 7), *torch.randint(1, 300, (40, 2), generator=rng).tolist()]:
        l = crossing(n, p)
        assert isinstance(l, int), f"the length is {l!r}, expected a whole number"
        assert l * l * (n + p + 1) > 3 * l * n * p, f"n={n}, p={p}: attention still costs less at {l}"
        l -= 1
        assert l * l * (n + p + 1) <= 3 * l * n * p, f"n={n}, p={p}: the recurrence costs less at {l} already"


@crossing.part("n and p may change places")
def _(crossing, rng):
    assert crossing(16, 64) == crossing(64, 16) == 48 * 64 // 81 + 1, (
        f"16 states and 64 channels: {crossing(16, 64)}, the other way {crossing(64, 16)}"
    )


crossing.wrong("equal cost counts as less", "def crossing(n, p):\n    return -(-3 * n * p // (n + p + 1))\n")
crossing.wrong("the mask forgotten", "def crossing(n, p):\n    return 3 * n * p // (n + p) + 1\n")
crossing.wrong("the state alone", "def crossing(n, p):\n    return n\n")

attend = Exercise("m2-normalised", "attend", "Normalised, in pieces", stars=3, minutes=30, graded=True)


def _positive(rng: torch.Generator, l: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys `(l, 4)`, positive, and values `(l, 3)`."""
    return uniform(rng, l, 4) + 0.05, uniform(rng, l, 4) + 0.05, normal(rng, l, 3)


@attend.part("equals the masked attention", points=2)
def _(attend, rng):
    q, k, v = _positive(rng, 30)
    weights = (q @ k.T).tril()
    close(attend(q, k, v)[0], weights / weights.sum(1, keepdim=True) @ v, "the outputs", 1e-10)


@attend.part("weights sum to one: equal values come back")
def _(attend, rng):
    q, k, v = _positive(rng, 20)
    close(attend(q, k, v[:1].expand(20, 3))[0], v[:1].expand(20, 3), "the outputs", 1e-10)


@attend.part("in pieces the same", points=2)
def _(attend, rng):
    q, k, v = _positive(rng, 30)
    whole, end = attend(q, k, v)
    first, state = attend(q[:11], k[:11], v[:11])
    second, state = attend(q[11:], k[11:], v[11:], state)
    close(torch.cat([first, second]), whole, "the outputs in two pieces", 1e-10)
    close(state, end, "the state at the end", 1e-10)


@attend.part("the state is n (p + 1) numbers and no square is made")
def _(attend, rng):
    q, k, v = _positive(rng, 300)
    with Largest() as seen:
        _, state = attend(q, k, v)
    assert state.numel() == 16, f"the state has {state.numel()} numbers, expected 4 (3 + 1)"
    assert seen.numbers <= 300 * 16, f"a tensor of {seen.numbers} numbers was made"


attend.wrong(
    "no denominator",
    """
import torch
def attend(q, k, v, state=None):
    w = (q @ k.T).tril()
    return w @ v, torch.zeros(4, 4)
""",
)
attend.wrong(
    "the denominator not carried",
    """
import torch
def attend(q, k, v, state=None):
    S = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype) if state is None else state
    z = torch.zeros(k.shape[1], dtype=v.dtype)
    rows = []
    for a, b, c in zip(q, k, v):
        S = S + torch.outer(b, c)
        z = z + b
        rows.append((a @ S) / (a @ z))
    return torch.stack(rows), S
""",
)
attend.wrong(
    "softmax",
    """
import torch
def attend(q, k, v, state=None):
    s = q @ k.T
    mask = torch.ones(s.shape, dtype=torch.bool).tril()
    return s.masked_fill(~mask, -torch.inf).softmax(-1) @ v, torch.cat([k, v], 1)
""",
)

retention = Exercise("m2-retention", "retention", "RetNet in Mamba-2's words", stars=1, minutes=10)


def _retained(retention: Any, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The matrix of each head `(h, l, l)` by the reader's step and rate, and queries, keys, decays."""
    from mambakit import ops

    gamma, l = uniform(rng, 3) * 0.5 + 0.5, 12
    B, C = normal(rng, 1, l, 1, 4), normal(rng, 1, l, 1, 4)
    dt, A = retention(gamma, l)
    unit = torch.eye(l, dtype=torch.float64)[None, :, None].expand(1, l, 3, l)
    y, _ = ops.ssd(unit, dt, A, B, C, backend="reference")
    return y[0].transpose(0, 1), C[0, :, 0], B[0, :, 0], gamma


@retention.part("weights fall by gamma for each token", points=2)
def _(retention, rng):
    M, C, B, gamma = _retained(retention, rng)
    lag = torch.arange(12)[:, None] - torch.arange(12)
    expected = torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp(min=0), 0.0) * (C @ B.T)
    close(M, expected, "the matrix", 1e-10)


@retention.part("a token reads itself with the weight 1")
def _(retention, rng):
    M, C, B, _ = _retained(retention, rng)
    close(M.diagonal(dim1=1, dim2=2), (C * B).sum(-1).expand(3, -1), "the diagonal", 1e-10)


retention.wrong(
    "the decay in the step",
    """
import torch
def retention(gamma, length):
    return -torch.log(gamma).expand(1, length, len(gamma)), -torch.ones_like(gamma)
""",
)
retention.wrong(
    "gamma instead of its logarithm",
    """
import torch
def retention(gamma, length):
    return torch.ones(1, length, len(gamma), dtype=gamma.dtype), -gamma
""",
)

# ---------------------------------------------------------------------------------------------------------
# Mamba-2

state_numbers = Exercise("m2-state-numbers", "state_numbers", "How much does it carry?", stars=1, minutes=10)


def _block(rng: torch.Generator, **settings: int) -> Any:
    """A block of the library in double precision, its weights drawn."""
    from mambakit import layers

    block = layers.Mamba2(settings.pop("d_model"), layers.Mamba2Config(**settings)).double()
    with torch.no_grad():
        for name, weight in sorted(block.named_parameters()):
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
            weight.copy_(scale * normal(rng, *weight.shape) + (name == "norm.weight"))
    return block


@state_numbers.part("counts what the library keeps", points=2)
def _(state_numbers, rng):
    for n, p, g, w, expand in ((16, 8, 1, 4, 2), (64, 16, 2, 3, 2), (8, 32, 4, 2, 4)):
        block = _block(rng, d_model=64, d_state=n, headdim=p, ngroups=g, d_conv=w, expand=expand)
        expected = sum(tensor.numel() for tensor in block.init_state(1).values())
        found = state_numbers(64, n, p, g, w, expand)
        assert found == expected, f"n={n}, p={p}, g={g}, w={w}, expand={expand}: {found}, expected {expected}"


@state_numbers.part("the head size does not matter")
def _(state_numbers, rng):
    a, b = (state_numbers(256, 128, p, 1, 4, 2) for p in (32, 64))
    assert a == b == 3 * (512 + 256) + 512 * 128, f"{a} numbers with heads of 32 channels and {b} with 64"


state_numbers.wrong(
    "the convolution forgotten",
    "def state_numbers(d_model, n, p, g, w, expand):\n    return expand * d_model * n\n",
)
state_numbers.wrong(
    "a state per head only",
    "def state_numbers(d_model, n, p, g, w, expand):\n"
    "    d = expand * d_model\n    return (w - 1) * (d + 2 * g * n) + d // p * n\n",
)
state_numbers.wrong(
    "all taps kept",
    "def state_numbers(d_model, n, p, g, w, expand):\n"
    "    d = expand * d_model\n    return w * (d + 2 * g * n) + d * n\n",
)

step = Exercise("m2-step", "step", "One token of Mamba-2", stars=3, minutes=40, graded=True)


def _decode(step: Any, block: Any, u: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """Outputs token by token by the reader's function, the library's state, and the reader's."""
    weights = {name: weight.detach() for name, weight in block.named_parameters()}
    state = block.init_state(len(u), dtype=torch.float64)
    conv, ssm, rows = torch.zeros_like(state["conv"]), torch.zeros_like(state["ssm"]), []
    for token in u.unbind(1):
        y, conv, ssm = step(token, weights, conv, ssm)
        rows.append(y)
    return torch.stack(rows, dim=1), state, conv, ssm


def _whole(block: Any, u: torch.Tensor, state: Any) -> torch.Tensor:
    from mambakit import ops

    with ops.backend("reference"), torch.no_grad():
        return block(u, state)


@step.part("token by token the outputs of the layer", points=3)
def _(step, rng):
    block, u = _block(rng, d_model=16, d_state=8, headdim=8), normal(rng, 2, 9, 16)
    y, state, _, _ = _decode(step, block, u)
    close(y, _whole(block, u, state), "the outputs", 1e-9)


@step.part("groups of heads", points=2)
def _(step, rng):
    block, u = _block(rng, d_model=16, d_state=4, headdim=4, ngroups=2), normal(rng, 2, 9, 16)
    y, state, _, _ = _decode(step, block, u)
    close(y, _whole(block, u, state), "the outputs", 1e-9)


@step.part("both states are right at the end")
def _(step, rng):
    block, u = _block(rng, d_model=16, d_state=8, headdim=8), normal(rng, 2, 5, 16)
    _, state, conv, ssm = _decode(step, block, u)
    _whole(block, u, state)
    close(conv, state["conv"], "the convolution's state", 1e-9)
    close(ssm, state["ssm"], "the recurrence's state", 1e-9)


def _variant(*changes: tuple[str, str]) -> str:
    """The block's step with one group, or with more if it is told, and mistakes put in."""
    code = """
import torch
from torch.nn import functional as F
def step(u, w, conv, ssm):
    b, h, p, n = ssm.shape
    d = h * p
    g = (conv.shape[-1] - d) // (2 * n)
    z, xBC, dt = (u @ w["in_proj.weight"].T).split((d, conv.shape[-1], h), -1)
    window = torch.cat([conv, xBC[:, None]], 1)
    xBC = F.silu((window * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"])
    x, B, C = xBC.split((d, g * n, g * n), -1)
    B, C = (t.view(b, g, n).repeat_interleave(h // g, 1) for t in (B, C))
    x, dt = x.view(b, h, p), F.softplus(dt + w["dt_bias"])[..., None, None]
    ssm = torch.exp(-dt * torch.exp(w["A_log"])[:, None, None]) * ssm + dt * x[..., None] * B[:, :, None]
    y = (ssm * C[:, :, None]).sum(-1) + w["D"][:, None] * x
    y = (y.reshape(b, d) * F.silu(z)).view(b, g, d // g)
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(b, d) * w["norm.weight"]
    return y @ w["out_proj.weight"].T, window[:, 1:], ssm
"""
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


step.wrong(
    "groups in turns instead of blocks", _variant((".repeat_interleave(h // g, 1)", ".repeat(1, h // g, 1)"))
)
step.wrong(
    "the norm before the gate",
    _variant((" * F.silu(z)).view", ").view"), ("return y @", "return y * F.silu(z) @")),
)
step.wrong("one norm over all groups", _variant((".view(b, g, d // g)", ".view(b, 1, d)")))
step.wrong("the convolution's output kept", _variant(("window[:, 1:], ssm", "window[:, :-1], ssm")))
step.wrong("the input not scaled by the step", _variant((" + dt * x[..., None]", " + x[..., None]")))

# ---------------------------------------------------------------------------------------------------------
# The SSD algorithm

written = Exercise("m2-write", "written", "What a chunk writes", stars=1, minutes=10)


@written.part("equals the recurrence from an empty state", points=2)
def _(written, rng):
    B, X, log_a = normal(rng, 12, 3), normal(rng, 12, 4), -uniform(rng, 12)
    H = torch.zeros(3, 4, dtype=torch.float64)
    for b, x, a in zip(B, X, log_a.exp(), strict=True):
        H = a * H + torch.outer(b, x)
    close(written(B, X, log_a), H, "the state", 1e-11)


@written.part("the last token is not weakened")
def _(written, rng):
    B, X, log_a = normal(rng, 12, 3), normal(rng, 12, 4), -uniform(rng, 12) - 60
    close(written(B, X, log_a), torch.outer(B[-1], X[-1]), "the state after a complete decay", 1e-11)


@written.part("nothing is divided: a token that decays by e^-800 does no harm")
def _(written, rng):
    B, X, log_a = normal(rng, 12, 3), normal(rng, 12, 4), -uniform(rng, 12)
    log_a[4] = -800.0
    kept = written(B[4:], X[4:], log_a[4:])
    close(written(B, X, log_a), kept, "the state", 1e-11)


written.wrong(
    "decay from the start instead of to the end",
    """
import torch
def written(B, X, log_a):
    return (B * log_a.cumsum(0).exp()[:, None]).T @ X
""",
)
written.wrong(
    "a token weakened by its own decay",
    """
import torch
def written(B, X, log_a):
    return (B * log_a.flip(0).cumsum(0).flip(0).exp()[:, None]).T @ X
""",
)
written.wrong(
    "a quotient of running products",
    """
import torch
def written(B, X, log_a):
    P = log_a.exp().cumprod(0)
    return (B * (P[-1] / P)[:, None]).T @ X
""",
)

entering = Exercise("m2-pass", "entering", "From chunk to chunk", stars=2, minutes=15)


def _written(rng: torch.Generator, c: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(rng, c, 2, 3), -uniform(rng, c), normal(rng, 2, 3)


@entering.part("each state is the decayed one before plus what was written", points=2)
def _(entering, rng):
    S, log_total, initial = _written(rng, 5)
    H = entering(S, log_total, initial)
    assert H.shape == (6, 2, 3), f"the states have shape {tuple(H.shape)}, expected (6, 2, 3)"
    close(H[0], initial, "the first state", 1e-12)
    close(H[1:] - S, log_total.exp()[:, None, None] * H[:-1], "what is left of the state before", 1e-12)


@entering.part("in two halves the same")
def _(entering, rng):
    S, log_total, initial = _written(rng, 6)
    H = entering(S, log_total, initial)
    assert len(H) == 7, f"{len(H)} states for 6 chunks, expected 7"
    close(entering(S[4:], log_total[4:], H[4])[-1], H[-1], "the state at the end", 1e-12)
    close(entering(S[:4], log_total[:4], initial)[-1], H[4], "the state after four chunks", 1e-12)


entering.wrong(
    "the written state decayed, too",
    """
import torch
def entering(S, log_total, initial):
    states = [initial]
    for s, a in zip(S, log_total.exp()):
        states.append(a * (states[-1] + s))
    return torch.stack(states)
""",
)
entering.wrong(
    "the initial state forgotten",
    """
import torch
def entering(S, log_total, initial):
    states = [torch.zeros_like(initial)]
    for s, a in zip(S, log_total.exp()):
        states.append(a * states[-1] + s)
    return torch.stack(states)
""",
)
entering.wrong(
    "the last state left out",
    """
import torch
def entering(S, log_total, initial):
    states = [initial]
    for s, a in zip(S[:-1], log_total.exp()):
        states.append(a * states[-1] + s)
    return torch.stack(states)
""",
)

# ---------------------------------------------------------------------------------------------------------
# SSD from scratch

fold = Exercise("m2-fold", "fold", "Into chunks", stars=1, minutes=10)


@fold.part("chunks of a length that is a multiple")
def _(fold, rng):
    t = normal(rng, 2, 12, 3)
    close(fold(t, 4), torch.stack([t[:, k : k + 4] for k in (0, 4, 8)], dim=1), "the chunks", 0.0)


@fold.part("a last chunk filled up at its end", points=2)
def _(fold, rng):
    t = normal(rng, 2, 10)
    got = fold(t, 4)
    assert got.shape == (2, 3, 4), f"shape {tuple(got.shape)}, expected (2, 3, 4)"
    close(got.flatten(1)[:, :10], t, "the tokens in their order", 0.0)
    close(got.flatten(1)[:, 10:], torch.zeros(2, 2, dtype=torch.float64), "what was filled up", 0.0)


fold.wrong(
    "the rest thrown away",
    "def fold(t, q):\n    return t[:, : t.shape[1] // q * q].unflatten(1, (-1, q))\n",
)
fold.wrong(
    "a chunk too many",
    """
import torch
def fold(t, q):
    missing = q - t.shape[1] % q
    return torch.cat([t, t.new_zeros(len(t), missing, *t.shape[2:])], 1).unflatten(1, (-1, q))
""",
)
fold.wrong(
    "filled up at the beginning",
    """
import torch
def fold(t, q):
    missing = -t.shape[1] % q
    return torch.cat([t.new_zeros(len(t), missing, *t.shape[2:]), t], 1).unflatten(1, (-1, q))
""",
)

ssd = Exercise("m2-ssd", "ssd", "SSD", stars=3, minutes=60, graded=True)


def _layer(rng: torch.Generator, l: int, g: int = 1, n: int = 5) -> list[torch.Tensor]:
    """Inputs `x, dt, A, B, C` of two sequences and four heads of three channels."""
    x, dt, A = normal(rng, 2, l, 4, 3), uniform(rng, 2, l, 4) + 0.01, -2 * uniform(rng, 4) - 0.1
    return [x, dt, A, normal(rng, 2, l, g, n), normal(rng, 2, l, g, n)]


def _by_token(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's recurrence, token by token."""
    from mambakit import ops

    return ops.ssd(x, dt, A, B, C, initial_state=state, backend="reference")


@ssd.part("outputs of the recurrence, whole chunks", points=2)
def _(ssd, rng):
    inputs = _layer(rng, 32)
    close(ssd(*inputs, q=8)[0], _by_token(*inputs)[0], "y", 1e-9)


@ssd.part("any length, any chunk")
def _(ssd, rng):
    for l, q in ((13, 4), (5, 8), (9, 1)):
        inputs = _layer(rng, l)
        close(ssd(*inputs, q=q)[0], _by_token(*inputs)[0], f"y of {l} tokens in chunks of {q}", 1e-9)


@ssd.part("groups of neighbouring heads")
def _(ssd, rng):
    inputs = _layer(rng, 16, g=2)
    close(ssd(*inputs, q=4)[0], _by_token(*inputs)[0], "y", 1e-9)


@ssd.part("continued from its state, cut anywhere", points=2)
def _(ssd, rng):
    x, dt, A, B, C = _layer(rng, 23)
    y, end = _by_token(x, dt, A, B, C)
    first, state = ssd(x[:, :10], dt[:, :10], A, B[:, :10], C[:, :10], q=4)
    rest, state = ssd(x[:, 10:], dt[:, 10:], A, B[:, 10:], C[:, 10:], q=4, initial_state=state)
    close(torch.cat([first, rest], dim=1), y, "y in two pieces", 1e-9)
    close(state, end, "the last state", 1e-9)


@ssd.part("right gradients", points=2)
def _(ssd, rng):
    inputs = _layer(rng, 19)
    found = []
    for program in (lambda *t: ssd(*t, q=4), _by_token):
        wanted = [t.clone().requires_grad_() for t in inputs]
        program(*wanted)[0].square().sum().backward()
        found.append([t.grad for t in wanted])
    for name, ours, theirs in zip(("x", "dt", "A", "B", "C"), *found, strict=True):
        assert ours is not None, f"no gradient reaches {name}"
        close(ours, theirs, f"the gradient of {name}", 1e-8)


@ssd.part("a step that wipes out the state does no harm")
def _(ssd, rng):
    inputs = _layer(rng, 16)
    inputs[1][:, 6] = 5e3
    close(ssd(*inputs, q=8)[0], _by_token(*inputs)[0], "y", 1e-9)


@ssd.part("nothing of size l x l or l x n x p", points=2)
def _(ssd, rng):
    inputs = _layer(rng, 1024, n=16)
    with Largest() as seen:
        y, _ = ssd(*inputs, q=16)
    assert seen.numbers <= 8 * 1024 * 20, f"a tensor of {seen.numbers} numbers was made"
    close(y[:, :3], _by_token(*(t[:, :3] if t.dim() > 1 else t for t in inputs))[0], "the first tokens", 1e-9)


def _mistaken(*changes: tuple[str, str]) -> str:
    """A chunked SSD with a mistake put in."""
    code = """
import torch
def ssd(x, dt, A, B, C, q=16, initial_state=None):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    B, C = (t.repeat_interleave(h // g, 2) for t in (B, C))
    state = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    rows = []
    for s in range(0, l, q):
        u, a = x[:, s:s+q] * dt[:, s:s+q, :, None], (dt[:, s:s+q] * A).transpose(1, 2)
        b_, c_ = B[:, s:s+q], C[:, s:s+q]
        k = a.shape[-1]
        ones = torch.ones(k, k, dtype=torch.bool)
        L = a[..., None].expand(*a.shape, k).masked_fill(~ones.tril(-1), 0).cumsum(-2).exp()
        L = L.masked_fill(~ones.tril(), 0)
        since = a.cumsum(-1).exp()
        y = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", c_, b_, L, u)
        rows.append(y + torch.einsum("bihn,bhpn,bhi->bihp", c_, state, since))
        state = since[..., -1, None, None] * state + torch.einsum("bjhp,bjhn,bhj->bhpn", u, b_, L[..., -1, :])
    return torch.cat(rows, 1), state
"""
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    return code


ssd.wrong("heads in turns", _mistaken((".repeat_interleave(h // g, 2)", ".repeat(1, 1, h // g, 1)")))
ssd.wrong(
    "states detached between chunks",
    _mistaken(("    return torch.cat", "        state = state.detach()\n    return torch.cat")),
)
ssd.wrong("the initial state forgotten", _mistaken((" if initial_state is None else initial_state", "")))
ssd.wrong("a short last chunk left out", _mistaken(("range(0, l, q)", "range(0, max(l - q + 1, 1), q)")))
ssd.wrong(
    "a quotient of running products",
    _mistaken(
        (
            "a[..., None].expand(*a.shape, k).masked_fill(~ones.tril(-1), 0).cumsum(-2).exp()",
            "(a.cumsum(-1).exp()[..., None] / a.cumsum(-1).exp()[..., None, :])",
        )
    ),
)
ssd.wrong("the whole text as one chunk", _mistaken(("    rows = []", "    rows, q = [], l")))
ssd.wrong("the step not multiplied in", _mistaken((" * dt[:, s:s+q, :, None], (dt", ", (dt")))
ssd.wrong(
    "a state for each token",
    """
import torch
def ssd(x, dt, A, B, C, q=16, initial_state=None):
    h = x.shape[2]
    B, C = (t.repeat_interleave(h // B.shape[2], 2) for t in (B, C))
    w = (x * dt[..., None])[..., None] * B[:, :, :, None]
    state = torch.zeros_like(w[:, 0]) if initial_state is None else initial_state
    rows = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + w[:, t]
        rows.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(rows, 1), state
""",
)

input_gradient = Exercise("m2-backward", "input_gradient", "Backwards", stars=3, minutes=30)


@input_gradient.part("equals autograd through the recurrence", points=2)
def _(input_gradient, rng):
    C, B, log_a = normal(rng, 12, 3), normal(rng, 12, 3), -uniform(rng, 12)
    X, dY = normal(rng, 12, 2).requires_grad_(), normal(rng, 12, 2)
    H, rows = torch.zeros(3, 2, dtype=torch.float64), []
    for c, b, x, a in zip(C, B, X, log_a.exp(), strict=True):
        H = a * H + torch.outer(b, x)
        rows.append(c @ H)
    torch.stack(rows).backward(dY)
    close(input_gradient(C, B, log_a, dY), X.grad, "dX", 1e-10)


@input_gradient.part("only later outputs count")
def _(input_gradient, rng):
    C, B, log_a, dY = normal(rng, 12, 3), normal(rng, 12, 3), -uniform(rng, 12), normal(rng, 12, 2)
    changed = dY.clone()
    changed[:5] += 10
    close(
        input_gradient(C, B, log_a, changed)[5:],
        input_gradient(C, B, log_a, dY)[5:],
        "dX from token 5",
        1e-10,
    )


input_gradient.wrong(
    "forwards once more",
    """
import torch
def input_gradient(C, B, log_a, dY):
    G, rows = torch.zeros(B.shape[1], dY.shape[1], dtype=dY.dtype), []
    for c, b, d, a in zip(C, B, dY, log_a.exp()):
        G = a * G + torch.outer(c, d)
        rows.append(b @ G)
    return torch.stack(rows)
""",
)
input_gradient.wrong(
    "the decay one token off",
    """
import torch
def input_gradient(C, B, log_a, dY):
    G, rows = torch.zeros(B.shape[1], dY.shape[1], dtype=dY.dtype), []
    for i in range(len(B) - 1, -1, -1):
        G = log_a[i].exp() * G + torch.outer(C[i], dY[i])
        rows.append(B[i] @ G)
    return torch.stack(rows[::-1])
""",
)

# ---------------------------------------------------------------------------------------------------------
# Efficiency

slope = Exercise("m2-slope", "slope", "The exponent", stars=1, minutes=10)

LENGTHS = [128, 200, 512, 1000, 4096]


@slope.part("finds the power of an exact law")
def _(slope, rng):
    for power in (1.0, 1.5, 2.0, 0.0):
        factor = 10 ** torch.randn(1, generator=rng).item()
        found = slope(LENGTHS, [factor * l**power for l in LENGTHS])
        assert abs(found - power) < 1e-6, f"times = {factor:.3f} l^{power}: {found}"


@slope.part("uses all points: agrees with the normal equations on noisy times", points=2)
def _(slope, rng):
    times = [l * math.exp(e) for l, e in zip(LENGTHS, normal(rng, 5).tolist(), strict=True)]
    x, y = torch.tensor(LENGTHS).double().log(), torch.tensor(times).double().log()
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    expected = torch.linalg.lstsq(design, y[:, None]).solution[0].item()
    found = slope(LENGTHS, times)
    assert abs(found - expected) < 1e-6, f"slope {found:.4f}, expected {expected:.4f}"


slope.wrong(
    "the first and the last point only",
    "import math\ndef slope(lengths, times):\n"
    "    return math.log(times[-1] / times[0]) / math.log(lengths[-1] / lengths[0])\n",
)
slope.wrong(
    "a line through the values themselves",
    """
import torch
def slope(lengths, times):
    x, y = torch.tensor(lengths).double(), torch.tensor(times).double()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()
""",
)
slope.wrong(
    "a line through the origin",
    """
import torch
def slope(lengths, times):
    x, y = torch.tensor(lengths).double().log(), torch.tensor(times).double().log()
    return ((x * y).sum() / (x * x).sum()).item()
""",
)

waiting = Exercise("m2-waiting", "waiting", "Steps that wait", stars=2, minutes=10)


@waiting.part("one by one: a border between chunks each")
def _(waiting, rng):
    for l, q in (
        (1024, 64),
        (1000, 64),
        (64, 64),
        (65, 64),
        *torch.randint(1, 999, (9, 2), generator=rng).tolist(),
    ):
        found, expected = waiting(l, q)[0], len(range(q, l, q))
        assert found == expected, f"{l} tokens in chunks of {q}: {found}, expected {expected}"


@waiting.part("by a scan: as many doublings as reach over all chunks")
def _(waiting, rng):
    for l, q in (
        (1024, 64),
        (1088, 64),
        (64, 64),
        (65, 64),
        *torch.randint(1, 999, (9, 2), generator=rng).tolist(),
    ):
        reach, doublings = 1, 0
        while reach < len(range(0, l, q)):
            reach, doublings = 2 * reach, doublings + 1
        found = waiting(l, q)[1]
        assert found == doublings, f"{l} tokens in chunks of {q}: {found}, expected {doublings}"


waiting.wrong(
    "a short last chunk forgotten",
    "import math\ndef waiting(l, q):\n    return l // q - 1, math.ceil(math.log2(max(l // q, 1)))\n",
)
waiting.wrong("all tokens", "import math\ndef waiting(l, q):\n    return l - 1, math.ceil(math.log2(l))\n")

best_chunk = Exercise("m2-best-chunk", "best_chunk", "The best chunk", stars=2, minutes=20)


def _bowl(rng: torch.Generator) -> tuple[list[int], list[float], float]:
    alpha, beta, best = (
        (0.02 * uniform(rng, 1) + 0.005).item(),
        uniform(rng, 1).item(),
        20 + 200 * uniform(rng, 1).item(),
    )
    sizes = [4, 16, 64, 256, 1024]
    return sizes, [alpha * q + beta + alpha * best**2 / q for q in sizes], best


@best_chunk.part("finds the bottom between the measured sizes", points=2)
def _(best_chunk, rng):
    sizes, times, best = _bowl(rng)
    found = best_chunk(sizes, times)
    assert abs(found / best - 1) < 1e-3, f"best chunk {found:.1f}, expected {best:.1f}"


@best_chunk.part("neither the unit of time nor a constant cost matters")
def _(best_chunk, rng):
    sizes, times, best = _bowl(rng)
    found = best_chunk(sizes, [1000 * t + 5 for t in times])
    assert abs(found / best - 1) < 1e-3, f"best chunk {found:.1f}, expected {best:.1f}"


best_chunk.wrong(
    "the fastest of the measured",
    "def best_chunk(sizes, times):\n    return float(sizes[times.index(min(times))])\n",
)
best_chunk.wrong(
    "no constant in the model",
    """
import torch
def best_chunk(sizes, times):
    q, y = torch.tensor(sizes).double(), torch.tensor(times).double()
    a, c = torch.linalg.lstsq(torch.stack([q, 1 / q], 1), y[:, None]).solution.flatten()
    return (c / a).abs().sqrt().item()
""",
)
best_chunk.wrong(
    "the ratio without its root",
    """
import torch
def best_chunk(sizes, times):
    q, y = torch.tensor(sizes).double(), torch.tensor(times).double()
    terms = torch.stack([q, torch.ones_like(q), 1 / q], 1)
    a, _, c = torch.linalg.lstsq(terms, y[:, None]).solution.flatten()
    return (c / a).item()
""",
)

# ---------------------------------------------------------------------------------------------------------
# Mamba-3

settings = Exercise("m2-count", "settings", "Count modulo m", stars=2, minutes=15)


def _angles(settings: Any, tokens: torch.Tensor, m: int) -> torch.Tensor:
    """Where a state written once stands after each token, as a complex number `(l,)`."""
    from mambakit import ops

    step, angles = settings(tokens, m)
    l = len(tokens) + 1
    x, one = torch.zeros(1, l, 1, 1, dtype=torch.float64), torch.ones(1, l, 1, dtype=torch.float64)
    x[:, 0] = 1 / float(step)
    rates = torch.cat([torch.zeros(1, dtype=torch.float64), angles.double()])[None, :, None]
    B = torch.zeros(1, l, 1, 1, 2, dtype=torch.float64)
    B[..., 0] = 1
    pair = []
    for column in (0, 1):
        C = torch.zeros_like(B)
        C[..., column] = 1
        y, _ = ops.trapezoidal(x, float(step) * one, 0 * one, B, C, 60 * one, rates, backend="reference")
        pair.append(y.flatten()[1:])
    return torch.complex(pair[0], -pair[1])  # read in turned coordinates, so against the turn


@settings.part("the state stands at the sum modulo m", points=2)
def _(settings, rng):
    for m in (2, 3, 7, 10):
        tokens = torch.randint(0, m, (30,), generator=rng)
        expected = torch.exp(2j * math.pi * (tokens.cumsum(0) % m).double() / m)
        close(_angles(settings, tokens, m), expected.to(torch.complex128), f"the state for m = {m}", 1e-8)


@settings.part("nothing is lost and 0 does not turn")
def _(settings, rng):
    tokens = torch.zeros(12, dtype=torch.int64)
    close(_angles(settings, tokens, 5), torch.ones(12, dtype=torch.complex128), "the state after zeros", 1e-9)


settings.wrong(
    "a step of 1, which reaches only half a turn",
    "import torch\ndef settings(tokens, m):\n    return 1.0, torch.atanh(tokens.double() / m)\n",
)
settings.wrong(
    "the tanh forgotten",
    "import torch\ndef settings(tokens, m):\n    return 2.0, tokens.double() / m\n",
)
settings.wrong(
    "counting positions instead of tokens",
    "import torch\ndef settings(tokens, m):\n"
    "    return 2.0, torch.full((len(tokens),), 1 / m).double().atanh()\n",
)

turned = Exercise("m2-turn", "turned", "Turn pairs", stars=2, minutes=15)


@turned.part("as multiplication by complex numbers", points=2)
def _(turned, rng):
    B, turn = normal(rng, 9, 6), normal(rng, 9, 3)
    z = torch.view_as_complex(B.unflatten(-1, (3, 2)).contiguous()) * torch.exp(1j * turn.cumsum(0))
    close(turned(B, turn), torch.view_as_real(z).flatten(1), "the turned vectors", 1e-11)


@turned.part("products depend on the turns between two tokens only")
def _(turned, rng):
    B, turn = normal(rng, 9, 6), normal(rng, 9, 3)
    later = turn.clone()
    later[0] += 1.0
    first, second = turned(B, turn), turned(B, later)
    close(second @ second.T, first @ first.T, "the products", 1e-11)


@turned.part("no length changes")
def _(turned, rng):
    B, turn = normal(rng, 9, 6), normal(rng, 9, 3)
    close(turned(B, turn).norm(dim=1), B.norm(dim=1), "the lengths", 1e-11)


turned.wrong(
    "turns not summed",
    """
import torch
def turned(B, turn):
    u, v = B[:, ::2], B[:, 1::2]
    return torch.stack([u * turn.cos() - v * turn.sin(), u * turn.sin() + v * turn.cos()], -1).flatten(1)
""",
)
turned.wrong(
    "halves instead of neighbours",
    """
import torch
def turned(B, turn):
    t = turn.cumsum(0)
    u, v = B.chunk(2, -1)
    return torch.cat([u * t.cos() - v * t.sin(), u * t.sin() + v * t.cos()], -1)
""",
)
turned.wrong(
    "a sign forgotten",
    """
import torch
def turned(B, turn):
    t = turn.cumsum(0)
    u, v = B[:, ::2], B[:, 1::2]
    return torch.stack([u * t.cos() + v * t.sin(), u * t.sin() + v * t.cos()], -1).flatten(1)
""",
)

trapezoid = Exercise("m2-trapezoid", "matrix", "Mamba-3 as attention", stars=3, minutes=30, graded=True)


def _steps(rng: torch.Generator, l: int) -> tuple[torch.Tensor, ...]:
    """Steps, rates, B, C and weights of one head with four states."""
    B, C = normal(rng, l, 4), normal(rng, l, 4)
    return uniform(rng, l) + 0.05, -uniform(rng, l), B, C, 0.1 + 0.8 * uniform(rng, l)


@trapezoid.part("its product with an input is the library's recurrence", points=3)
def _(matrix, rng):
    from mambakit import ops

    dt, A, B, C, w = _steps(rng, 15)
    x = normal(rng, 15)
    y, _ = ops.trapezoidal(
        x.view(1, -1, 1, 1),
        dt.view(1, -1, 1),
        A.view(1, -1, 1),
        B[None, :, None, None],
        C[None, :, None, None],
        torch.logit(w).view(1, -1, 1),
        torch.zeros(1, 15, 1, dtype=torch.float64),
        backend="reference",
    )
    close(matrix(dt, A, B, C, w) @ x, y.flatten(), "M x", 1e-9)


@trapezoid.part("with w = 1 it is Mamba-2's")
def _(matrix, rng):
    from mambakit import ops

    dt, _, B, C, _ = _steps(rng, 12)
    one = torch.ones_like(dt)
    unit = torch.eye(12, dtype=torch.float64)[None, :, None]
    y, _ = ops.ssd(unit, dt[None, :, None], -one[:1], B[None, :, None], C[None, :, None], backend="reference")
    close(matrix(dt, -one, B, C, one), y[0, :, 0], "M", 1e-9)


@trapezoid.part("zeros above the diagonal, w dt on it")
def _(matrix, rng):
    dt, A, B, C, w = _steps(rng, 12)
    M = matrix(dt, A, B, C, w)
    close(M.triu(), torch.diag(w * dt * (B * C).sum(-1)), "the diagonal and what is above", 1e-12)


trapezoid.wrong(
    "Mamba-2's matrix",
    """
import torch
def matrix(dt, A, B, C, w):
    s = (dt * A).cumsum(0)
    return torch.exp((s[:, None] - s).tril()).tril() * (C @ B.T) * dt
""",
)
trapezoid.wrong(
    "the left end weighted by its own step",
    """
import torch
def matrix(dt, A, B, C, w):
    s = (dt * A).cumsum(0)
    M = torch.exp((s[:, None] - s).tril()).tril() * (C @ B.T)
    return M * (dt.expand(len(dt), -1).tril(-1) + torch.diag(w * dt))
""",
)
trapezoid.wrong(
    "both ends on the diagonal",
    """
import torch
def matrix(dt, A, B, C, w):
    s = (dt * A).cumsum(0)
    after = torch.cat([((1 - w) * dt)[1:], torch.zeros(1, dtype=dt.dtype)])
    return torch.exp((s[:, None] - s).tril()).tril() * (C @ B.T) * (w * dt + after)
""",
)
trapezoid.wrong(
    "no mask",
    """
import torch
def matrix(dt, A, B, C, w):
    s = (dt * A).cumsum(0)
    after = torch.cat([((1 - w) * dt)[1:], torch.zeros(1, dtype=dt.dtype)])
    return torch.exp(s[:, None] - s) * (C @ B.T) * ((w * dt + after).expand(len(dt), -1) - torch.diag(after))
""",
)

# ---------------------------------------------------------------------------------------------------------
# The paper

heads = Exercise("m2-patterns", "heads", "All patterns by one function", stars=2, minutes=20)


def _masked(C: torch.Tensor, B: torch.Tensor, X: torch.Tensor, log_a: torch.Tensor) -> torch.Tensor:
    """The same as masked attention, head by head."""
    h = log_a.shape[1]
    C, B, X = (t.expand(-1, h, -1) for t in (C, B, X))
    columns = []
    for i in range(h):
        sums = log_a[:, i].cumsum(0)
        L = torch.exp((sums[:, None] - sums).tril()).tril()
        columns.append((L * (C[:, i] @ B[:, i].T)) @ X[:, i])
    return torch.stack(columns, dim=1)


@heads.part("every head with its own vectors")
def _(heads, rng):
    inputs = normal(rng, 14, 3, 4), normal(rng, 14, 3, 4), normal(rng, 14, 3, 5), -uniform(rng, 14, 3)
    close(heads(*inputs), _masked(*inputs), "Y", 1e-9)


@heads.part("shared queries, keys or values", points=2)
def _(heads, rng):
    for c, b, x in ((1, 1, 3), (3, 1, 1), (1, 3, 1)):
        inputs = normal(rng, 14, c, 4), normal(rng, 14, b, 4), normal(rng, 14, x, 5), -uniform(rng, 14, 3)
        close(heads(*inputs), _masked(*inputs), f"Y of {c} queries, {b} keys, {x} values for 3 heads", 1e-9)


@heads.part("a head does not hear another's decays")
def _(heads, rng):
    C, B, X, log_a = normal(rng, 9, 1, 4), normal(rng, 9, 1, 4), normal(rng, 9, 3, 5), -uniform(rng, 9, 3)
    changed = log_a.clone()
    changed[:, 1] -= 1
    close(heads(C, B, X, changed)[:, ::2], heads(C, B, X, log_a)[:, ::2], "the other heads", 1e-12)


heads.wrong(
    "one decay for all heads",
    """
import torch
def heads(C, B, X, log_a):
    h = log_a.shape[1]
    C, B, X = (t.expand(-1, h, -1) for t in (C, B, X))
    s = log_a.mean(1).cumsum(0)
    L = torch.exp((s[:, None] - s).tril()).tril()
    return torch.einsum("ihn,jhn,ij,jhp->ihp", C, B, L, X)
""",
)
heads.wrong(
    "no decay",
    """
import torch
def heads(C, B, X, log_a):
    h = log_a.shape[1]
    C, B, X = (t.expand(-1, h, -1) for t in (C, B, X))
    return torch.einsum("ihn,jhn,ij,jhp->ihp", C, B, torch.ones(len(C), len(C), dtype=C.dtype).tril(), X)
""",
)
heads.wrong(
    "shared vectors not repeated",
    """
import torch
def heads(C, B, X, log_a):
    s = log_a.cumsum(0)
    L = torch.exp((s[:, None] - s).permute(2, 0, 1).tril()).tril()
    return torch.stack([(L[i] * (C[:, i] @ B[:, i].T)) @ X[:, i] for i in range(X.shape[1])], 1)
""",
)

enough = Exercise("m2-enough", "enough", "How much of the gain?", stars=1, minutes=10)


def _table(rng: torch.Generator) -> dict[int, float]:
    """Perplexities that fall to a bottom at 5 layers and rise again, out of order."""
    drop = uniform(rng, 1).item() + 0.5
    return {
        7: 9.5 - drop,
        0: 10.0,
        1: 10 - 0.6 * drop,
        3: 10 - 0.9 * drop,
        5: 10.0 - drop,
        11: 10 - 0.2 * drop,
    }


@enough.part("the least number that reaches the share", points=2)
def _(enough, rng):
    table = _table(rng)
    table[7] = table[5] + 0.01
    for share, expected in ((0.5, 1), (0.8, 3), (0.95, 5)):
        found = enough(table, share)
        assert found == expected, f"{share:.0%} of the gain: {found} layers, expected {expected}"


@enough.part("no share needs no layer")
def _(enough, rng):
    assert enough(_table(rng), 0.0) == 0, f"no gain at all: {enough(_table(rng), 0.0)} layers, expected 0"


enough.wrong(
    "the share of the last value's gain",
    "def enough(table, share):\n    last = table[max(table)]\n"
    "    return min(n for n, v in table.items() if table[0] - v >= share * (table[0] - last))\n",
)
enough.wrong(
    "the best number",
    "def enough(table, share):\n    return min(table, key=table.get)\n",
)
