"""The layout of mamba_ssm: names and shapes as published, MLPs included, and back without a change."""

from __future__ import annotations

import json

import pytest
import torch

import mambakit
from mambakit.families import FAMILIES
from mambakit.families.mamba_ssm import Mamba1JSON, Mamba2JSON, Mamba3JSON
from mambakit.models import LanguageModel

MIXER = {
    "dt_bias": (8,),
    "B_bias": (8, 1, 128),
    "C_bias": (8, 1, 128),
    "D": (8,),
    "in_proj.weight": (2 * 512 + 2 * 128 + 3 * 8 + 32, 256),
    "B_norm.weight": (128,),
    "C_norm.weight": (128,),
    "out_proj.weight": (256, 512),
}
MIMO = {
    "B_bias": (8, 4, 128),
    "C_bias": (8, 4, 128),
    "mimo_x": (8, 4, 64),
    "mimo_z": (8, 4, 64),
    "mimo_o": (8, 4, 64),
    "in_proj.weight": (2104, 256),
    "norm.weight": (512,),
}
MLP = {"norm2.weight": (256,), "mlp.fc1.weight": (1024, 256), "mlp.fc2.weight": (256, 512)}
OUTER = {
    "backbone.embedding.weight": (1000, 256),
    "backbone.norm_f.weight": (256,),
    "lm_head.weight": (1000, 256),
}


def saved(published, folder):
    """A network with every weight away from its initial value, and what a file of it holds."""
    torch.manual_seed(0)
    model = LanguageModel(published.ours())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mambakit.save(model, folder, layout="mamba_ssm")
    return model.eval(), torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("mimo", [False, True])
def test_mamba3_has_the_published_names_and_shapes(mimo, tmp_path):
    settings = {"is_mimo": True, "mimo_rank": 4, "is_outproj_norm": True} if mimo else {}
    published = Mamba3JSON(
        d_model=256,
        n_layer=2,
        d_intermediate=0 if mimo else 512,
        vocab_size=1000,
        ssm_cfg={"layer": "Mamba3", **settings},
    )
    _, stored = saved(published, tmp_path / "it")
    layer = {"norm.weight": (256,)} | {f"mixer.{k}": v for k, v in (MIXER | (MIMO if mimo else {})).items()}
    layer |= {} if mimo else MLP
    expected = OUTER | {f"backbone.layers.{n}.{k}": v for n in range(2) for k, v in layer.items()}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected


@pytest.mark.parametrize("hidden", [0, 100, 128])
@pytest.mark.parametrize(
    ("kind", "mixer"),
    [
        (Mamba1JSON, {"d_state": 5}),
        (Mamba2JSON, {"headdim": 8, "d_state": 6}),
        (Mamba3JSON, {"headdim": 8, "d_state": 8, "rope_fraction": 1.0}),
        (Mamba3JSON, {"headdim": 8, "d_state": 8, "a_activation": "heavy_tail", "A_floor": 0.01}),
        (Mamba3JSON, {"headdim": 8, "d_state": 8, "is_mimo": True, "mimo_rank": 3, "is_outproj_norm": True}),
    ],
)
def test_there_and_back_is_the_same_network(kind, mixer, hidden, tmp_path):
    layer = kind.__name__.removesuffix("JSON")
    published = kind(
        d_model=32, n_layer=3, d_intermediate=hidden, vocab_size=50, ssm_cfg={"layer": layer, **mixer}
    )
    model, stored = saved(published, tmp_path / "it")
    assert ("backbone.layers.2.mlp.fc2.weight" in stored) == bool(hidden)
    found = json.loads((tmp_path / "it" / "config.json").read_text())
    assert found["d_intermediate"] in (0, 128) and found["ssm_cfg"]["layer"] == layer
    back = mambakit.load(tmp_path / "it")
    tokens = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(tokens), back(tokens))


def test_the_rank_is_read_where_there_is_one():
    """Published files of SISO models may name the rank that they would have as MIMO models."""
    small = {"d_model": 32, "n_layer": 1, "vocab_size": 50}
    siso = Mamba3JSON(**small, ssm_cfg={"layer": "Mamba3", "headdim": 8, "mimo_rank": 2}).ours()
    assert siso.blocks[0].mimo_rank is None
    mimo = Mamba3JSON(**small, ssm_cfg={"layer": "Mamba3", "headdim": 8, "is_mimo": True}).ours()
    assert mimo.blocks[0].mimo_rank == 4
    assert FAMILIES["mamba3"].sizes["mamba3-mimo-1.5b"].config.ours().blocks[0].mimo_rank == 4
