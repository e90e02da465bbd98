"""The modules: parameters under their names, the networks that others compute, decoding equal to reading."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import mambakit
from mambakit import layers
from mambakit.compat.generation import InferenceParams
from mambakit.compat.language import MambaConfig, MambaLMHeadModel
from mambakit.compat.mamba import Mamba
from mambakit.compat.mamba2 import Mamba2
from mambakit.compat.mamba3 import Mamba3
from mambakit.compat.ssd import mamba_split_conv1d_scan_combined

F64 = torch.float64
BLOCKS = {
    "Mamba": lambda **more: Mamba(16, d_state=4, dtype=F64, **more),
    "Mamba without biases": lambda **more: Mamba(
        16, d_conv=3, conv_bias=False, dt_init="constant", dtype=F64, **more
    ),
    "Mamba2": lambda **more: Mamba2(16, d_state=6, headdim=8, ngroups=2, dtype=F64, **more),
    "Mamba2 with everything": lambda **more: Mamba2(
        16,
        d_state=6,
        headdim=8,
        d_ssm=16,
        D_has_hdim=True,
        rmsnorm=False,
        bias=True,
        dt_limit=(0.01, 0.05),
        conv_init=0.5,
        dtype=F64,
        **more,
    ),
    "Mamba2 gated late": lambda **more: Mamba2(
        16, d_state=6, headdim=4, d_ssm=24, norm_before_gate=True, dtype=F64, **more
    ),
    "Mamba3": lambda **more: Mamba3(16, d_state=8, headdim=8, dtype=F64, **more),
    "Mamba3 MIMO": lambda **more: Mamba3(
        16,
        d_state=8,
        headdim=8,
        ngroups=2,
        is_mimo=True,
        mimo_rank=2,
        is_outproj_norm=True,
        dtype=F64,
        **more,
    ),
}
NAMES = {
    "Mamba": "A_log D conv1d.bias conv1d.weight dt_proj.bias dt_proj.weight in_proj.weight out_proj.weight "
    "x_proj.weight",
    "Mamba2": "A_log D conv1d.bias conv1d.weight dt_bias in_proj.weight norm.weight out_proj.weight",
    "Mamba3": "B_bias B_norm.weight C_bias C_norm.weight D dt_bias in_proj.weight out_proj.weight",
    "Mamba3 MIMO": "B_bias B_norm.weight C_bias C_norm.weight D dt_bias in_proj.weight mimo_o mimo_x mimo_z "
    "norm.weight out_proj.weight",
}


def shaken(module):
    """Every parameter away from its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_their_names(name):
    assert sorted(BLOCKS[name]().state_dict()) == NAMES[name].split()


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_the_blocks_are_those_of_transformers(name, monkeypatch):
    import transformers

    torch.manual_seed(0)
    ours, sizes = shaken(BLOCKS[name]()), {"hidden_size": 16, "num_hidden_layers": 1}
    if name == "Mamba":
        from transformers.models.mamba.modeling_mamba import MambaMixer as Mixer

        config = transformers.MambaConfig(**sizes, state_size=4)
    else:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Mixer

        config = transformers.Mamba2Config(
            **sizes, state_size=6, num_heads=4, head_dim=8, n_groups=2, chunk_size=8, layer_norm_epsilon=1e-5
        )
    theirs = Mixer(config, layer_idx=0).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 21, 16, dtype=F64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, **k: to(t, *[F64 if b is torch.float32 else b for b in a], **k)
    )
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("Mamba2")])
def test_mamba2_is_its_function(name):
    """Their block is `mamba_split_conv1d_scan_combined` (held to a loop) after its first projection."""
    torch.manual_seed(0)
    block, u = shaken(BLOCKS[name]()), torch.randn(2, 11, 16, dtype=F64)
    expected = mamba_split_conv1d_scan_combined(
        block.in_proj(u),
        block.conv1d.weight.squeeze(1),
        block.conv1d.bias,
        block.dt_bias,
        -block.A_log.exp(),
        block.D.unflatten(0, (-1, block.headdim)) if block.D_has_hdim else block.D,
        chunk_size=8,
        dt_limit=block.dt_limit,
        rmsnorm_weight=block.norm.weight if block.rmsnorm else None,
        rmsnorm_eps=1e-5,
        outproj_weight=block.out_proj.weight,
        outproj_bias=block.out_proj.bias,
        headdim=block.headdim,
        ngroups=block.ngroups,
        norm_before_gate=block.norm_before_gate,
    )
    torch.testing.assert_close(block(u), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(u.flatten(0, 1), seqlen=11), expected.flatten(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Mamba3", "Mamba3 MIMO"])
def test_mamba3_takes_the_parameters_of_ours(name):
    torch.manual_seed(0)
    block = shaken(BLOCKS[name]())
    ours = layers.Mamba3(16, block.config, dtype=F64)
    ours.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 16, dtype=F64)
    torch.testing.assert_close(block(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_is_reading(name):
    """A prompt, several tokens at once, then one by one, through `inference_params` and through `step`."""
    torch.manual_seed(0)
    block, x = shaken(BLOCKS[name](layer_idx=3)), torch.randn(2, 12, 16, dtype=F64)
    whole = block(x)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    pieces = []
    for start, end in ((0, 5), (5, 8), (8, 9), (9, 10)):
        pieces.append(block(x[:, start:end], inference_params=params))
        params.seqlen_offset = end
    states = params.key_value_memory_dict[3]
    for t in (10, 11):
        token = x[:, t] if name.startswith("Mamba3") else x[:, t : t + 1]
        y, *after = block.step(token, *states)
        assert all(a is b for a, b in zip(after, states, strict=True))
        pieces.append(y.reshape(2, 1, 16))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
    params.reset(12, 2)  # old states are overwritten by a new prompt
    torch.testing.assert_close(block(x, inference_params=params), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Mamba2", "Mamba2 with everything", "Mamba3"])
def test_packed_documents_are_separate_ones(name):
    torch.manual_seed(0)
    block, x = shaken(BLOCKS[name](layer_idx=0)), torch.randn(1, 12, 16, dtype=F64)
    bounds, numbers = torch.tensor([0, 5, 7, 12]), torch.tensor([[0] * 5 + [1] * 2 + [2] * 5])
    alone = torch.cat([block(x[:, a:b]) for a, b in ((0, 5), (5, 7), (7, 12))], 1)
    for more in ({"seq_idx": numbers}, {"cu_seqlens": bounds}, {"seq_idx": numbers, "cu_seqlens": bounds}):
        torch.testing.assert_close(block(x, **more), alone, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="say differently"):
        block(x, seq_idx=torch.zeros_like(numbers), cu_seqlens=bounds)


def test_packed_prompts_are_continued_as_a_batch():
    torch.manual_seed(0)
    block, x = shaken(BLOCKS["Mamba2"](layer_idx=0)), torch.randn(1, 12, 16, dtype=F64)
    new = torch.randn(3, 1, 16, dtype=F64)
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    block(x, cu_seqlens=torch.tensor([0, 5, 7, 12]), inference_params=params)
    params.seqlen_offset = 12
    y = block(new, inference_params=params)
    for row, (start, end) in enumerate(((0, 5), (5, 7), (7, 12))):
        whole = block(torch.cat([x[:, start:end], new[row : row + 1]], 1))
        torch.testing.assert_close(y[row], whole[0, -1:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="seq_idx or cu_seqlens"):
        block(new, seq_idx=torch.zeros(3, 1), inference_params=params)


def test_recurrent_states_are_float32_in_a_narrow_model():
    for block in (Mamba(16, dtype=torch.bfloat16), Mamba2(16, headdim=8, dtype=torch.bfloat16)):
        conv, ssm = block.allocate_inference_cache(2, 10)
        assert conv.dtype == torch.bfloat16 and ssm.dtype == torch.float32
        assert conv.shape[-1] == block.d_conv


def test_an_adapter_on_any_projection_has_a_gradient():
    """Theirs reaches into the projections' weights, so an adapter around a projection trains nothing."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.low = torch.nn.Linear(base.in_features, base.out_features, bias=False, dtype=F64)

        def forward(self, x):
            return self.base(x) + self.low(x)

    for block in (BLOCKS["Mamba"](), BLOCKS["Mamba2"](), BLOCKS["Mamba3"]()):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            if hasattr(block, name):
                setattr(block, name, Adapted(getattr(block, name)))
        block(torch.randn(2, 5, 16, dtype=F64)).square().sum().backward()
        adapters = [m.low.weight.grad for m in block.modules() if isinstance(m, Adapted)]
        assert len(adapters) >= 2 and all(g is not None and g.abs().max() > 0 for g in adapters)


def test_what_blocks_cannot_do_is_refused_by_name():
    for message, call in {
        "process_group": lambda: Mamba2(16, headdim=8, process_group=object()),
        "dropout is 0.1": lambda: Mamba3(16, headdim=8, dropout=0.1),
        "inplace_state": lambda: BLOCKS["Mamba3"]().allocate_inference_cache(1, 1, inplace_state=object()),
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            call()
    for message, call in {
        "d_ssm is 12": lambda: Mamba2(16, headdim=8, d_ssm=12),
        "unknown dt_init 'randon'": lambda: Mamba(16, dt_init="randon"),
        "layer_idx is None": lambda: Mamba(16)(torch.randn(1, 2, 16), InferenceParams(2, 1)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# Language models


def config(layer, **more):
    cfg = {
        "Mamba1": {"d_state": 4},
        "Mamba2": {"d_state": 6, "headdim": 8},
        "Mamba3": {"d_state": 8, "headdim": 8},
    }
    return MambaConfig(
        d_model=16,
        n_layer=3,
        vocab_size=45,
        ssm_cfg={"layer": layer, **cfg[layer]},
        **more,
    )


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2", "Mamba3"])
@pytest.mark.parametrize(
    "more", [{}, {"d_intermediate": 40, "tie_embeddings": False, "fused_add_norm": False}]
)
def test_a_language_model_is_the_one_that_its_checkpoint_describes(layer, more, tmp_path):
    """Saved as theirs saves, read by `mambakit.load` (held to transformers elsewhere) and by itself."""
    torch.manual_seed(0)
    model = shaken(MambaLMHeadModel(config(layer, **more), dtype=F64))
    assert model.lm_head.weight.shape == (48, 16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(model.config)
    tokens = torch.randint(0, 45, (2, 17))
    expected = model(tokens).logits
    torch.testing.assert_close(mambakit.load(tmp_path)(tokens), expected, rtol=0, atol=1e-10)
    again = MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=F64)
    assert torch.equal(again(tokens, num_last_tokens=3).logits, expected[:, -3:])
    assert (again.lm_head.weight is again.backbone.embedding.weight) == model.config.tie_embeddings
    names = set(model.state_dict())
    assert names == set(again.state_dict())
    assert names > {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}


def test_layer_norms_and_a_narrow_residual_stream(tmp_path):
    """Against the sum written out with `nn.LayerNorm`."""
    torch.manual_seed(0)
    model = shaken(MambaLMHeadModel(config("Mamba1", rms_norm=False, residual_in_fp32=False), dtype=F64))
    tokens = torch.randint(0, 45, (2, 9))
    x = model.backbone.embedding(tokens)
    for block in model.backbone.layers:
        assert isinstance(block.norm, torch.nn.LayerNorm)
        x = x + block.mixer(block.norm(x))
    torch.testing.assert_close(
        model(tokens).logits, model.lm_head(model.backbone.norm_f(x)), rtol=0, atol=1e-12
    )


def greedy(model, tokens, count):
    """Reading everything again for every token; the vocabulary's padding is never chosen."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:, :45].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2", "Mamba3"])
def test_generation_is_reading_again_and_again(layer):
    torch.manual_seed(0)
    model, tokens = shaken(MambaLMHeadModel(config(layer), dtype=F64)), torch.randint(0, 45, (2, 6))
    expected = greedy(model, tokens, 10)
    assert torch.equal(model.generate(tokens, max_length=16, vocab_size=45), expected)

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    found = model.generate(
        tokens,
        max_length=16,
        return_dict_in_generate=True,
        output_scores=True,
        streamer=streamer,
        vocab_size=45,
    )
    logits = model(found.sequences).logits[:, 5:-1, :45]
    torch.testing.assert_close(torch.stack(found.scores, 1), logits, rtol=0, atol=1e-9)
    assert streamer.ended and torch.equal(torch.cat(streamer.tokens, 1), found.sequences)


def test_generation_ends_row_by_row():
    torch.manual_seed(0)
    model, tokens = shaken(MambaLMHeadModel(config("Mamba2"), dtype=F64)), torch.randint(0, 45, (3, 6))
    free = model.generate(tokens, max_length=26)
    end = int(free[0, 8])
    found = model.generate(tokens, max_length=26, eos_token_id=end)
    for row, line in enumerate(free[:, 6:]):
        stops = (line == end).nonzero()
        length = int(stops[0]) + 1 if len(stops) else 20
        own = found[row, 6 : 6 + length]
        assert torch.equal(own, line[: len(own)]) and (found[row, 6 + length :] == end).all()
    alone = model.generate(tokens[:1], max_length=26, eos_token_id=end)
    assert alone.shape[1] <= 9 and alone[0, -1] == end


def test_sampling_follows_torch_seed_and_stays_within_its_filters():
    torch.manual_seed(0)
    model, tokens = shaken(MambaLMHeadModel(config("Mamba1"), dtype=F64)), torch.randint(0, 45, (4, 6))
    settings = {"max_length": 26, "top_k": 3, "top_p": 0.9, "temperature": 2.0, "vocab_size": 45}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(tokens, **settings))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    logits = model(drawn[2]).logits[:, 5:-1, :45]
    rank = (logits > logits.gather(-1, drawn[2][:, 6:, None])).sum(-1)
    assert 1 <= rank.max() <= 2
    teacher = torch.randint(0, 45, (4, 9))
    teacher[:, :6] = tokens
    forced = model.generate(tokens, max_length=12, teacher_outputs=teacher, vocab_size=45)
    assert torch.equal(forced[:, :9], teacher) and torch.equal(forced, greedy(model, teacher, 3))
    narrow = model.generate(tokens, max_length=12, top_k=0, min_p=1 - 1e-9, vocab_size=45)
    assert torch.equal(narrow, greedy(model, tokens, 6))


def test_what_generation_cannot_do_is_refused_by_name():
    model, tokens = MambaLMHeadModel(config("Mamba1")), torch.randint(0, 45, (1, 3))
    for name in ("cg", "enable_timing"):
        with pytest.raises(NotImplementedError, match=f"{name} is True"):
            model.generate(tokens, max_length=5, **{name: True})
    with pytest.raises(ValueError, match=r"min_p is 0\.1 with top_k=5"):
        model.generate(tokens, max_length=5, top_k=5, min_p=0.1)
    with pytest.raises(NotImplementedError, match="attn_layer_idx"):
        MambaLMHeadModel(config("Mamba1", attn_layer_idx=[1]))
    with pytest.raises(ValueError, match="unknown layer 'Mamba4'"):
        MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, ssm_cfg={"layer": "Mamba4"}))
    with pytest.raises(NotImplementedError, match="batch_size_offset is 1"):
        model(tokens, inference_params=InferenceParams(5, 1, batch_size_offset=1))


def test_the_start_is_divided_once_by_the_branches():
    """Theirs starts a second time without counting the MLPs: 1 / sqrt(L) where 1 / sqrt(2 L) is meant."""
    torch.manual_seed(0)
    many = MambaConfig(d_model=64, n_layer=8, vocab_size=50, d_intermediate=128)
    model = MambaLMHeadModel(many)
    for weights in (
        [block.mixer.out_proj.weight for block in model.backbone.layers],
        [block.mlp.fc2.weight for block in model.backbone.layers],
    ):
        uniform = 1 / math.sqrt(3 * weights[0].shape[1])  # standard deviation of PyTorch's initial weights
        found = torch.stack(weights).std().item()
        assert found == pytest.approx(uniform / math.sqrt(2 * 8), rel=0.02)
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
