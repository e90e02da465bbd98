"""Low-rank adapters: none is passed by, merging is exact, and the PEFT library reads and writes the same."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from mambakit import generate, ops
from mambakit.config import ConfigError
from mambakit.generation import Sampling
from mambakit.layers import LoRAConfig, LoRALinear, Mamba1Config, Mamba2Config, Mamba3Config, lora
from mambakit.models import LanguageModel, LanguageModelConfig

MIXERS = {
    "S": Mamba1Config(d_state=4),
    "M": Mamba2Config(d_state=8, headdim=8),
    "T": Mamba3Config(d_state=8, headdim=8),
}
CONFIG = LoRAConfig(rank=3, alpha=5.0)


def model(pattern: str = "SM-", dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=29, d_model=16, pattern=pattern, mixers=MIXERS)
    return LanguageModel(config, dtype=dtype)


def adapted(pattern: str = "SM-", dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model whose adapters do something."""
    made = model(pattern, dtype)
    lora.add_adapters(made, CONFIG)
    for _, layer in lora.adapters(made):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return made


TOKENS = torch.arange(22).view(2, 11) % 29


def test_a_new_adapter_changes_nothing():
    plain, made = model(), model()
    names = lora.add_adapters(made, CONFIG)
    assert "backbone.blocks.0.mixer.ssm.dt_proj" in names and len(names) == 4 + 2 + 2
    assert torch.equal(made(TOKENS), plain(TOKENS))
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names) and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("backend", [None, "chunked"])
@pytest.mark.parametrize("pattern", ["S", "M", "T"])
def test_every_projection_learns_what_its_weight_would(pattern, backend):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW of a plain model that has the same weights."""
    made = adapted(pattern, torch.float32)
    plain = lora.fold(copy.deepcopy(made)).requires_grad_(True)
    with ops.backend(backend) if backend else torch.enable_grad():
        made(TOKENS).square().sum().backward()
        plain(TOKENS).square().sum().backward()
    layers = dict(lora.adapters(made))
    wanted = {"S": {"in_proj", "x_proj", "dt_proj", "out_proj"}}.get(pattern, {"in_proj", "out_proj"})
    assert wanted <= {name.rpartition(".")[2] for name in layers}
    for name, layer in layers.items():
        full = plain.get_submodule(name).weight.grad
        A, B, s = layer.lora_A.weight, layer.lora_B.weight, layer.scale
        assert full.abs().max() > 0
        torch.testing.assert_close(B.grad, s * full @ A.detach().T, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(A.grad, s * B.detach().T @ full, rtol=2e-3, atol=1e-4)
        assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_undone_to_the_last_bit(dtype):
    made = adapted(dtype=dtype)
    before = {name: layer.weight.clone() for name, layer in lora.adapters(made)}
    lora.merge(made)
    assert all(not torch.equal(layer.weight, before[name]) for name, layer in lora.adapters(made))
    lora.merge(made)  # a second time changes nothing
    lora.unmerge(made)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in lora.adapters(made))


def test_merged_folded_and_beside_are_the_same():
    made = adapted()
    beside = made(TOKENS)
    lora.merge(made)
    torch.testing.assert_close(made(TOKENS), beside, rtol=1e-12, atol=1e-12)
    lora.unmerge(made)
    folded = lora.fold(copy.deepcopy(made))
    assert not any(isinstance(module, LoRALinear) for module in folded.modules())
    assert folded.state_dict().keys() == model().state_dict().keys()
    torch.testing.assert_close(folded(TOKENS), beside, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(beside, model()(TOKENS))


def test_generation_sees_the_adapters():
    made = adapted(dtype=torch.float32).eval()
    greedy = {"max_tokens": 80, "sampling": Sampling(temperature=0.0)}
    assert torch.equal(
        generate(made, TOKENS, **greedy), generate(lora.fold(copy.deepcopy(made)), TOKENS, **greedy)
    )


def test_dropout_acts_on_the_adapter_only():
    layer = LoRALinear(torch.nn.Linear(8, 8), LoRAConfig(rank=2, dropout=0.5))
    x = torch.randn(4, 8)
    assert torch.equal(layer.train()(x), layer.eval()(x))  # B is zero
    torch.nn.init.ones_(layer.lora_B.weight)
    assert not torch.equal(layer.train()(x), layer.eval()(x))


def test_saved_and_loaded(tmp_path):
    made = adapted()
    lora.save_adapter(made, tmp_path, CONFIG, modules=("backbone.norm_f",))
    other = model()
    assert lora.load_adapter(other, tmp_path) == LoRAConfig(
        rank=3, alpha=5.0, targets=tuple(sorted({n.rpartition(".")[2] for n, _ in lora.adapters(made)}))
    )
    assert torch.equal(other(TOKENS), made(TOKENS))


def with_embedding(untied: bool = True) -> LanguageModel:
    made = LanguageModel(
        dataclasses.replace(model("M").config, tie_embeddings=not untied), dtype=torch.float64
    )
    lora.add_adapters(made, dataclasses.replace(CONFIG, targets=("embedding", "in_proj")))
    for _, layer in lora.adapters(made):
        for part in layer.adapter:
            torch.nn.init.normal_(layer.get_parameter(part), std=0.1)
    return made


def test_an_adapted_embedding(tmp_path):
    made = with_embedding()
    beside = made(TOKENS)
    before = made.embedding.weight.clone()
    beside.square().sum().backward()
    full = lora.fold(copy.deepcopy(made)).requires_grad_(True)
    full.zero_grad()
    full(TOKENS).square().sum().backward()
    layer = made.embedding
    expected = layer.scale * layer.lora_embedding_B.T @ full.embedding.weight.grad.T
    torch.testing.assert_close(layer.lora_embedding_A.grad, expected.detach())
    torch.testing.assert_close(full(TOKENS), beside)
    lora.merge(made)
    torch.testing.assert_close(made(TOKENS), beside)
    lora.unmerge(made)
    assert torch.equal(made.embedding.weight, before)
    lora.save_adapter(made, tmp_path, CONFIG)
    torch.manual_seed(0)
    other = LanguageModel(made.config, dtype=torch.float64)
    other.load_state_dict({k: v for k, v in made.state_dict().items() if "lora" not in k})
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(other), str(tmp_path))
    torch.testing.assert_close(theirs(TOKENS), beside)
    lora.load_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS), made(TOKENS))
    with pytest.raises(ConfigError, match="embedding is lm_head too"):
        with_embedding(untied=False)


def test_requests_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'in_proj'"):
        lora.add_adapters(model(), LoRAConfig(targets=("in_porj",)))
    with pytest.raises(ValueError, match="rank=0"):
        LoRAConfig(rank=0)
    with pytest.raises(ConfigError, match="no adapter to save"):
        lora.save_adapter(model(), tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="holds no adapter"):
        lora.load_adapter(model(), tmp_path)
    lora.save_adapter(adapted("SM-"), tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="in the file or in the model, but not in both"):
        lora.load_adapter(model("SM-M"), tmp_path)
    (tmp_path / lora.ADAPTER).write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
    with pytest.raises(ConfigError, match="holds no adapter"):
        lora.load_adapter(model(), tmp_path)


# ---------------------------------------------------------------------------------------------------------
# The PEFT library, on our models as they are


def peft_model(base: LanguageModel, targets: list[str], **changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **changes)
    wrapped = peft.get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def test_peft_trains_every_projection():
    wrapped = peft_model(model("SM"), ["in_proj", "x_proj", "dt_proj", "out_proj"])
    wrapped(TOKENS).square().sum().backward()
    gradients = {
        name: float(parameter.grad.abs().max())
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    assert len(gradients) == 2 * (4 + 2) and all(gradients.values()), gradients


def test_peft_reads_our_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    made = adapted("SM")
    lora.save_adapter(made, tmp_path, CONFIG)
    wrapped = peft.PeftModel.from_pretrained(model("SM"), str(tmp_path))
    torch.testing.assert_close(wrapped(TOKENS), made(TOKENS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wrapped.merge_and_unload()(TOKENS), made(TOKENS), rtol=1e-12, atol=1e-12)


def test_we_read_pefts_adapters(tmp_path):
    wrapped = peft_model(model("SM"), ["in_proj", "out_proj"], modules_to_save=["lm_head"])
    wrapped.save_pretrained(str(tmp_path))
    other = model("SM")
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.clone())  # as PEFT unties what it trains
    lora.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(TOKENS), wrapped(TOKENS), rtol=1e-12, atol=1e-12)
