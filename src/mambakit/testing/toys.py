"""Toy networks of every published family: few layers, odd sizes, every kind of block that it has."""

from __future__ import annotations

from collections.abc import Mapping

from mambakit.families import (
    bamba,
    blackmamba,
    falcon_h1,
    falcon_mamba,
    granite,
    jamba,
    mamba,
    mamba2,
    mamba2_hybrid,
    mamba_ssm,
    nemotron_h,
    zamba,
    zamba2,
)
from mambakit.families.family import Published

_SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}
_HYBRID = {**_SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6}

TOYS: Mapping[str, Published] = {
    "mamba": mamba.MambaJSON(**_SMALL, state_size=5),
    "mamba2": mamba2.Mamba2JSON(**_SMALL, num_heads=8, head_dim=8, n_groups=2, state_size=6),
    "mamba-layer-norms": mamba_ssm.Mamba1JSON(
        d_model=32, n_layer=3, d_intermediate=48, vocab_size=50, rms_norm=False, ssm_cfg={"d_state": 5}
    ),
    "mamba2-attention": mamba_ssm.Mamba2JSON(
        d_model=32,
        n_layer=4,
        vocab_size=50,
        ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 8},
        attn_layer_idx=[1, 3],
        attn_cfg={
            **{"causal": True, "d_conv": 4, "head_dim": 16, "num_heads": 4, "num_heads_kv": 2},
            **{"rotary_emb_dim": 8, "rotary_emb_base": 100.0},
        },
    ),
    "mamba3": mamba_ssm.Mamba3JSON(
        d_model=32,
        d_intermediate=48,
        n_layer=3,
        vocab_size=50,
        ssm_cfg={
            "layer": "Mamba3",
            "d_state": 8,
            "headdim": 8,
            "ngroups": 2,
            "is_mimo": True,
            "mimo_rank": 2,
        },
    ),
    "falcon_mamba": falcon_mamba.FalconMambaJSON(**_SMALL, mixer_rms_eps=1e-3),
    "jamba": jamba.JambaJSON(
        **_HYBRID, num_experts=4, attn_layer_period=3, attn_layer_offset=1, mamba_dt_rank=3
    ),
    "blackmamba": blackmamba.BlackMambaJSON(
        num_layers=5,
        hidden_size=32,
        state_size=5,
        vocab_size=50,
        mamba_moe_layers=["r", "4", "r", "1", "8"],
        ffn_hidden_size=24,
    ),
    "zamba": zamba.ZambaJSON(
        **{**_SMALL, "num_hidden_layers": 6, "intermediate_size": 48},
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_state=5,
        mamba_dt_rank=3,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "mamba"],
    ),
    "zamba2": zamba2.Zamba2JSON(
        **{**_SMALL, "num_hidden_layers": 6, "intermediate_size": 48},
        num_attention_heads=4,
        n_mamba_heads=8,
        mamba_ngroups=2,
        mamba_d_state=6,
        num_mem_blocks=2,
        adapter_rank=3,
        use_shared_attention_adapter=True,
        use_mem_rope=True,
        layers_block_type=["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"],
    ),
    "bamba": bamba.BambaJSON(**_HYBRID, **_MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": falcon_h1.FalconH1JSON(
        **{**_HYBRID, **_MAMBA2, "mamba_n_heads": 6},
        mamba_d_ssm=48,
        mlp_multipliers=(0.7, 1.3),
        key_multiplier=0.6,
        ssm_multipliers=(0.8, 1.1, 0.9, 1.2, 0.7),
        attention_in_multiplier=1.4,
        ssm_out_multiplier=0.9,
    ),
    "nemotron_h": nemotron_h.NemotronHJSON(
        vocab_size=50,
        hidden_size=32,
        layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        mamba_num_heads=6,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=6,
        n_routed_experts=6,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        moe_latent_size=16,
    ),
    "mamba2_hybrid": mamba2_hybrid.Mamba2HybridOptions(
        padded_vocab_size=50,
        hidden_size=32,
        ffn_hidden_size=48,
        hybrid_override_pattern="M-*-M",
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=8,
        mamba_state_dim=6,
        mamba_head_dim=8,
        mamba_num_groups=2,
    ),
    "granitemoehybrid": granite.GraniteJSON(
        **_HYBRID,
        **_MAMBA2,
        num_local_experts=5,
        shared_intermediate_size=24,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
}
"""Family, or family and a variant after a dash -> the keys of a toy."""
