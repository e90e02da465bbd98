"""The fused kernels in emulation: what they compute is the model's forward, up to the order of sums."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from mambakit.generation.recorded import kernels
from mambakit.generation.recorded.fused import FusedForward, unsupported_block
from mambakit.generation.recorded.kernels import Conv, Launcher, Norm
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.testing.emulation import emulated_gpu

_spec = importlib.util.spec_from_file_location("recorded_models", Path(__file__).with_name("conftest.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
# Every kernel at every number of vectors, every type, sizes of every kind: not every combination.
CASES = [
    *(("mamba1", F32, batch) for batch in (1, 2, 5, 8)),
    *(("mamba2", F32, batch) for batch in (3, 4, 6, 7)),
    ("mamba1", BF16, 3),
    ("mamba1", BF16, 9),
    ("mamba2", BF16, 1),
    ("mamba2", BF16, 9),
    ("mamba1 odd", F32, 1),
    ("mamba1 odd", BF16, 7),
    ("mamba1 odd", F16, 9),
    ("mamba1 one", F32, 2),
    ("mamba1 one", BF16, 1),
    ("mamba1 wide", BF16, 8),
    ("mamba1 wide", F32, 17),
    ("mamba2 groups", F32, 5),
    ("mamba2 groups", BF16, 1),
    ("mamba2 groups", BF16, 10),
    ("mamba2 odd", F32, 9),
    ("mamba2 odd", F16, 1),
    ("mamba2 odd", BF16, 3),
    ("mamba2 one", F32, 1),
    ("mamba2 one", BF16, 2),
    ("hybrid", F32, 2),
    ("hybrid", BF16, 9),
]


def fused(model, **options):
    with emulated_gpu():
        forward = FusedForward(model, **options)

    def step(tokens, state):
        # The other blocks of a hybrid need no GPU and would be slow in emulation.
        with emulated_gpu():
            return forward(tokens, state)

    return step


def follow(model, batch, state_dtype=None, steps=2):
    """Step by step: fused, by the model's forward and by that in float64, each on its own state."""
    exact, forward = models.exact(model), fused(model)
    own = model.init_state(batch)
    with torch.no_grad():
        model(models.tokens(batch, 6), own)
        own = own if state_dtype is None else own.to(state_dtype)
        ours, wanted = own.clone(), models.double(own)
        for number in range(steps):
            token = models.tokens(batch, 1, seed=number + 1)
            yield (
                forward(token[:, 0], ours),
                model(token, own)[:, -1],
                exact(token, wanted)[:, -1],
                (ours, own, wanted),
            )


@pytest.mark.parametrize(("name", "dtype", "batch"), CASES)
def test_a_step_is_the_forward(name, dtype, batch):
    for found, own, wanted, states in follow(models.build(name, dtype), batch):
        assert found.dtype == own.dtype
        models.holds(found, own, wanted, "logits", dtype)
        for (leaf, one), (_, other), (_, best) in zip(*(s.tensors() for s in states), strict=True):
            if not one.is_complex():
                models.holds(one, other, best, leaf, dtype)


@pytest.mark.parametrize(
    ("name", "batch"), [("mamba1", 2), ("mamba1 odd", 9), ("mamba2", 2), ("mamba2 odd", 9), ("mamba2", 9)]
)
def test_states_may_be_kept_in_bfloat16(name, batch):
    for found, own, wanted, (ours, theirs, best) in follow(models.build(name), batch, BF16):
        models.holds(found, own, wanted, "logits", BF16)
        assert all(leaf.dtype == BF16 for _, leaf in ours.tensors())
        for (leaf, one), (_, other), (_, exact) in zip(
            *(s.tensors() for s in (ours, theirs, best)), strict=True
        ):
            models.holds(one, other, exact, leaf, BF16)


@pytest.mark.parametrize("name", ["mamba1", "mamba2 odd", "hybrid"])
def test_the_tensors_of_a_state_stay_where_they_are(name):
    model = models.build(name)
    forward, state = fused(model), model.init_state(2)
    before = [(leaf, tensor, tensor.data_ptr(), tensor.clone()) for leaf, tensor in state.tensors()]
    forward(models.tokens(2, 1)[:, 0], state)
    for (leaf, tensor, place, value), (_, now) in zip(before, state.tensors(), strict=True):
        assert now is tensor, leaf
        assert now.data_ptr() == place, leaf
        assert not torch.equal(now, value), f"{leaf} did not move on"


def product_error(found, x, weight, bias):
    """The largest error of a product, in units of its type's last digit at the largest output."""
    wanted = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return ((found.double() - wanted).abs().max() / wanted.abs().max() / torch.finfo(x.dtype).eps).item()


@pytest.mark.parametrize(
    ("rows", "k", "batch", "dtype"),
    [
        (1, 8, 1, BF16),
        (3, 2056, 1, F32),
        (3, 2056, 1, BF16),
        (1030, 8, 1, BF16),
        (96, 512, 1, BF16),
        (96, 512, 1, F32),
        (130, 776, 2, BF16),
        (97, 1000, 3, F16),
        (97, 1000, 3, F32),
        (71, 264, 8, BF16),
        (50, 77, 5, BF16),
    ],
)
def test_linear_at_every_division_of_its_work(rows, k, batch, dtype):
    """Few rows and many (tiles of 8 and of 16, several for a block), whole rounds and not, odd sizes."""
    torch.manual_seed(0)
    weight, bias = torch.randn(rows, k).to(dtype), torch.randn(rows).to(dtype)
    x = torch.randn(batch, k + 16).to(dtype)[:, :k]
    with emulated_gpu():
        found = Launcher(CPU, dtype, F32).linear(x, weight, bias)
    assert product_error(found, x, weight, bias) <= 4


@pytest.mark.parametrize(
    ("rows", "k", "batch", "dtype", "tiles", "parts", "last"),
    [
        (40, 80, 9, BF16, 1, 1, False),
        (88, 264, 64, BF16, 5, 1, False),
        (24, 520, 17, F16, 2, 1, False),
        (56, 520, 33, BF16, 3, 2, False),
        (16, 1032, 24, BF16, 1, 8, True),
        (40, 1024, 12, F16, 2, 4, True),
    ],
)
def test_product_at_every_division_of_its_work(rows, k, batch, dtype, tiles, parts, last):
    """Blocks of rows and parts of columns that end within the matrix; parts added at once or later."""
    torch.manual_seed(0)
    weight, x = torch.randn(rows, k).to(dtype), torch.randn(batch, k + 16).to(dtype)[:, :k]
    bias = torch.randn(rows).to(dtype) if last or parts == 1 else None
    counters = torch.zeros(kernels.COUNTERS, dtype=torch.int32)
    out = torch.full((batch, rows), torch.nan, dtype=dtype) if last or parts == 1 else None
    with emulated_gpu():
        launcher = Launcher(CPU, dtype, F32, counters=counters)
        sums = launcher._multiply(x, weight, tiles, parts, bias=bias, out=out)
    assert product_error(sums.sum(0) if out is None else out, x, weight, bias) <= 2
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 9, 16, 33, 64])
@pytest.mark.parametrize(
    ("rows", "k"), [(10240, 2560), (10576, 2560), (2560, 5120), (192, 5120), (768, 1536)]
)
def test_products_of_published_sizes_on_a_gpu(rows, k, batch, dtype):
    """Many times in a row, so that a step that overtakes another would be seen."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    weight, x = torch.randn(rows, k, device=device).to(dtype), torch.randn(batch, k, device=device).to(dtype)
    counters = torch.zeros(kernels.COUNTERS, dtype=torch.int32, device=device)
    launcher = Launcher(device, dtype, F32, True, counters)
    for _ in range(20):
        if batch <= kernels.MOST_VECTORS:
            found = launcher.linear(x, weight)
        else:
            found = launcher.product(x, weight)
            parts = launcher.product_in_parts(x, weight)
            added = parts.sums.sum(0) if isinstance(parts, kernels.Parts) else parts
            assert product_error(added, x, weight, None) <= 2
        assert product_error(found, x, weight, None) <= 2
    assert not counters.any()


def test_parts_are_added_by_the_norm_behind_them():
    torch.manual_seed(0)
    x, sums, bias = torch.randn(3, 40), torch.randn(4, 3, 40), torch.randn(40).bfloat16()
    norm = Norm(torch.randn(40).bfloat16(), 1e-5)
    wanted = x + (sums.sum(0) + bias.float()).bfloat16().float()
    with emulated_gpu():
        found = Launcher(CPU, BF16, F32).normalise(x, norm, kernels.Parts(sums, bias))
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)
    normed = nn.functional.rms_norm(wanted, (40,), norm.weight.float(), norm.eps)
    torch.testing.assert_close(found.float(), normed, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("rows", "k", "batch"),
    [
        (10240, 2560, 64),
        (2560, 5120, 64),
        (192, 5120, 64),
        (10576, 2560, 33),
        (768, 1536, 9),
        (50280, 2560, 64),
    ],
)
def test_the_division_of_product_uses_a_gpu(rows, k, batch):
    """Of 132 multiprocessors nearly every one has a block where the matrix is large; registers suffice."""
    tiles, parts = kernels._division(rows, k, batch, 132, 227 << 10, True)
    blocks = -(-rows // (16 * tiles)) * parts
    assert tiles * -(-batch // 8) <= kernels.MOST_ACCUMULATORS
    assert blocks >= 90 or rows * k < 2**21
    assert parts == 1 or k >= 128 * parts


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [2, 9])
def test_the_convolution_of_some_columns(taps, batch):
    torch.manual_seed(0)
    k, rows, first, channels = 24, 50, 11, 29
    x, norm = torch.randn(batch, k), Norm(torch.randn(k), 1e-5)
    weight = torch.randn(rows, k)
    taps_weight, bias, state = (
        torch.randn(channels, 1, taps),
        torch.randn(channels),
        torch.randn(batch, taps - 1, channels),
    )
    before = state.clone()
    with emulated_gpu():
        launcher, conv = Launcher(CPU, F32, F32), Conv(taps_weight, bias, state, first)
        if batch <= kernels.MOST_VECTORS:
            found = launcher.linear(x, weight, norm=norm, conv=conv)
        else:
            found = nn.functional.linear(launcher.normalise(x, norm), weight)
            launcher.convolve(found, conv)
    wanted = nn.functional.linear(nn.functional.rms_norm(x, (k,), norm.weight, norm.eps), weight)
    window = torch.cat([before, wanted[:, None, first : first + channels]], dim=1)
    wanted[:, first : first + channels] = nn.functional.silu((window * taps_weight[:, 0].T).sum(1) + bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, window[:, 1:], rtol=1e-5, atol=1e-5)


def test_unknown_tokens_become_nan():
    model = models.build("mamba1")
    logits = fused(model)(torch.tensor([3, models.VOCAB, -1]), model.init_state(3))
    assert logits[0].isfinite().all()
    assert logits[1:].isnan().all()


def test_it_follows_parameters_that_change_in_place():
    model = models.build("mamba2")
    forward, token = fused(model), models.tokens(1, 1)
    first = forward(token[:, 0], model.init_state(1))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    second = forward(token[:, 0], model.init_state(1))
    with torch.no_grad():
        torch.testing.assert_close(second, model(token, model.init_state(1))[:, -1], rtol=1e-4, atol=1e-4)
    assert (second - first).abs().max() > 0.01


class Adapted(nn.Linear):
    """A linear layer that is more than its weight."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mamba1", lambda mixer: setattr(mixer.ssm, "x_proj", Adapted(80, 35)), "ssm.x_proj is Adapted"),
        ("mamba2", lambda mixer: mixer.norm.register_forward_hook(print), "norm is GatedRMSNorm, or has"),
        ("mamba1", lambda mixer: mixer.ssm.double(), "ssm.dt_bias is torch.float64"),
        ("mamba2", lambda mixer: mixer.in_proj.half(), "in_proj.weight is torch.float16"),
    ],
)
def test_a_block_that_is_not_what_it_seems_runs_by_its_own_forward(name, change, reason):
    model = models.build(name)
    change(model.backbone.blocks[1].mixer)
    assert reason in unsupported_block(model.backbone.blocks[1], model.embedding.weight)
    assert unsupported_block(model.backbone.blocks[0], model.embedding.weight) is None
    if "Adapted" in reason:
        token = models.tokens(2, 1)
        found = fused(model)(token[:, 0], model.init_state(2))
        with torch.no_grad():
            torch.testing.assert_close(found, model(token, model.init_state(2))[:, -1], rtol=1e-4, atol=1e-4)


def test_parts_of_another_type_run_by_their_own_forward():
    model = models.build("mamba2", torch.bfloat16)
    model.embedding.float()
    token = models.tokens(2, 1)
    assert "is torch.bfloat16 on cpu, expected torch.float32" in unsupported_block(
        model.backbone.blocks[0], model.embedding.weight
    )
    model.backbone.blocks[0].float()
    found = fused(model)(token[:, 0], model.init_state(2))
    with torch.no_grad():
        wanted = model(token, model.init_state(2))[:, -1]
    assert found.dtype == wanted.dtype == BF16
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Mamba1Config(d_state=257), "d_state up to 256, not 257"),
        (Mamba1Config(inner_norm="learned"), "it has inner_norm=learned"),
        (Mamba2Config(headdim=8, gated_norm=False), "it has gated_norm=False"),
        (Mamba2Config(d_conv=9, headdim=8), "d_conv up to 8, not 9"),
    ],
)
def test_sizes_and_settings_beyond_the_kernels_run_by_their_own_forward(config, reason):
    model = models.build("mamba1", mixers={"M": config})
    assert reason in unsupported_block(model.backbone.blocks[0], model.embedding.weight)


def test_long_vectors_leave_the_products_to_pytorch():
    """Where shared memory does not hold them."""
    model = models.build(
        "mamba2", pattern="M", d_model=1600, mixers={"M": Mamba2Config(d_state=2, headdim=400)}
    )
    token = models.tokens(8, 1)
    found = fused(model)(token[:, 0], model.init_state(8))
    with torch.no_grad():
        torch.testing.assert_close(found, model(token, model.init_state(8))[:, -1], rtol=1e-4, atol=1e-3)


def test_a_model_without_such_blocks_is_refused():
    model = models.build("hybrid", pattern="DN")
    with emulated_gpu(), pytest.raises(ValueError, match="block 0: S4D has no fused kernels"):
        FusedForward(model)
    with pytest.raises(ValueError, match="on a CUDA device, not on 'cpu'"):
        FusedForward(models.build("mamba1"))
