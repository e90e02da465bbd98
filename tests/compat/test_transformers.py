"""transformers' own models with our kernels: what they computed before, padding and training included."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import textwrap
import types

import pytest
import torch
import transformers

from mambakit import compat
from mambakit.compat import transformers_models

HYBRID = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6}
PURE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}
MODELS = {
    "Mamba": {**PURE, "state_size": 5},
    "Mamba2": {**PURE, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16},
    "FalconMamba": {**PURE, "mixer_rms_eps": 1e-3},
    "FalconH1": {**HYBRID, **MAMBA2, "mamba_d_ssm": 64, "mamba_rms_norm": True},
    "Jamba": {**HYBRID, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 3},
    "Zamba": {
        **{
            **HYBRID,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 3,
            "num_hidden_layers": 4,
        },
        **{"attn_layer_period": 2, "attn_layer_offset": 0, "attention_head_dim": 16, "mamba_d_state": 5},
    },
    "Zamba2": {
        **{**HYBRID, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "mamba_d_state": 6},
        **{"num_key_value_heads": 4, "num_hidden_layers": 4, "num_mem_blocks": 1, "time_step_floor": 1e-30},
        **{"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    },
    "Bamba": {**HYBRID, **MAMBA2, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {
        **{**HYBRID, **MAMBA2, "num_local_experts": 0, "shared_intermediate_size": 24},
        **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    },
    "NemotronH": {
        **{k: HYBRID[k] for k in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")},
        **{"layers_block_type": ["linear_attention", "mlp", "full_attention"], "intermediate_size": 48},
        **{"mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "head_dim": 8},
        **{"time_step_min": 1e-30},
    },
}


@pytest.fixture
def in_float64(monkeypatch):
    """Run transformers in float64: it casts to float32 by hand."""

    def widened(function):
        def wide(tensor, *args, **kwargs):
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return function(tensor, *args, **kwargs)

        return wide

    @contextlib.contextmanager
    def wide():
        with monkeypatch.context() as patch:
            for owner, name in (
                (torch.Tensor, "to"),
                (torch.Tensor, "type"),
                (torch.nn.functional, "softmax"),
            ):
                patch.setattr(owner, name, widened(getattr(owner, name)))
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield

    return wide


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def module_of(model):
    return importlib.import_module(type(model).__module__)


def run(model, tokens, mask):
    """Logits in evaluation; in training, the loss's gradients."""
    model.eval()
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    model.train()
    model.zero_grad()
    labels = tokens.masked_fill(mask == 0, -100)
    model(tokens, attention_mask=mask, labels=labels).loss.backward()
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_same(name, in_float64):
    """To 1e-9 in float64, left padding included."""
    model = made(name)
    tokens, mask = torch.randint(1, 50, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    with in_float64():
        expected, wanted = run(model, tokens, mask)
        before = {n: getattr(module_of(model), n, None) for n in transformers_models.FUNCTIONS}
        with compat.install():
            patched = {n for n, f in before.items() if getattr(module_of(model), n, None) is not f}
            found, gradients = run(model, tokens, mask)
        again, _ = run(model, tokens, mask)
    assert patched >= {"causal_conv1d_fn", "causal_conv1d_update"} and len(patched) >= 4
    real = mask.bool()
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[key], rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert torch.equal(again, expected)  # their own functions are back
    assert all(getattr(module_of(model), n, None) is f for n, f in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_same(name):
    """In float32, with a cache, token by token, after a prompt that is padded on the left."""
    model = made(name, torch.float32).eval()
    tokens, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings)
    calls = []
    with compat.install():
        module = module_of(model)
        step = getattr(module, "mamba_selective_state_update", None) or module.mamba2_selective_state_update

        def counted(*args, **kwargs):
            calls.append(1)
            return step(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, step.__name__, counted)
            found = model.generate(tokens, **settings)
    assert torch.equal(found, expected)
    assert len(calls) >= 11  # one for every layer and token: the cache was in use


def test_float32_is_the_same_to_its_rounding():
    for name in ("Mamba", "Mamba2"):
        model = made(name, torch.float32).eval()
        tokens = torch.randint(1, 50, (2, 70))
        with torch.no_grad():
            expected = model(tokens).logits
            with compat.install():
                found = model(tokens).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_documents_keep_apart_where_the_model_can_tell_its_scan():
    """`Mamba2ForCausalLM` itself drops what it is told of documents; its backbone does not."""
    tokens = torch.randint(1, 50, (1, 12))
    seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    model = made("Mamba2", torch.float32).eval().backbone
    with torch.no_grad():
        second = model(tokens[:, 5:]).last_hidden_state
        with compat.install():
            packed = model(tokens, seq_idx=seq_idx).last_hidden_state
            torch.testing.assert_close(packed[:, 5:], second, rtol=1e-4, atol=1e-4)
            with pytest.raises(ValueError, match="causal_conv1d_fn: cu_seqlens is given, expected seq_idx"):
                model(tokens, cu_seqlens=torch.tensor([0, 5, 12]))


def test_packed_documents_are_refused_where_it_cannot():
    with compat.install():
        model = made("Zamba", torch.float32).eval()
        with pytest.raises(ValueError, match="expected no packed documents"):
            model(torch.randint(1, 50, (1, 12)), seq_idx=torch.zeros(1, 12, dtype=torch.int32))


def test_a_module_of_an_older_release_keeps_its_own_and_says_so(monkeypatch):
    """There these names are the packages' functions, or None, beside checks for a GPU."""
    old = types.ModuleType("transformers.models.mamba.modeling_mamba")
    old.causal_conv1d_fn, old.selective_scan_fn = None, print
    monkeypatch.setitem(sys.modules, old.__name__, old)
    with pytest.warns(UserWarning, match=r"modeling_mamba looks its kernels up as older"), compat.install():
        assert old.causal_conv1d_fn is None and old.selective_scan_fn is print


def test_a_model_that_is_imported_later_gets_our_functions_and_loses_them():
    code = """
        import sys
        import mambakit.compat

        mambakit.compat.install()
        assert not any(name.startswith("transformers") for name in sys.modules)
        from transformers.models.mamba import modeling_mamba

        ours = modeling_mamba.mamba_selective_scan
        assert "compat" in ours.__code__.co_filename
        assert modeling_mamba.__spec__.loader is modeling_mamba.__loader__
        import importlib, inspect
        assert "def mamba_selective_scan" in inspect.getsource(modeling_mamba)
        import mamba_ssm
        importlib.reload(modeling_mamba)
        assert "compat" in modeling_mamba.mamba_selective_scan.__code__.co_filename
        mambakit.compat.uninstall()
        theirs = modeling_mamba.mamba_selective_scan
        assert theirs is not ours and "compat" not in theirs.__code__.co_filename
        # Imported while ours stood in, it has not kept ours either.
        assert all("compat" not in str(c.cell_contents) for c in theirs.__closure__)
        assert "mamba_ssm" not in sys.modules
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "done", done.stderr
