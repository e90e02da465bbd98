"""The names of the other packages: there while installed, gone afterwards, real ones never taken silently."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types

import pytest

from mambakit import compat


@pytest.fixture
def no_real_packages(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    compat.uninstall()


def test_every_path_that_people_import(no_real_packages):
    with compat.install():
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
        from mamba_ssm import Mamba, Mamba2, Mamba3, MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as Same
        from mamba_ssm.modules.mamba2 import Mamba2 as Same2
        from mamba_ssm.modules.mamba3 import Mamba3 as Same3
        from mamba_ssm.modules.mamba_simple import Mamba as Same1
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as same_scan
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as GatedRMSNorm
        from mamba_ssm.ops.triton.layernorm_gated import layernorm_fn, rmsnorm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import (
            mamba_chunk_scan_combined,
            mamba_split_conv1d_scan_combined,
        )
        from mamba_ssm.utils.generation import InferenceParams
        from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

        assert (Mamba, Mamba2, Mamba3, MambaLMHeadModel) == (Same1, Same2, Same3, Same)
        assert same_scan is selective_scan_fn and RMSNorm is not GatedRMSNorm
        found = [v for v in locals().values() if isinstance(v, (type, types.FunctionType))]
        assert all(v.__module__.startswith("mambakit.compat") for v in found) and len(found) > 20
        import mamba_ssm.ops.triton.ssd_combined as ssd

        assert ssd is sys.modules["mamba_ssm"].ops.triton.ssd_combined
        assert importlib.util.find_spec("mamba_ssm") is not None
        with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.distributed"):
            importlib.import_module("mamba_ssm.distributed")
        del causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states, mamba_inner_fn, MambaConfig
        del layer_norm_fn, rms_norm_fn, layernorm_fn, rmsnorm_fn, selective_state_update, InferenceParams
        del mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, load_config_hf, load_state_dict_hf
    assert not any(name.split(".")[0] in ("mamba_ssm", "causal_conv1d") for name in sys.modules)


def test_twice_is_once_and_uninstalling_nothing_is_nothing(no_real_packages):
    compat.uninstall()
    compat.install()
    first = sys.modules["mamba_ssm"]
    compat.install()
    assert sys.modules["mamba_ssm"] is first
    compat.uninstall()
    assert "mamba_ssm" not in sys.modules


def test_a_real_package_is_not_taken_silently(no_real_packages, monkeypatch):
    real, part = types.ModuleType("mamba_ssm"), types.ModuleType("mamba_ssm.ops")
    monkeypatch.setitem(sys.modules, "mamba_ssm", real)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", part)
    with pytest.raises(RuntimeError, match="mamba_ssm has been imported already"):
        compat.install()
    assert sys.modules["mamba_ssm"] is real
    with compat.install(replace=True):
        assert sys.modules["mamba_ssm"] is not real
    assert sys.modules["mamba_ssm"] is real and sys.modules["mamba_ssm.ops"] is part


SIGNATURES = """
mamba_ssm.ops.selective_scan_interface.selective_scan_fn: u delta A B C D z delta_bias delta_softplus
    return_last_state
mamba_ssm.ops.selective_scan_interface.mamba_inner_fn: xz conv1d_weight conv1d_bias x_proj_weight
    delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias B_proj_bias C_proj_bias
    delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps
mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined: x dt A B C chunk_size D z dt_bias
    initial_states seq_idx cu_seqlens dt_softplus dt_limit return_final_states return_varlen_states
    state_dtype
mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined: zxbcdt conv1d_weight conv1d_bias
    dt_bias A D chunk_size initial_states seq_idx dt_limit return_final_states activation rmsnorm_weight
    rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate state_dtype
mamba_ssm.ops.triton.selective_state_update.selective_state_update: state x dt A B C D z dt_bias
    dt_softplus state_batch_indices
mamba_ssm.ops.triton.layernorm_gated.layernorm_fn: x weight bias z eps group_size norm_before_gate
    is_rms_norm
mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn: x weight bias z eps group_size norm_before_gate
mamba_ssm.ops.triton.layer_norm.layer_norm_fn: x weight bias residual x1 weight1 bias1 eps dropout_p
    rowscale prenorm residual_in_fp32 is_rms_norm return_dropout_mask
mamba_ssm.ops.triton.layer_norm.rms_norm_fn: x weight bias residual x1 weight1 bias1 eps dropout_p
    rowscale prenorm residual_in_fp32 return_dropout_mask
causal_conv1d.causal_conv1d_fn: x weight bias seq_idx initial_states return_final_states final_states_out
    activation
causal_conv1d.causal_conv1d_update: x conv_state weight bias activation cache_seqlens conv_state_indices
causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states: x cu_seqlens state_len
mamba_ssm.Mamba: d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor
    conv_bias bias use_fast_path layer_idx device dtype
mamba_ssm.Mamba2: d_model d_state d_conv conv_init expand headdim d_ssm ngroups A_init_range D_has_hdim
    rmsnorm norm_before_gate dt_min dt_max dt_init_floor dt_limit bias conv_bias chunk_size
    use_mem_eff_path layer_idx process_group sequence_parallel device dtype
mamba_ssm.Mamba3: d_model d_state expand headdim ngroups rope_fraction dt_min dt_max dt_init_floor
    A_floor is_outproj_norm is_mimo mimo_rank chunk_size dropout layer_idx n_layer device dtype
"""


@pytest.mark.parametrize("line", SIGNATURES.strip().replace("\n    ", " ").splitlines())
def test_arguments_have_their_names_and_order(line):
    path, _, expected = line.partition(": ")
    module, _, name = path.rpartition(".")
    found = inspect.signature(compat.MODULES[module][name])
    assert " ".join(found.parameters) == expected
