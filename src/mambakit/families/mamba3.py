"""Mamba-3: Mamba-3 mixers, SISO or MIMO, and gated MLPs in turn.

Source: "Mamba-3" (2603.15569). Keys and names: checkpoints of state-spaces/mamba. Their files do not say how
decay rates are made positive: see `mamba_ssm.Mamba3JSON`.
"""

from __future__ import annotations

from mambakit.families import mamba_ssm
from mambakit.families.family import Family, Layout, Size
from mambakit.families.mamba2 import BLOCK
from mambakit.layers.mamba3 import Mamba3Config

MAMBA_SSM = Layout(
    "mamba_ssm",
    mamba_ssm.has_layer("Mamba3"),
    mamba_ssm.Mamba3JSON,
    mamba_ssm.rows(BLOCK, Mamba3Config),
    {},
    stores_tied_head=True,
    pickled=True,
)


def _size(name: str, layers: int, width: int, hidden: int, parameters: int, **mixer: object) -> Size:
    config = mamba_ssm.Mamba3JSON(
        d_model=width,
        n_layer=layers,
        d_intermediate=hidden,
        vocab_size=128256,
        ssm_cfg={"layer": "Mamba3", **mixer},
    )
    return Size(f"state-spaces/mamba3-{name}", parameters, config)


MAMBA3 = Family(
    "mamba3",
    (MAMBA_SSM,),
    {
        "mamba3-siso-187m": _size("siso-187m", 12, 768, 1536, 186_849_600),
        "mamba3-siso-1.5b": _size("siso-1.5b", 24, 2048, 4096, 1_494_723_584),
        "mamba3-mimo-1.5b": _size("mimo-1.5b", 24, 2048, 3840, 1_497_082_880, is_mimo=True, mimo_rank=4),
    },
)
