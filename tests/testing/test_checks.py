"""Nothing wrong is timed: planted errors in values and in gradients are found, and named."""

from __future__ import annotations

import re

import pytest
import torch

from mambakit import LanguageModel, LanguageModelConfig
from mambakit.ops.dispatch import registry
from mambakit.testing import speakers, workloads
from mambakit.testing.checks import WrongResultError, check_backend, check_same, relative_error

CPU = torch.device("cpu")
SMALL = {
    "selective_scan": workloads.selective_scan(2, 70, 130, n=3),
    "ssd": workloads.ssd(2, 70, 4, p=3, g=2, n=5),
    "causal_conv1d": workloads.causal_conv1d(2, 20, 70),
    "norm": workloads.norm(2, 5, 12),
    "gated norm": workloads.norm(2, 5, 12, gated=True),
    "attention": workloads.attention(2, 20, 3, p=4),
}


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient one percent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


@pytest.fixture
def plant(monkeypatch):
    """Replace the output `y` of a plain backend."""

    def put(op, change, backend="chunked"):
        module = registry[op].backends[backend]
        right = getattr(module, op)

        def wrong(*inputs):
            found = right(*inputs)
            return (change(found[0]), *found[1:]) if isinstance(found, tuple) else change(found)

        monkeypatch.setattr(module, op, wrong)

    return put


@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv1d", "norm", "attention", "linear_scan"])
def test_a_right_backend_passes_with_its_error(op):
    assert check_backend(op, "chunked", torch.float32, CPU) < 1e-5
    assert 1e-4 < check_backend(op, "chunked", torch.bfloat16, CPU) < 2e-2


@pytest.mark.parametrize("op", ["ssd", "norm"])
def test_a_wrong_value_is_found(plant, op):
    plant(op, lambda y: 1.001 * y)
    with pytest.raises(
        WrongResultError, match=rf"{op}, backend chunked: output0 .* 0\.001, expected .*not timed"
    ):
        check_backend(op, "chunked", torch.float32, CPU)


def test_a_wrong_gradient_is_found(plant):
    plant("ssd", WrongGradient.apply)
    with pytest.raises(WrongResultError, match=r"backend chunked: d\w+ has a relative error of 0\.0\d+"):
        check_backend("ssd", "chunked", torch.float32, CPU)


def test_what_is_compared():
    one = torch.tensor([3.0, 4.0])
    assert relative_error(one + torch.tensor([0.0, 0.5]), one) == pytest.approx(0.1)
    assert relative_error(torch.full((2,), torch.nan), one) == float("inf")
    assert check_same("a", {"y": one, "more": one}, {"y": one}, 1e-9) == 0
    for found, said in (({}, "y is nothing"), ({"y": one[:1]}, r"y is \(1,\), expected shape \(2,\)")):
        with pytest.raises(WrongResultError, match=said):
            check_same("a", found, {"y": one}, 1.0)
    with pytest.raises(WrongResultError, match="error of inf"):
        check_same("a", {"y": one * torch.nan}, {"y": one}, 1.0)


@pytest.mark.parametrize("work", SMALL.values(), ids=SMALL)
def test_a_part_of_the_output_depends_on_its_part_of_the_inputs_alone(work):
    """The full-size check of the sequential reference, in float64: wrong slices would not agree."""
    inputs = work.inputs(torch.float64, CPU)
    inputs = {
        k: v.double().detach().requires_grad_() if hasattr(v, "double") else v for k, v in inputs.items()
    }
    assert work.check("reference", work.call(inputs, "reference"), inputs, backward=True) < 1e-12


@pytest.mark.parametrize("name", ["selective_scan", "ssd", "causal_conv1d", "norm"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_full_size_result_that_is_wrong_is_found(plant, name, backward):
    work = SMALL[name]
    inputs = work.inputs(torch.float32, CPU)
    call = work.call(inputs, "reference")
    assert work.check(name, call, inputs, backward) < 1e-5
    plant(name, WrongGradient.apply if backward else lambda y: 1.01 * y, "reference")
    with pytest.raises(WrongResultError, match=r"d\w+ has" if backward else r"y has .* 0\.01,"):
        work.check(name, call, inputs, backward)


def test_bytes_and_operations_of_a_scan():
    """Counted by hand for batch 2, length 10, 64 channels, 4 states, bf16."""
    work = workloads.selective_scan(2, 10, 64, n=4)
    inputs = work.inputs(torch.bfloat16, CPU)
    tokens, vectors, wide = 2 * (2 * 10 * 64), 2 * (2 * 10 * 4), 4 * (64 * 4 + 64 + 64)
    read = 3 * tokens + 2 * vectors + wide
    assert work.moved(inputs, backward=False) == read + tokens
    assert work.moved(inputs, backward=True) == (read + tokens) + (read + tokens) + read
    assert work.flops(inputs, backward=False) == 7 * 2 * 10 * 64 * 4
    assert work.flops(inputs, backward=True) == 3 * work.flops(inputs, backward=False)


def test_causal_attention_counts_half():
    work = workloads.attention(1, 8, 2, p=4)
    assert work.flops(work.inputs(torch.float32, CPU), backward=False) == 4 * 8 * 8 * 8 // 2


def test_inputs_are_those_of_a_fresh_model():
    inputs = workloads.ssd(1, 4, 300).inputs(torch.float32, CPU)
    steps = torch.nn.functional.softplus(inputs["dt_bias"])
    assert 0.00099 < steps.min() < 0.002
    assert 0.05 < steps.max() < 0.1001
    again = workloads.ssd(1, 4, 300).inputs(torch.float32, CPU)
    assert torch.equal(inputs["x"], again["x"])


def test_a_speaker_that_says_something_else_is_found():
    torch.manual_seed(0)
    model, other = (
        LanguageModel(LanguageModelConfig(vocab_size=31, d_model=64, pattern="2M")) for _ in range(2)
    )
    for check in (speakers.check_reading, speakers.check_writing, speakers.check_learning):
        assert check("ours", speakers.Ours(model), model) < 1e-5
        with pytest.raises(WrongResultError, match=re.escape("another: ")):
            check("another", speakers.Ours(other), model)


def test_learning_learns_and_writing_remembers():
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(vocab_size=31, d_model=64, pattern="M"))
    tokens = torch.arange(20)[None] % 5
    write = speakers.writing(speakers.Ours(model).decoder(1, tokens), 1, CPU)
    first = [write().item() for _ in range(4)]
    state = model.init_state(1)
    with torch.no_grad():
        model.features(tokens, state)
        token, expected = torch.zeros(1, 1, dtype=torch.int64), []
        for _ in range(4):
            token = model(token, state).argmax(-1)
            expected.append(token.item())
    assert first == expected
    learn = speakers.learning(speakers.Ours(model), tokens[:, :-1], tokens[:, 1:], autocast=False)
    losses = [learn().item() for _ in range(30)]
    assert losses[-1] < 0.98 * losses[0]
