"""Rounded weights against their definition and against the decode engine's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mambakit import LanguageModel, LanguageModelConfig, Sampling, generate
from mambakit.generation import DecodeEngine
from mambakit.generation.engine import weights as engine
from mambakit.layers import Mamba1Config, MoEConfig, RoundedExperts, RoundedLinear, quantise
from mambakit.layers.moe import ExpertLinear
from mambakit.layers.quantised import ROUNDED_FORMS, form_of, restore_weight, round_weight, roundable
from mambakit.ops import native
from mambakit.testing.toys import TOYS

SIZES = [(1, 1), (32, 64), (33, 65), (5, 200), (3, 7)]
needs_library = pytest.mark.skipif(native.load().library is None, reason="there are no native kernels here")


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Rows of different sizes, one of them zero, with an outlier."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, rows)[:, None]
    weight[rows // 2, columns // 2] *= 20
    weight[rows - 1] *= rows == 1
    return weight


def restored(weight: torch.Tensor, form: str) -> torch.Tensor:
    return restore_weight(*round_weight(weight, form), weight.shape[-1], torch.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_the_nearest_multiple_of_a_127th_of_the_rows_largest(size):
    weight = matrix(*size)
    integers, scales = round_weight(weight, "int8")
    torch.testing.assert_close(scales, weight.abs().amax(1) / 127)
    off = (restored(weight, "int8") - weight).abs()
    assert (off <= 0.50001 * scales[:, None]).all()
    assert integers.dtype == torch.int8 and integers.abs().max() == 127


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int4_has_the_least_square_error_of_its_scales(size):
    """Written down again, number by number."""
    weight = matrix(*size)
    found = restored(weight, "int4")
    for row in range(size[0]):
        for first in range(0, size[1], 64):
            group = weight[row, first : first + 64].tolist()
            extreme = max(group, key=abs)
            errors = []
            for shrink in (1, 0.95, 0.9, 0.85, 0.8, 0.75):
                scale = float(torch.tensor(extreme * shrink / -8).bfloat16())
                near = [min(7, max(-8, round(v / scale))) * scale if scale else 0 for v in group]
                errors.append(sum((a - b) ** 2 for a, b in zip(near, group, strict=True)))
            error = float((found[row, first : first + 64] - weight[row, first : first + 64]).square().sum())
            assert error == pytest.approx(min(errors), rel=1e-3, abs=1e-12)


@needs_library
@pytest.mark.parametrize("form", ROUNDED_FORMS)
@pytest.mark.parametrize("size", [*SIZES, (300, 500)], ids=str)
def test_the_decode_engine_rounds_alike_and_what_is_rounded_to_itself(form, size):
    weight = matrix(*size)
    ours, theirs = restored(weight, form), engine.rounded(weight, form)
    # Among scales of nearly the same error either may be chosen.
    differ = (ours != theirs).float().mean()
    assert differ <= (0 if form == "int8" else 2e-3)
    torch.testing.assert_close(engine.rounded(ours, form), ours, rtol=2e-7, atol=0)
    torch.testing.assert_close(restored(ours, form), ours, rtol=2e-7, atol=0)


@pytest.mark.parametrize("form", ROUNDED_FORMS)
def test_a_stack_of_experts_is_rounded_one_by_one(form):
    stack = torch.stack([matrix(5, 70), 2 * matrix(5, 70)])
    assert torch.equal(restored(stack, form), torch.stack([restored(one, form) for one in stack]))


@pytest.mark.parametrize("form", ROUNDED_FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(form, bad):
    weight = matrix(4, 70)
    weight[1, 3] = bad
    found = restored(weight, form)
    assert not found[1, :64].isfinite().all() and found[[0, 2, 3]].isfinite().all()


def toy(name: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(TOYS[name].ours(), dtype=torch.float64).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", ROUNDED_FORMS)
@pytest.mark.parametrize("name", TOYS)
def test_a_rounded_model_is_the_model_with_rounded_weights(name, form):
    model = toy(name)
    small, layers = quantise(copy.deepcopy(model), form), dict(roundable(model))
    assert len(layers) >= 6 and form_of(small) == form and form_of(model) is None
    for key, layer in layers.items():
        assert not key.endswith("router")
        layer.weight.copy_(restored(layer.weight, form))
        assert isinstance(small.get_submodule(key), (RoundedLinear, RoundedExperts))
    left = {type(module) for key, module in small.named_modules() if "router" not in key and key != "lm_head"}
    assert not left & {nn.Linear, ExpertLinear}
    tokens = torch.arange(14).view(2, 7)
    assert torch.equal(small(tokens), model(tokens))
    greedy = Sampling(temperature=0)
    new = generate(small, [[1, 2, 3], [4]], max_tokens=5, sampling=greedy, engine="off")
    assert torch.equal(new, generate(model, [[1, 2, 3], [4]], max_tokens=5, sampling=greedy, engine="off"))
    bytes_ = {key: sum(t.nbytes for t in small.get_submodule(key).buffers()) for key in layers}
    for key, layer in layers.items():
        rows, columns = layer.weight.numel() // layer.weight.shape[-1], layer.weight.shape[-1]
        groups = -(-columns // 64)
        wanted = rows * (columns + 4) if form == "int8" else rows * groups * (32 + 2)
        assert bytes_[key] == wanted


def test_a_change_of_type_leaves_the_integers_alone():
    linear = quantise(nn.Sequential(nn.Linear(70, 5)), "int4")[0]
    before = linear.restored(torch.float32)
    x = torch.randn(3, 70)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.restored(torch.float32), before) and linear.bias.dtype == torch.bfloat16
    assert linear.weight.dtype == linear(x.bfloat16()).dtype == linear.example.dtype == torch.bfloat16
    linear.double()
    expected = x.double() @ before.double().T + linear.bias
    torch.testing.assert_close(linear(x.double()), expected)


def test_gradients_pass_to_what_comes_before_and_to_biases():
    model = quantise(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), "int8")
    x = torch.randn(2, 6, requires_grad=True)
    model(x).sum().backward()
    hidden = (x @ model[0].weight.T + model[0].bias).tanh()
    expected = (model[2].weight.sum(0) * (1 - hidden**2)) @ model[0].weight
    torch.testing.assert_close(x.grad, expected)
    assert model[2].bias.grad.tolist() == [2, 2, 2]


def test_experts_without_tokens_are_not_needed():
    experts = RoundedExperts(3, 5, 4, "int8")
    whole = torch.randn(3, 4, 5)
    experts.round_(whole)
    x, counts = torch.randn(4, 5), torch.tensor([3, 0, 1])
    expected = torch.cat([x[:3] @ experts.weight[0].T, x[3:] @ experts.weight[2].T])
    torch.testing.assert_close(experts(x, counts), expected)
    assert experts(x[:0], torch.zeros(3, dtype=torch.int64)).shape == (0, 4)


def test_unknown_forms_and_rounded_models_are_refused():
    for call in (
        lambda: quantise(nn.Linear(2, 2), "int5"),
        lambda: round_weight(torch.ones(2, 2), "int5"),
        lambda: RoundedLinear(2, 2, "int5"),
    ):
        with pytest.raises(ValueError, match="unknown form 'int5'; did you mean 'int"):
            call()
    model = quantise(nn.Sequential(nn.Linear(2, 2)), "int8")
    with pytest.raises(ValueError, match="weights are int8 already"):
        quantise(model, "int4")


def mamba(**changes) -> LanguageModel:
    torch.manual_seed(0)
    mixers = {"M": Mamba1Config(d_state=4), "E": MoEConfig(n_experts=3, d_hidden=8)}
    settings = {"vocab_size": 40, "d_model": 48, "pattern": "2M", "tie_embeddings": False, **changes}
    return LanguageModel(LanguageModelConfig(mixers=mixers, **settings)).eval().requires_grad_(False)


@needs_library
@pytest.mark.parametrize("form", ROUNDED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decode_engine_goes_on_with_the_same_integers(form, dtype):
    model = mamba().to(dtype)
    small = quantise(copy.deepcopy(model), form)
    tokens = torch.tensor([3, 8])
    found, whole, exact = (
        DecodeEngine(*how).step(tokens, how[0].init_state(2))
        for how in ((small, form), (model, form), (small, "float32"))
    )
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(exact, small(tokens[:, None])[:, -1], rtol=1e-4, atol=1e-5)


@needs_library
def test_the_decode_engine_says_what_it_does_not_take():
    small = quantise(mamba(), "int8")
    with pytest.raises(ValueError, match="its weights are int8 already, not to be made int4"):
        DecodeEngine(small, "int4")
    greedy = {"max_tokens": 70, "sampling": Sampling(temperature=0)}
    with pytest.warns(UserWarning, match="without the int4 engine: its weights are int8 already"):
        found = generate(small, [[1, 2]], engine="int4", **greedy)
    # By itself it takes no engine: that would round activations too.
    assert torch.equal(found, generate(small, [[1, 2]], **greedy))
    assert DecodeEngine.supports(quantise(mamba(pattern="ME"), "int8")) is not None
