"""Long convolutions: against dense matrices, across cuts, backends, documents, types, and derivatives."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers import hippo
from mambakit.ops.long_conv import chunked, discretisation, fft_conv, s4_conv, s4d_conv

F64, C128 = torch.float64, torch.complex128
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# A system: the operator with its options and a backend.
SYSTEMS = {
    "s4d-zoh": (s4d_conv, {"discretization": "zoh", "backend": "chunked"}),
    "s4d-bilinear": (s4d_conv, {"discretization": "bilinear", "backend": "chunked"}),
    "s4": (s4_conv, {"backend": "chunked"}),
    "s4-cauchy": (s4_conv, {"backend": "cauchy"}),
}
systems = pytest.mark.parametrize("system", SYSTEMS)


def draw(system, b=2, l=11, d=3, n=4, dtype=F64, seed=0):
    """Inputs of a system by name: slow and fast, weakly and strongly damped modes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, of=F64):
        return torch.randn(*shape, generator=generator, dtype=of)

    u, D, dt = normal(b, l, d), normal(d), torch.exp(normal(d) - 2)
    A = torch.complex(-torch.exp(normal(d, n)), 3 * normal(d, n))
    made = {"u": u, "dt": dt, "A": A, "P": normal(d, n, of=C128), "B": normal(d, n, of=C128)}
    made |= {"C": normal(d, n, of=C128), "D": D, "initial_state": normal(b, d, n, of=C128)}
    if system.startswith("s4d"):
        made.pop("P")
    complex_dtype = torch.promote_types(dtype, torch.complex64)
    return {k: t.to(complex_dtype if t.is_complex() else dtype).requires_grad_() for k, t in made.items()}


def documents(b, l, seed=0):
    """Random document numbers that also come back: a number alone is no document, a run of it is."""
    return torch.randint(0, 2, (b, l), generator=torch.Generator().manual_seed(seed))


def run(system, inputs, **options):
    operator, fixed = SYSTEMS[system]
    return operator(**inputs, **{**fixed, **options})


def gradients(inputs, y, final):
    """Gradients of a loss that every output takes part in."""
    return torch.autograd.grad(y.square().sum() + final.abs().square().sum(), list(inputs.values()))


def real_system(A, P, B, C):
    """One channel's conjugate pairs written out as a real dense system: `M` `(2n, 2n)`, `B`, `C` `(2n,)`."""
    full = torch.cat([A, A.conj()])
    M = torch.diag(full)
    if P is not None:
        p = torch.cat([P, P.conj()])
        M = M - torch.outer(p, p.conj())
    # Unitary change from (h, conj h) to sqrt(2) (Re h, Im h).
    eye = torch.eye(A.numel(), dtype=A.dtype)
    T = torch.cat([torch.cat([eye, eye]), torch.cat([-1j * eye, 1j * eye])], 1).mT / 2**0.5
    parts = T @ M @ T.mH, T @ torch.cat([B, B.conj()]), torch.cat([C, C.conj()]) @ T.mH
    assert all(t.imag.abs().max() < 1e-12 for t in parts)
    return [t.real for t in parts]


def dense_steps(M, B, dt, rule):
    """`Abar`, `Bbar` of a dense system by matrix exponential or inverse."""
    size = M.shape[0]
    if rule == "zoh":
        block = torch.zeros(size + 1, size + 1, dtype=F64)
        block[:size, :size], block[:size, size] = M, B
        step = torch.linalg.matrix_exp(dt * block)
        return step[:size, :size], step[:size, size]
    eye = torch.eye(size, dtype=F64)
    inverse = torch.linalg.inv(eye - dt / 2 * M)
    return inverse @ (eye + dt / 2 * M), dt * inverse @ B


# ---- fft_conv


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("l", "w"), [(1, 1), (1, 4), (2, 2), (7, 3), (31, 31), (33, 50), (64, 64)])
def test_fft_conv_is_the_toeplitz_product(backend, l, w):
    generator = torch.Generator().manual_seed(l)
    u, k, D = (torch.randn(*s, generator=generator, dtype=F64) for s in ((2, l, 3), (3, w), (3,)))
    toeplitz = torch.zeros(3, l, l, dtype=F64)
    for t in range(l):
        for s in range(max(0, t - w + 1), t + 1):
            toeplitz[:, t, s] = k[:, t - s]
    expected = torch.einsum("dts,bsd->btd", toeplitz, u) + D * u
    torch.testing.assert_close(fft_conv(u, k, D, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_kernel_of_one_late_tap_delays(backend):
    """A cross-correlation, or a kernel the wrong way round, would advance or reverse."""
    u = torch.arange(1.0, 9.0, dtype=F64)[None, :, None]
    k = torch.zeros(1, 8, dtype=F64)
    k[0, 3] = 1
    expected = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5], dtype=F64)[None, :, None]
    torch.testing.assert_close(fft_conv(u, k, backend=backend), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("n", [7, 8, 15, 16])
def test_the_real_fft_and_its_adjoint(n):
    x = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(chunked._RealFFT.apply(x, n), torch.fft.rfft(x, n=n))
    assert torch.autograd.gradcheck(lambda x: chunked._RealFFT.apply(x, n), (x,))
    assert torch.autograd.gradgradcheck(lambda x: chunked._RealFFT.apply(x, n), (x,))


def test_transform_lengths_are_fast_and_just_enough():
    assert chunked.fast_length(2 * 784 - 1) == 1568
    for needed in range(1, 3000):
        n = chunked.fast_length(needed)
        assert needed <= n <= max(1.2 * needed, needed + 1)
        for factor in (2, 3, 5, 7):
            while n % factor == 0:
                n //= factor
        assert n == 1


# ---- discretisation


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("dtype", [C128, torch.complex64], ids=str)
def test_diagonal_discretisation_is_the_dense_one(rule, dtype):
    """By matrix exponential and inverse, down to steps where `(exp(z) - 1) / z` cancels, and at zero."""
    scale = torch.tensor([0, 1e-9, 1e-5, 2.9e-3, 3.1e-3, 0.09, 0.11, 1.0, 30.0], dtype=F64)
    A = scale * torch.complex(torch.tensor(-0.6, dtype=F64), torch.tensor(0.8, dtype=F64))
    B = torch.full_like(A, 0.7 + 0.2j)
    dt = torch.tensor([1.0], dtype=F64)
    found = discretisation.diagonal(dt.to(dtype.to_real()), A[None].to(dtype), B[None].to(dtype), rule)
    for i in range(len(A)):
        M, b, _ = real_system(A[i : i + 1], None, B[i : i + 1], B[i : i + 1])
        Abar, Bbar = dense_steps(M, b, 1.0, rule)
        a, b = found[0][0, i].to(C128), found[1][0, i].to(C128)
        tolerance = 1e-13 if dtype == C128 else 2e-6
        torch.testing.assert_close(torch.stack([a.real, a.imag]), Abar[:, 0], rtol=0, atol=tolerance)
        torch.testing.assert_close(
            torch.stack([b.real, b.imag]) * 2**0.5, Bbar, rtol=0, atol=tolerance * (1 + scale[i].item())
        )


# ---- systems against dense matrices


@systems
def test_outputs_and_state_are_those_of_the_dense_system(system):
    """`h' = M h + B u` written out with real matrices, discretised by exponential or inverse, and stepped."""
    inputs = draw(system, b=1, l=13, d=2)
    y, final = run(system, inputs)
    rule = SYSTEMS[system][1].get("discretization", "bilinear")
    with torch.no_grad():
        for channel in range(2):
            A, P, B, C = (inputs[k][channel] if k in inputs else None for k in "APBC")
            M, b, c = real_system(A, P, B, C)
            Abar, Bbar = dense_steps(M, b, inputs["dt"][channel].item(), rule)
            h0 = inputs["initial_state"][0, channel]
            h, expected = 2**0.5 * torch.cat([h0.real, h0.imag]), []
            for t in range(13):
                u_t = inputs["u"][0, t, channel]
                h = Abar @ h + Bbar * u_t
                expected.append(c @ h + inputs["D"][channel] * u_t)
            torch.testing.assert_close(y[0, :, channel], torch.stack(expected), **CLOSE)
            found = 2**0.5 * torch.cat([final[0, channel].real, final[0, channel].imag])
            torch.testing.assert_close(found, h, **CLOSE)


@pytest.mark.parametrize("backend", ["chunked", "cauchy", "reference"])
def test_s4_kernel_is_that_of_dense_hippo_legs(backend):
    """The impulse response by powers of the dense HiPPO matrix, at a length that is no power of two."""
    size, length, dt = 16, 100, 0.05
    A, B = hippo.legs(size)
    legs = hippo.legs_nplr(size)
    C = torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(0))
    Abar, Bbar = dense_steps(A, B, dt, "bilinear")
    expected, h = [], Bbar
    for _ in range(length):
        expected.append(C @ h)
        h = Abar @ h
    impulse = torch.zeros(1, length, 1, dtype=F64)
    impulse[0, 0] = 1
    vectors = (t[None] for t in (legs.A, legs.P, legs.B, C.to(C128) @ legs.V))
    y, _ = s4_conv(impulse, torch.tensor([dt], dtype=F64), *vectors, backend=backend)
    torch.testing.assert_close(y[0, :, 0], torch.stack(expected), **CLOSE)


def test_s4_without_its_low_rank_term_is_s4d():
    inputs = draw("s4", l=20)
    inputs["P"] = torch.zeros_like(inputs["P"])
    s4 = run("s4", inputs)
    inputs.pop("P")
    for a, b in zip(s4, run("s4d-bilinear", inputs), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- convolution = recurrence


@systems
@pytest.mark.parametrize("l", [1, 2, 3, 16, 17, 50])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("start", [False, True], ids=["empty", "carried"])
def test_convolution_is_the_recurrence(system, l, packed, start):
    """Outputs, final state and every gradient, in float64."""
    inputs = draw(system, l=l, seed=l)
    if not start:
        inputs.pop("initial_state")
    options = {"seq_idx": documents(2, l) if packed else None}
    generator = torch.Generator().manual_seed(1)
    weights = None
    found = {}
    for backend in (SYSTEMS[system][1]["backend"], "reference"):
        y, final = run(system, inputs, **options, backend=backend)
        weights = weights or [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, final)]
        loss = (y * weights[0]).sum() + (final * weights[1]).sum().real
        found[backend] = [y, final, *torch.autograd.grad(loss, list(inputs.values()))]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@systems
def test_zero_transition_keeps_its_derivative(system):
    """The bilinear rule maps `dt A = -2` to `Abar = 0`, where logarithms and quotients of powers fail."""
    inputs = draw(system, l=9)
    with torch.no_grad():
        inputs["dt"].fill_(0.5)
        inputs["A"].fill_(-4.0)
    grads = []
    for backend in (SYSTEMS[system][1]["backend"], "reference"):
        grads.append(gradients(inputs, *run(system, inputs, backend=backend)))
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, **CLOSE)


@systems
@pytest.mark.parametrize("cut", [1, 7, 19])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_halves_with_carried_state_are_the_whole(system, cut, packed):
    inputs = draw(system, l=20)
    u, h = inputs.pop("u"), inputs.pop("initial_state")
    seq_idx = documents(2, 20) if packed else None
    y, final = run(system, {**inputs, "u": u, "initial_state": h}, seq_idx=seq_idx)
    first, second = (None, None) if seq_idx is None else (seq_idx[:, :cut], seq_idx[:, cut:])
    y1, h1 = run(system, {**inputs, "u": u[:, :cut], "initial_state": h}, seq_idx=first)
    if packed:
        same = seq_idx[:, cut - 1] == seq_idx[:, cut]
        h1 = torch.where(same[:, None, None], h1, torch.zeros_like(h1))
    y2, h2 = run(system, {**inputs, "u": u[:, cut:], "initial_state": h1}, seq_idx=second)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, **CLOSE)
    torch.testing.assert_close(h2, final, **CLOSE)


@systems
def test_token_by_token_in_place_is_the_whole(system):
    inputs = {k: t.detach() for k, t in draw(system, l=9).items()}
    y, final = run(system, inputs)
    u, state = inputs.pop("u"), inputs.pop("initial_state").clone()
    outputs = []
    for t in range(9):
        y_t, returned = run(system, {**inputs, "u": u[:, t : t + 1]}, state=state)
        assert returned.data_ptr() == state.data_ptr()
        outputs.append(y_t)
    torch.testing.assert_close(torch.cat(outputs, 1), y, **CLOSE)
    torch.testing.assert_close(state, final, **CLOSE)


# ---- packing


@systems
@pytest.mark.parametrize("backend", ["own", "reference"])
def test_packed_documents_are_those_alone(system, backend):
    options = {} if backend == "own" else {"backend": backend}
    inputs = {k: t.detach() for k, t in draw(system, b=1, l=40).items()}
    lengths = [3, 1, 17, 11, 8]
    seq_idx = torch.repeat_interleave(torch.tensor([5, 9, 7, 5, 2]), torch.tensor(lengths))
    y, final = run(system, inputs, seq_idx=seq_idx[None], **options)
    start = 0
    for index, length in enumerate(lengths):
        alone = {**inputs, "u": inputs["u"][:, start : start + length]}
        if index:
            alone.pop("initial_state")
        y_alone, final_alone = run(system, alone, **options)
        torch.testing.assert_close(y[:, start : start + length], y_alone, **CLOSE)
        start += length
    torch.testing.assert_close(final, final_alone, **CLOSE)


@systems
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("poison", [3.0, torch.nan, torch.inf])
def test_no_bit_of_a_document_reaches_another(system, dtype, poison):
    """Values and gradients, whatever the other document and the initial state hold."""
    inputs = draw(system, b=1, l=40, dtype=dtype)
    seq_idx = torch.tensor([0] * 13 + [1] * 15 + [0] * 12)[None]
    mine = seq_idx == 1
    results = []
    for other in (1.0, poison):
        changed = dict(inputs)
        u = torch.where(mine[..., None], inputs["u"], other * inputs["u"])
        changed["u"] = u.detach().requires_grad_()
        changed["initial_state"] = (other * inputs["initial_state"]).detach()
        y, _ = run(system, changed, seq_idx=seq_idx)
        (du,) = torch.autograd.grad(y[mine].sum(), changed["u"])
        results.append((y[mine].detach(), du[mine]))
        assert torch.equal(du[~mine], torch.zeros_like(du[~mine]))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


# ---- derivatives, memory, types, tracing


@systems
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_twice_differentiable(system, packed):
    inputs = draw(system, b=1, l=5, d=1, n=1)
    options = {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])} if packed else {}

    def function(*values):
        return run(system, dict(zip(inputs, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@systems
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_memory_is_linear_in_length(system, packed):
    """Bytes kept for the backward pass, counting storages once, beyond what the batch does not multiply."""

    def kept(b, l):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        inputs = draw(system, b=b, l=l, d=8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(system, inputs, seq_idx=documents(b, l) if packed else None)
        del outputs
        return sum(storage.nbytes() for storage in storages.values())

    per_row_short, per_row_long = (kept(4, l) - kept(2, l) for l in (512, 2048))
    assert per_row_long < 4.8 * per_row_short
    assert kept(2, 2048) - kept(2, 512) < 2048 * 8 * 8 * 40  # some tens of float64 per token and channel


@pytest.mark.parametrize("system", ["s4d-zoh", "s4", "s4-cauchy"])
def test_float32_is_nearer_to_the_truth_than_the_float32_recurrence(system):
    """HiPPO-LegS with slow steps over 1,000 tokens, where powers amplify the rounding of `Abar`."""
    legs = hippo.legs_nplr(32)
    generator = torch.Generator().manual_seed(0)
    exact = {
        "u": torch.randn(1, 1000, 2, generator=generator, dtype=F64),
        "dt": torch.tensor([0.001, 0.02], dtype=F64),
        **{name: getattr(legs, name).expand(2, -1) for name in "APB"},
        "C": torch.randn(2, 16, generator=generator, dtype=C128),
    }
    if system.startswith("s4d"):
        exact.pop("P")
    rounded = {k: t.to(torch.complex64 if t.is_complex() else torch.float32) for k, t in exact.items()}
    exact = {k: t.to(C128 if t.is_complex() else F64) for k, t in rounded.items()}
    truth = run(system, exact, backend="reference")[0]
    errors = [
        ((run(system, rounded, **options)[0] - truth).abs().max() / truth.abs().max()).item()
        for options in ({}, {"backend": "reference"})
    ]
    assert errors[0] < 2e-6
    assert errors[0] < errors[1]


@systems
def test_bfloat16_is_computed_in_float32(system):
    inputs = {k: t.detach() for k, t in draw(system, l=40, dtype=torch.float32).items()}
    inputs["u"] = inputs["u"].bfloat16()
    y, final = run(system, inputs)
    wide, wide_final = run(system, {**inputs, "u": inputs["u"].float()})
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.complex64
    assert torch.equal(y, wide.bfloat16())
    assert torch.equal(final, wide_final)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(system, inputs)[1], final)


@pytest.mark.parametrize("system", ["s4d-zoh", "s4"])
def test_traces_without_graph_breaks(system):
    """Packed, forward and backward; then one token with its state in place."""
    torch.compiler.reset()

    def plain(inputs, **options):
        return run(system, inputs, **options)

    traced = torch.compile(plain, fullgraph=True, backend="aot_eager")
    inputs = draw(system, l=12, dtype=torch.float32)
    seq_idx = documents(2, 12)
    found = [gradients(inputs, *function(inputs, seq_idx=seq_idx)) for function in (traced, plain)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    token = {**inputs, "u": inputs["u"][:, :1], "initial_state": None}
    with torch.no_grad():
        states = [inputs["initial_state"].clone() for _ in range(2)]
        found = [f(token, state=h)[0] for f, h in zip((traced, plain), states, strict=True)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*states)


@systems
def test_memory_layout_does_not_matter(system):
    inputs = {k: t.detach() for k, t in draw(system, l=12).items()}
    strided = {k: t.repeat_interleave(2, -1)[..., ::2] for k, t in inputs.items()}
    conjugated = {k: t.conj().resolve_conj().conj() if t.is_complex() else t for k, t in inputs.items()}
    expected = run(system, inputs)
    for other in (strided, conjugated):
        for a, b in zip(run(system, other), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def change(**replaced):
    return lambda inputs: {**inputs, **replaced}


@pytest.mark.parametrize(
    ("system", "spoil", "message"),
    [
        ("s4d-zoh", change(discretization="zho"), "unknown discretization 'zho'; did you mean 'zoh'"),
        ("s4d-zoh", change(dt=torch.ones(4)), r"s4d_conv: dt has shape \(4,\), expected \(d=3\)"),
        ("s4", change(P=torch.ones(3, 5)), r"s4_conv: P has shape \(3, 5\), expected \(d=3, n=4\)"),
        ("s4", change(u=torch.ones(2, 0, 3)), "empty"),
        ("s4", change(initial_state=torch.ones(2, 3, 4)), "is torch.float32, expected a complex type"),
        ("s4", change(state=torch.ones(2, 3, 4, dtype=C128)), "either initial_state or state"),
        ("s4d-zoh", change(backend="cauchy"), "unknown backend 'cauchy'"),
    ],
)
def test_what_cannot_be_used_is_said(system, spoil, message):
    operator, fixed = SYSTEMS[system]
    with pytest.raises(ValueError, match=message):
        operator(**spoil({**fixed, **draw(system)}))
