"""Any backbone: continuing a sequence through its state is the same as one forward over the whole."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers.attention import AttentionConfig
from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.layers.mixer import Context, State
from mambakit.layers.mlp import GatedMLPConfig
from mambakit.layers.s4 import S4Config
from mambakit.layers.s4d import S4DConfig
from mambakit.layers.signed_mamba1 import SignedMamba1Config
from mambakit.models import LanguageModel, LanguageModelConfig

MIXERS = {
    "M": Mamba1Config(d_state=4),
    "2": Mamba2Config(d_state=8, headdim=8, ngroups=2),
    "N": SignedMamba1Config(d_state=4),
    "S": S4Config(d_state=8),
    "D": S4DConfig(d_state=8),
    "*": AttentionConfig(n_heads=4, n_kv_heads=2, rope=10000.0),
    "W": AttentionConfig(n_heads=4, window=5),
    "-": GatedMLPConfig(),
}
PATTERNS = ["MM", "NM", "S-", "D-", "W-", "M-*-", "MNS*D-W"]


def model_of(pattern: str, **settings) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=29, d_model=32, pattern=pattern, mixers=MIXERS, **settings)
    return LanguageModel(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("pattern", [*PATTERNS, "2(M-)"])
def test_decode_token_by_token_is_the_full_forward(pattern):
    model = model_of(pattern)
    tokens = torch.randint(0, 29, (2, 23))
    with torch.no_grad():
        full = model(tokens)
        state = model.init_state(2)
        steps = torch.cat([model(tokens[:, t : t + 1], state) for t in range(23)], dim=1)
    torch.testing.assert_close(steps, full, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunked_prefill_is_the_full_forward(pattern):
    model = model_of(pattern)
    tokens = torch.randint(0, 29, (2, 40))
    with torch.no_grad():
        full = model(tokens)
        state = model.init_state(2, max_length=40)
        parts = torch.cat([model(part, state) for part in tokens.split([17, 1, 3, 19], dim=1)], dim=1)
    torch.testing.assert_close(parts, full, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_do_not_leak(pattern):
    model = model_of(pattern)
    tokens = torch.randint(0, 29, (1, 40))
    seq_idx = torch.tensor([[0] * 13 + [1] * 27])
    other = tokens.clone()
    other[0, :13] = (other[0, :13] + 1) % 29
    with torch.no_grad():
        packed = model(tokens, context=Context(seq_idx=seq_idx))
        moved = model(other, context=Context(seq_idx=seq_idx))
        alone = model(tokens[:, 13:])
    assert not torch.equal(packed[:, :13], moved[:, :13])
    assert torch.equal(packed[:, 13:], moved[:, 13:])
    # Rotary angles are float32: the same distance at other positions differs in their last bits.
    torch.testing.assert_close(
        packed[:, 13:], alone, rtol=0, atol=1e-7 if set(pattern) & {"*", "W"} else 1e-9
    )


def test_saved_state_continues_the_sequence(tmp_path):
    model = model_of("MNS*D-W")
    tokens = torch.randint(0, 29, (2, 30))
    with torch.no_grad():
        full = model(tokens)
        state = model.init_state(2)
        model(tokens[:, :20], state)
        state.save(tmp_path / "s.safetensors")
        resumed = State.load(tmp_path / "s.safetensors")
        rest = model(tokens[:, 20:], resumed)
    torch.testing.assert_close(rest, full[:, 20:], rtol=0, atol=1e-9)


def test_selected_rows_continue_their_own_sequences():
    model = model_of("MNS*D-W")
    tokens = torch.randint(0, 29, (3, 30))
    with torch.no_grad():
        full = model(tokens)
        state = model.init_state(3)
        model(tokens[:, :20], state)
        rest = model(tokens[[2, 0], 20:], state.select(torch.tensor([2, 0])))
    torch.testing.assert_close(rest, full[[2, 0], 20:], rtol=0, atol=1e-9)


def test_left_padding_as_a_document_of_its_own():
    """Rows of unequal length, padded on the left: each continues as if it were alone."""
    model = model_of("MN*-W")
    tokens = torch.randint(0, 29, (1, 12))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], dim=1)
    seq_idx = torch.tensor([[0] * 5 + [1] * 12])
    with torch.no_grad():
        alone = model(tokens)
        state = model.init_state(1)
        first = model(padded[:, :14], state, Context(seq_idx=seq_idx[:, :14]))
        then = model(padded[:, 14:], state, Context(seq_idx=seq_idx[:, 14:]))
    torch.testing.assert_close(torch.cat([first[:, 5:], then], 1), alone, rtol=0, atol=1e-7)


def test_output_projections_are_scaled_for_depth():
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=29, d_model=256, pattern="8(M-)", mixers={"M": Mamba2Config()})
    model = LanguageModel(config)
    for block in model.backbone.blocks:
        weight = block.mixer.out_proj.weight
        # kaiming_uniform(a=sqrt 5) has a standard deviation of 1 / sqrt(3 fan_in); 16 branches divide by 4.
        assert weight.std().item() == pytest.approx((3 * weight.shape[1]) ** -0.5 / 4, rel=0.05)


def test_activation_checkpointing_changes_no_gradient():
    model = model_of("M-*-")
    tokens = torch.randint(0, 29, (2, 20))
    gradients = []
    for recompute in (False, True):
        model.backbone.checkpoint_blocks = recompute
        model.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15)])
def test_bfloat16_model_is_close_to_float64(dtype, tolerance):
    model = model_of("M-*-")
    tokens = torch.randint(0, 29, (2, 20))
    narrow = LanguageModel(model.config, dtype=torch.bfloat16).eval()
    narrow.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, found = model(tokens), narrow(tokens)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 0.05
