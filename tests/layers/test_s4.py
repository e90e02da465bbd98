"""HiPPO and the S4 and S4D mixers: the published matrices, initial values, and one function in every mode."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mambakit.config import to_dict
from mambakit.layers import hippo
from mambakit.layers.mixer import Context, MixerConfig, State
from mambakit.layers.s4 import S4, S4Config
from mambakit.layers.s4d import S4D, S4DConfig
from mambakit.ops.long_conv import s4_conv, s4d_conv

F64 = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
INITS = ("lin", "inv", "legs", "real")
MIXERS = {"s4": (S4, S4Config), **{f"s4d-{init}": (S4D, S4DConfig) for init in INITS}}
mixers = pytest.mark.parametrize("name", MIXERS)


def make(name, d_model=6, **settings):
    """A mixer by name, in float64, with its parameters drawn from seed 0."""
    torch.manual_seed(0)
    mixer, config = MIXERS[name]
    if name != "s4":
        settings["init"] = name.removeprefix("s4d-")
    return mixer(d_model, config(**{"d_state": 8, **settings}), dtype=F64)


# ---- HiPPO


def test_legs_is_the_published_matrix():
    A, B = hippo.legs(3)
    r3, r5, r15 = math.sqrt(3), math.sqrt(5), math.sqrt(15)
    expected = torch.tensor([[-1, 0, 0], [-r3, -2, 0], [-r5, -r15, -3]], dtype=F64)
    torch.testing.assert_close(A, expected)
    torch.testing.assert_close(B, torch.tensor([1, r3, r5], dtype=F64))


@pytest.mark.parametrize("size", [2, 4, 16, 64, 256])
def test_diagonal_plus_low_rank_is_the_dense_matrix(size):
    A, B = hippo.legs(size)
    legs = hippo.legs_nplr(size)
    a, p, b = (torch.cat([t, t.conj()]) for t in (legs.A, legs.P, legs.B))
    V = torch.cat([legs.V, legs.V.conj()], 1)
    torch.testing.assert_close(V @ V.mH, torch.eye(size, dtype=V.dtype), rtol=0, atol=1e-11)
    rebuilt = V @ (torch.diag(a) - torch.outer(p, p.conj())) @ V.mH
    torch.testing.assert_close(rebuilt, A.to(V.dtype), rtol=1e-12, atol=1e-12 * size)
    torch.testing.assert_close(V @ b, B.to(V.dtype), rtol=1e-10, atol=1e-10)
    assert torch.equal(legs.A.real, torch.full_like(legs.A.real, -0.5))
    assert (legs.A.imag > 0).all()
    assert (legs.A.imag.diff() > 0).all()
    assert (legs.B.real > 0).all()
    assert legs.B.imag.abs().max() < 1e-11


def test_s4d_legs_follows_legs_ever_closer_as_it_grows():
    """The first four states under a smooth input: the low-rank term is worth half of `B` and little else."""
    t = torch.arange(1500, dtype=F64) * 2e-3
    u = (torch.sin(2 * t) ** 2)[None, :, None].expand(1, -1, 4)
    dt = torch.full((4,), 2e-3, dtype=F64)
    errors = []
    for size in (8, 16, 32, 64):
        legs = hippo.legs_nplr(size)
        A, B = hippo.s4d_legs(size)
        full, _ = s4_conv(u, dt, *(v.expand(4, -1) for v in (legs.A, legs.P, legs.B)), legs.V[:4])
        diagonal, _ = s4d_conv(u, dt, A.expand(4, -1), B.expand(4, -1), legs.V[:4], discretization="bilinear")
        errors.append(((full - diagonal).abs().max() / full.abs().max()).item())
    assert all(after < before / 4 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-3


def test_the_other_diagonals_are_their_formulas():
    n = torch.arange(4, dtype=F64)
    for A, B, expected in (
        (*hippo.s4d_lin(8), torch.complex(torch.full_like(n, -0.5), math.pi * n)),
        (*hippo.s4d_inv(8), torch.complex(torch.full_like(n, -0.5), 8 / math.pi * (8 / (2 * n + 1) - 1))),
        (*hippo.s4d_real(8), torch.complex(-1 - n, 0 * n)),
    ):
        torch.testing.assert_close(A, expected)
        assert torch.equal(B, torch.ones_like(B))


def test_s4d_inv_approximates_the_eigenvalues_of_legs():
    """Its greatest frequencies, where the law was read off."""
    frequencies = hippo.legs_nplr(256).A.imag.flip(0)[:6]
    torch.testing.assert_close(hippo.s4d_inv(256)[0].imag[:6], frequencies, rtol=0.05, atol=0)


@pytest.mark.parametrize("make_system", [hippo.legs_nplr, hippo.s4d_lin, hippo.s4d_inv, hippo.s4d_real])
@pytest.mark.parametrize("size", [0, 3, -2])
def test_odd_sizes_are_refused(make_system, size):
    with pytest.raises(ValueError, match=f"state size is {size}, expected an even number"):
        make_system(size)


# ---- the layers


@mixers
def test_step_by_step_is_the_full_forward(name):
    mixer = make(name)
    x = torch.randn(2, 21, 6, dtype=F64)
    with torch.no_grad():
        whole = mixer(x)
        state = mixer.init_state(2)
        steps = torch.cat([mixer(x[:, t : t + 1], state) for t in range(21)], 1)
        torch.testing.assert_close(steps, whole, **CLOSE)
        chunked = mixer.init_state(2)
        parts = [mixer(x[:, a:b], chunked) for a, b in ((0, 9), (9, 10), (10, 21))]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        torch.testing.assert_close(chunked["ssm"], state["ssm"], **CLOSE)


@mixers
def test_packed_documents_are_those_alone(name):
    mixer = make(name)
    x = torch.randn(1, 30, 6, dtype=F64)
    seq_idx = torch.tensor([[0] * 7 + [1] * 12 + [4] * 11])
    with torch.no_grad():
        packed = mixer(x, context=Context(seq_idx=seq_idx))
        alone = torch.cat([mixer(x[:, a:b]) for a, b in ((0, 7), (7, 19), (19, 30))], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@mixers
def test_the_future_does_not_matter(name):
    mixer = make(name)
    x = torch.randn(1, 16, 6, dtype=F64)
    later = x.clone()
    later[:, 10:] += 5
    with torch.no_grad():
        torch.testing.assert_close(mixer(later)[:, :10], mixer(x)[:, :10], **CLOSE)
        assert not torch.allclose(mixer(later)[:, 10:], mixer(x)[:, 10:])


@mixers
def test_states_are_saved_selected_and_reset(name, tmp_path):
    mixer = make(name)
    x = torch.randn(2, 9, 6, dtype=F64)
    with torch.no_grad():
        whole = mixer(x)
        state = mixer.init_state(2)
        mixer(x[:, :5], state)
        state.save(tmp_path / "state.safetensors")
        loaded = State.load(tmp_path / "state.safetensors").select(torch.tensor([1, 0, 1]))
        torch.testing.assert_close(mixer(x[[1, 0, 1], 5:], loaded), whole[[1, 0, 1], 5:], **CLOSE)
        state.reset(torch.tensor([0]))
        continued = mixer(x[:, 5:], state)
        torch.testing.assert_close(continued[:1], mixer(x[:1, 5:]), **CLOSE)
        torch.testing.assert_close(continued[1:], whole[1:, 5:], **CLOSE)


@mixers
def test_initial_values(name):
    """Step sizes log-uniform in the published range, the system by theory, `C` complex standard normal."""
    torch.manual_seed(0)
    mixer = make(name, 512, d_state=16)
    dt, A, B, C = mixer.system()
    assert 0.001 <= dt.min() < 0.0012
    assert 0.085 < dt.max() <= 0.1
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.15)
    legs = hippo.legs_nplr(16)
    theory = (legs.A, legs.B) if name == "s4" else getattr(hippo, f"s4d_{name[4:]}")(16)
    torch.testing.assert_close(A, theory[0].expand(512, -1))
    torch.testing.assert_close(B, theory[1].expand(512, -1))
    if name == "s4":
        torch.testing.assert_close(torch.view_as_complex(mixer.P), legs.P.expand(512, -1))
    assert C.abs().square().mean().item() == pytest.approx(1, abs=0.05)
    assert abs(C.square().mean().item()) < 0.05
    assert mixer.D.var().item() == pytest.approx(1, abs=0.2)


@mixers
def test_outputs_are_of_order_one(name):
    """White noise and a constant, `N = 64`, 784 steps: what the systems add to the skip."""
    mixer = make(name, 128, d_state=64)
    with torch.no_grad():
        for x in (torch.randn(2, 784, 128, dtype=F64), torch.ones(1, 784, 128, dtype=F64)):
            scale = (mixer.convolve(x, None, None) - mixer.D * x).std().item()
            assert 0.1 < scale < 4, scale


@mixers
def test_every_parameter_learns(name):
    mixer = make(name)
    mixer(torch.randn(2, 12, 6, dtype=F64)).square().mean().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad.abs().max() > 0, key


@mixers
def test_own_learning_rate_goes_to_the_recurrence(name):
    mixer = make(name)
    expected = {"log_dt", "log_A_real", "A_imag", "B"} | ({"P"} if name == "s4" else set())
    assert mixer.ssm_parameters == expected
    assert expected < {key for key, _ in mixer.named_parameters()}


@mixers
def test_reset_parameters_reaches_every_parameter(name):
    mixer = make(name)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(torch.nan)
    mixer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())


@mixers
def test_systems_stay_float32_in_a_bfloat16_layer(name):
    mixer_class, config = MIXERS[name]
    mixer = mixer_class(8, config(d_state=8), dtype=torch.bfloat16)
    assert {p.dtype for key, p in mixer.named_parameters() if "proj" not in key} == {torch.float32}
    state = mixer.init_state(2)
    assert state["ssm"].dtype == torch.float32
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    assert mixer(x, state).dtype == torch.bfloat16
    whole = mixer(x).float()
    cast = mixer.to(torch.bfloat16)(x).float()  # a whole model cast for inference rounds the systems too
    assert (cast - whole).norm() < 0.1 * whole.norm()


def test_dropout_drops_channels_for_a_whole_sequence():
    mixer = make("s4d-lin", 64, dropout=0.5)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.cat([torch.eye(64), torch.zeros(64, 64)]))
        mixer.out_proj.bias.zero_()
        x = torch.randn(3, 10, 64, dtype=F64)
        trained, evaluated = mixer(x), mixer.eval()(x)
    dropped = (trained == 0).all(1, keepdim=True)
    assert 0.3 < dropped.double().mean() < 0.7
    torch.testing.assert_close(trained, torch.where(dropped, 0, 2 * evaluated))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: S4Config(d_state=7), "d_state=7, expected an even number"),
        (lambda: S4DConfig(d_state=0), "d_state=0, expected an even number"),
        (lambda: S4Config(dt_min=0.2), "dt_min=0.2 and dt_max=0.1"),
        (lambda: S4Config(dropout=1.0), "dropout=1.0, expected a probability below 1"),
        (lambda: S4DConfig(init="linn"), "unknown init 'linn'; did you mean 'lin'"),
        (lambda: S4DConfig(discretization="euler"), "unknown discretization 'euler'; valid: bilinear, zoh"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("config", [S4Config(d_state=16), S4DConfig(init="inv", discretization="bilinear")])
def test_configs_survive_plain_data_and_build_their_mixer(config):
    plain = to_dict(config)
    tag = plain.pop("type")
    again = MixerConfig.members[tag].from_dict(plain)
    assert again == config
    assert type(again.build(4)) is {"s4": S4, "s4d": S4D}[tag]
