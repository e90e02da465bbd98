"""Mamba-1 and Mamba-2 models equal transformers' own on random weights in float64."""

from __future__ import annotations

import pytest
import torch

from mambakit.layers.mamba1 import Mamba1Config
from mambakit.layers.mamba2 import Mamba2Config
from mambakit.models import LanguageModel, LanguageModelConfig

transformers = pytest.importorskip("transformers")

RENAMED = {
    "backbone.embeddings.": "embedding.",
    "backbone.layers.": "backbone.blocks.",
    "mixer.dt_proj.bias": "mixer.ssm.dt_bias",
    "mixer.dt_proj.": "mixer.ssm.dt_proj.",
    "mixer.x_proj.": "mixer.ssm.x_proj.",
}
INNER = {"mamba": {"mixer.A_log": "mixer.ssm.A_log", "mixer.D": "mixer.ssm.D"}, "mamba2": {}}


def ours_from(theirs, config):
    """A model of ours with the weights of theirs."""
    model = LanguageModel(config, dtype=torch.float64)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in {**RENAMED, **INNER[theirs.config.model_type]}.items():
            name = name.replace(old, new)
        weights[name] = tensor
    model.load_state_dict(weights)
    return model.eval()


def mamba(bias: bool):
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "state_size": 5,
        "num_hidden_layers": 2,
        "use_bias": bias,
    }
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**settings, conv_kernel=4, expand=2))
    mixer = Mamba1Config(d_state=5, bias=bias)
    return theirs, LanguageModelConfig(vocab_size=50, d_model=32, pattern="2M", mixers={"M": mixer})


def mamba2(bias: bool):
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "state_size": 6,
        "num_hidden_layers": 2,
        "use_bias": bias,
    }
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **settings, num_heads=8, head_dim=8, n_groups=2, chunk_size=16, tie_word_embeddings=True
        )
    )
    mixer = Mamba2Config(d_state=6, headdim=8, ngroups=2, bias=bias)
    return theirs, LanguageModelConfig(vocab_size=50, d_model=32, pattern="2M", mixers={"M": mixer})


@pytest.fixture
def in_float64(monkeypatch):
    """Keep transformers' code in float64: it casts norms, decay rates and logits to float32 by hand."""
    to = torch.Tensor.to

    def wide(tensor, *args, **kwargs):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return to(tensor, *args, **kwargs)

    def run(model, tokens):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.Tensor, "to", wide)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return model(tokens).logits

    return run


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [mamba, mamba2])
def test_logits_equal(make, bias, in_float64):
    torch.manual_seed(0)
    theirs, config = make(bias)
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = ours_from(theirs, config)
    tokens = torch.randint(0, 50, (3, 41))
    expected = in_float64(theirs, tokens)
    with torch.no_grad():
        found = model(tokens)
    assert found.dtype == expected.dtype == torch.float64
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
