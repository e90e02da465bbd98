"""What transformers 5.23 gets wrong, shown where that is cheap, and what is right here, from one file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mambakit
from mambakit.families import FAMILIES
from mambakit.models import LanguageModel
from mambakit.testing.toys import TOYS

transformers = pytest.importorskip("transformers")
theirs_is_known = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="their defects were seen in version 5.23"
)
CLASSES = {
    "mamba": "Mamba",
    "falcon_mamba": "FalconMamba",
    "jamba": "Jamba",
    "zamba": "Zamba",
    "mamba2": "Mamba2",
    "bamba": "Bamba",
    "zamba2": "Zamba2",
    "nemotron_h": "NemotronH",
}

ZAMBA = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
    **{"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}


def pair(name, folder, **overrides):
    """One random model in both libraries: written by us, read by them, in float32 there and float64 here."""
    torch.manual_seed(0)
    model = LanguageModel(TOYS[name].ours())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mambakit.save(model, folder, layout="transformers")
    kind = getattr(transformers, f"{CLASSES[name]}ForCausalLM")
    ours = mambakit.load(folder, dtype=torch.float64, overrides=overrides)
    return kind.from_pretrained(folder).eval(), ours


def pieces_of_theirs(model, tokens, sizes):
    """Their logits, piece by piece with their cache."""
    found, cache, key = [], None, None
    for piece in tokens.split(sizes, dim=1):
        given = {} if cache is None else {key: cache}
        out = model(piece, use_cache=True, **given)
        key = "cache_params" if "cache_params" in out else "past_key_values"
        cache = out[key]
        found.append(out.logits)
    return torch.cat(found, dim=1)


def pieces_of_ours(model, tokens, sizes):
    state = model.init_state(len(tokens))
    return torch.cat([model(piece, state) for piece in tokens.split(sizes, dim=1)], dim=1)


def distance(a, b):
    """Largest difference, as a share of the largest logit."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (2, 24), generator=torch.Generator().manual_seed(1))


@theirs_is_known
@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_several_tokens_after_a_cache(name, tmp_path, tokens):
    """Their scans of Mamba-1 begin at zero whatever the cache holds."""
    theirs, ours = pair(name, tmp_path)
    whole = theirs(tokens).logits
    assert distance(pieces_of_theirs(theirs, tokens, [12, 12]), whole) > 0.05
    assert distance(pieces_of_ours(ours, tokens, [12, 12]), ours(tokens)) < 1e-9
    assert distance(ours(tokens), whole) < 1e-4


@theirs_is_known
@torch.no_grad()
@pytest.mark.parametrize("name", ["zamba2", "nemotron_h"])
def test_steps_are_clamped_alike_in_prefill_and_decoding(name, tmp_path, tokens):
    """They clamp steps to `time_step_min` in prefill and not in decoding; `overrides` does it always."""
    torch.manual_seed(0)
    least = 0.05  # larger than the usual 0.001, so that it is felt
    config = TOYS[name].ours()
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mambakit.save(model, tmp_path / "it")
    kind = getattr(transformers, f"{CLASSES[name]}ForCausalLM")
    theirs = kind.from_pretrained(tmp_path / "it", time_step_min=least).eval()
    whole = theirs(tokens).logits
    assert distance(pieces_of_theirs(theirs, tokens, [1] * 24), whole) > 1e-3
    limit = {"time_step_limit": (least, math.inf)}
    as_theirs = mambakit.load(tmp_path / "it", dtype=torch.float64, overrides=limit)
    assert distance(as_theirs(tokens), whole) < 1e-4
    assert distance(pieces_of_ours(as_theirs, tokens, [1] * 24), as_theirs(tokens)) < 1e-9
    free = mambakit.load(tmp_path / "it", dtype=torch.float64)
    assert distance(free(tokens), whole) > 1e-3
    assert distance(pieces_of_ours(free, tokens, [1] * 24), free(tokens)) < 1e-9


@theirs_is_known
@torch.no_grad()
def test_positions_go_on_after_a_cache(tmp_path, tokens):
    """Bamba's count of positions begins again at every call."""
    theirs, ours = pair("bamba", tmp_path)
    whole = theirs(tokens).logits
    assert distance(pieces_of_theirs(theirs, tokens, [12, 12]), whole) > 1e-3
    assert distance(pieces_of_ours(ours, tokens, [12, 12]), ours(tokens)) < 1e-9


@theirs_is_known
def test_a_shared_block_is_shared_whatever_the_head_is():
    """Theirs shares the blocks of Zamba only where the head is the embedding, a setting of something else."""
    config = transformers.ZambaConfig(**ZAMBA, tie_word_embeddings=False)
    layers = transformers.ZambaForCausalLM(config).model.layers
    weights = [layers[n].shared_transf.self_attn.q_proj.weight for n in (1, 2)]
    assert weights[0] is not weights[1] and not torch.equal(*weights)
    ours = LanguageModel(FAMILIES["zamba"].layouts[0].published(**ZAMBA, tie_word_embeddings=False).ours())
    assert ours.lm_head.weight is not ours.embedding.weight
    assert sum("q_proj" in name for name, _ in ours.named_parameters()) == 1


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, as PEFT makes them."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(0.1 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + (x @ self.down.T) @ self.up.T


def adapt(model, names):
    """Adapt every linear layer of these names; the additions by the name of their layer."""
    found = {}
    for place, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child).to(child.weight.dtype))
                found[f"{place}.{name}"] = getattr(module, name)
    return found


@theirs_is_known
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_an_adapter_of_dt_proj_of_theirs_learns_nothing(name, tmp_path, tokens):
    theirs, _ = pair(name, tmp_path)
    adapted = adapt(theirs, {"dt_proj"})
    theirs(tokens).logits.logsumexp(-1).sum().backward()
    assert adapted and all(layer.up.grad is None for layer in adapted.values())


@pytest.mark.parametrize("name", TOYS)
def test_adapters_of_all_projections_learn(name, tokens):
    torch.manual_seed(0)
    model = LanguageModel(TOYS[name].ours())
    adapted = adapt(model, {"in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "k_proj", "v_proj"})
    assert adapted
    model(tokens).logsumexp(-1).sum().backward()
    for where, layer in adapted.items():
        assert layer.up.grad is not None and layer.up.grad.abs().max() > 0, where
        assert layer.down.grad.abs().max() > 0, where


@theirs_is_known
@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_packed_documents_without_kernels(name, tmp_path, tokens):
    """Where no CUDA kernels are they refuse documents in one row, or ignore that there are several."""
    theirs, ours = pair(name, tmp_path)
    number = torch.tensor([[0] * 10 + [1] * 14] * 2)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    if name in ("mamba", "falcon_mamba", "jamba", "mamba2"):
        assert torch.equal(theirs(tokens, seq_idx=number.int()).logits, theirs(tokens).logits)
    else:
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            theirs(tokens, seq_idx=number.int())
    context = mambakit.layers.Context(seq_idx=number, positions=positions)
    assert distance(ours(tokens, None, context)[:, 10:], ours(tokens[:, 10:])) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TOYS if name != "blackmamba"])  # which routes otherwise
def test_training_runs_the_same_network(name, tokens):
    """Their fused paths for training normalise dt of Falcon Mamba, and gate Falcon-H1, in another order."""
    torch.manual_seed(0)
    model = LanguageModel(TOYS[name].ours(), dtype=torch.float64)
    expected = model.eval()(tokens)
    assert torch.equal(model.train()(tokens), expected)


def test_the_families_of_this_file_are_published():
    assert set(CLASSES) <= set(FAMILIES)
