"""The attention mixer: rotary positions, decoding, its growing cache, padding, packing and settings."""

from __future__ import annotations

import pytest
import torch

from mambakit.config import ConfigError
from mambakit.layers import rotary
from mambakit.layers.attention import FIRST_CAPACITY, Attention, AttentionConfig
from mambakit.layers.mixer import Context, MixerConfig, State

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# Positions enter in float32, as published; shifting all of them moves a float64 result by that rounding.
SHIFTED = {"rtol": 1e-4, "atol": 1e-5}
CONFIGS = {
    "plain": AttentionConfig(n_heads=4, rope=None),
    "rope": AttentionConfig(n_heads=4, n_kv_heads=2),
    "partial": AttentionConfig(n_heads=4, n_kv_heads=1, rope_fraction=0.5, rope_interleaved=True),
    "window": AttentionConfig(n_heads=2, head_dim=6, window=4),
    "conv": AttentionConfig(n_heads=4, n_kv_heads=2, d_conv=3),
    "biased": AttentionConfig(n_heads=2, qkv_bias=True, out_bias=True, scale=0.5, rope=500.0),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def mixer(request):
    """A mixer of width 16 in float64, biases drawn too."""
    torch.manual_seed(0)
    made = request.param.build(16, dtype=torch.float64)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made


def activations(b=2, l=9, d=16):
    return torch.randn(b, l, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_complex_multiplication(interleaved):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 0, 100, 3]])
    y = rotary.rotate(x, *rotary.angles(positions, 6, 10000.0), interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 3) for i in range(3)]
    for i, (first, second) in enumerate(pairs):
        turn = torch.exp(1j * positions.double() * 10000.0 ** (-2 * i / 6))[..., None]
        expected = torch.complex(x[..., first], x[..., second]) * turn
        found = torch.complex(y[..., first], y[..., second])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert torch.equal(y[0, 0], x[0, 0])  # position 0 does not turn


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_relative_positions_only(interleaved):
    q, k = torch.randn(1, 6, 2, 8, dtype=torch.float64), torch.randn(1, 6, 2, 8, dtype=torch.float64)

    def scores(shift):
        cos, sin = rotary.angles(torch.arange(6) + shift, 8, 10000.0)
        turned = (rotary.rotate(t, cos, sin, interleaved=interleaved) for t in (q, k))
        return torch.einsum("blhp,bmhp->bhlm", *turned)

    torch.testing.assert_close(scores(0), scores(1000), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scores(0), torch.einsum("blhp,bmhp->bhlm", q, k), atol=0.1)


def test_rotation_rounds_once():
    x = torch.randn(1, 50, 2, 8).bfloat16()
    cos, sin = rotary.angles(torch.arange(50), 8, 10000.0)
    y = rotary.rotate(x, cos, sin)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rotary.rotate(x.float(), cos, sin).bfloat16())


def test_rotary_errors():
    with pytest.raises(ValueError, match="got 5 channels"):
        rotary.angles(torch.arange(3), 5, 10000.0)
    with pytest.raises(ValueError, match="12 channels, but the heads have 8"):
        rotary.rotate(torch.zeros(1, 3, 2, 8), *rotary.angles(torch.arange(3), 12, 10000.0))


@pytest.mark.parametrize("max_length", [None, 9, 4])
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [5, 4], [2, 1, 6]], ids=str)
def test_pieces_with_state_are_the_whole(mixer, cuts, max_length):
    x = activations()
    whole = mixer(x)
    state = mixer.init_state(2, max_length=max_length)
    with torch.no_grad():
        pieces = [mixer(piece, state) for piece in x.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert state["length"] == 9


def test_cache_grows_by_doubling_and_a_window_bounds_it():
    x = activations(l=3 * FIRST_CAPACITY)
    with torch.no_grad():
        grown = Attention(16, CONFIGS["rope"], dtype=torch.float64)
        state, capacities = grown.init_state(2), set()
        pieces = []
        for piece in x.split(1, 1):
            pieces.append(grown(piece, state))
            capacities.add(state["k"].shape[1])
        assert capacities == {FIRST_CAPACITY, 2 * FIRST_CAPACITY, 4 * FIRST_CAPACITY}
        torch.testing.assert_close(torch.cat(pieces, 1), grown(x), **CLOSE)

        windowed = Attention(16, AttentionConfig(n_heads=2, window=FIRST_CAPACITY + 5), dtype=torch.float64)
        state, capacities = windowed.init_state(2), []
        pieces = []
        for piece in x.split(1, 1):
            pieces.append(windowed(piece, state))
            capacities.append(state["k"].shape[1])
        assert capacities[0] == FIRST_CAPACITY and capacities[-1] == FIRST_CAPACITY + 5
        torch.testing.assert_close(torch.cat(pieces, 1), windowed(x), **CLOSE)
    assert windowed.init_state(2, max_length=10**9)["k"].shape[1] == FIRST_CAPACITY + 5
    assert grown.init_state(2, max_length=100)["k"].shape == (2, 100, 2, 4)


def test_left_padded_batch_is_the_unpadded_one(mixer):
    """Two prompts of 4 and 6 tokens side by side, then three more tokens each."""
    long, short = activations(1, 9), activations(1, 9)[:, 2:]
    padded = torch.cat([torch.cat([torch.full((1, 2, 16), 5.0, dtype=torch.float64), short], 1), long])
    seq_idx = torch.tensor([[-1, -1, 0, 0, 0, 0], [0] * 6])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        for context in (Context(seq_idx=seq_idx), Context(seq_idx=seq_idx, positions=positions)):
            state = mixer.init_state(2)
            ys = [mixer(padded[:, :6], state, context)]
            for t in range(6, 9):
                counted = None if context.positions is None else torch.tensor([[t - 2], [t]])
                ys.append(mixer(padded[:, t : t + 1], state, Context(positions=counted)))
            y = torch.cat(ys, 1)
            close = SHIFTED if context.positions is None else CLOSE
            torch.testing.assert_close(y[:1, 2:], mixer(short), **close)
            torch.testing.assert_close(y[1:], mixer(long), **CLOSE)


def test_packed_documents_are_separate(mixer):
    x = activations(1, 9)
    seq_idx = torch.tensor([[0] * 5 + [1] * 4])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    y = mixer(x, context=Context(seq_idx=seq_idx, positions=positions))
    torch.testing.assert_close(y, torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1), **CLOSE)
    counted = mixer(x, context=Context(seq_idx=seq_idx))
    torch.testing.assert_close(counted, y, **SHIFTED)
    changed = torch.cat([3 * x[:, :5] + 1, x[:, 5:]], 1)
    moved = mixer(changed, context=Context(seq_idx=seq_idx))
    assert torch.equal(moved[:, 5:], counted[:, 5:]) and not torch.equal(moved[:, :5], counted[:, :5])


def test_state_forks_reorders_empties_and_is_saved(mixer, tmp_path):
    x = activations(2, 9)
    with torch.no_grad():
        state = mixer.init_state(2, max_length=16)
        mixer(x[:, :5], state)
        state.save(tmp_path / "state.safetensors")
        swapped = state.select(torch.tensor([1, 0]))
        cleared = state.clone()
        cleared.reset(torch.tensor([0]))
        rest = mixer(x[:, 5:], state)
        torch.testing.assert_close(rest, mixer(x)[:, 5:], **CLOSE)
        loaded = State.load(tmp_path / "state.safetensors")
        assert torch.equal(mixer(x[:, 5:], loaded), rest)
        torch.testing.assert_close(mixer(x[:, 5:].flip(0), swapped).flip(0), rest, **CLOSE)
        again = mixer(x[:, 5:], cleared)
        torch.testing.assert_close(again[:1], mixer(x[:1, 5:]), **SHIFTED)
        torch.testing.assert_close(again[1:], rest[1:], **CLOSE)
        state.reset()
        torch.testing.assert_close(mixer(x, state), mixer(x), **CLOSE)


def test_looks_both_ways_only_without_state():
    mixer = Attention(16, AttentionConfig(n_heads=2, causal=False))
    x = torch.randn(1, 6, 16)
    changed = torch.cat([x[:, :5], x[:, 5:] + 1], 1)
    assert not torch.allclose(mixer(x)[:, 0], mixer(changed)[:, 0])
    with pytest.raises(ValueError, match="state needs causal=True"):
        mixer(x, mixer.init_state(1))


def test_parameters():
    mixer = AttentionConfig(
        n_heads=4, n_kv_heads=2, head_dim=3, rope=None, qkv_bias=True, out_bias=True
    ).build(8)
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (12, 8),
        "q_proj.bias": (12,),
        "k_proj.weight": (6, 8),
        "k_proj.bias": (6,),
        "v_proj.weight": (6, 8),
        "v_proj.bias": (6,),
        "out_proj.weight": (8, 12),
        "out_proj.bias": (8,),
    }
    assert all(value.abs().sum() == 0 for name, value in mixer.state_dict().items() if name.endswith("bias"))
    torch.nn.init.ones_(mixer.q_proj.bias)
    before = mixer.q_proj.weight.clone()
    mixer.reset_parameters()
    assert mixer.q_proj.bias.abs().sum() == 0 and not torch.equal(mixer.q_proj.weight, before)
    assert mixer.q_proj.weight.abs().max() <= 8**-0.5


def test_trains_and_trains_under_autocast():
    torch.manual_seed(0)
    mixer, x = Attention(16, CONFIGS["rope"]), torch.randn(2, 9, 16)
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            y = mixer(x)
        y.float().square().sum().backward()
        assert y.dtype == kind
        gradients = [p.grad.clone() for p in mixer.parameters()]
        mixer.zero_grad()
        if kind == torch.float32:
            exact = gradients
    for rounded, right in zip(gradients, exact, strict=True):
        assert (rounded - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize("name", ["rope", "window"])
def test_traces_whole(name):
    mixer, x = Attention(16, CONFIGS[name]), torch.randn(2, 9, 16)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x))


def test_settings():
    assert MixerConfig.members["attention"] is AttentionConfig
    assert AttentionConfig.from_dict({"n_heads": 2, "rope": None, "window": 8}) == AttentionConfig(
        n_heads=2, rope=None, window=8
    )
    with pytest.raises(ConfigError, match="did you mean 'n_heads'"):
        AttentionConfig.from_dict({"n_head": 2})
    with pytest.raises(ValueError, match="n_kv_heads=3, expected a divisor of n_heads=8"):
        AttentionConfig(n_kv_heads=3)
    with pytest.raises(ValueError, match="window=0"):
        AttentionConfig(window=0)
    with pytest.raises(ValueError, match=r"rope_fraction=1\.5"):
        AttentionConfig(rope_fraction=1.5)
    with pytest.raises(ValueError, match="d_model=20 does not split into n_heads=8; give head_dim"):
        Attention(20)
    with pytest.raises(ValueError, match="turns 3 of 6 channels"):
        Attention(16, AttentionConfig(head_dim=6, rope_fraction=0.5))
