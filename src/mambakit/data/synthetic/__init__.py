"""Synthetic tasks with the papers' settings, one file each, generated and never stored."""

from mambakit.data.synthetic.induction_heads import InductionHeadsConfig
from mambakit.data.synthetic.modular_arithmetic import ModularArithmeticConfig
from mambakit.data.synthetic.mqar import MqarConfig
from mambakit.data.synthetic.parity import ParityConfig
from mambakit.data.synthetic.selective_copying import SelectiveCopyingConfig

__all__ = [
    "InductionHeadsConfig",
    "ModularArithmeticConfig",
    "MqarConfig",
    "ParityConfig",
    "SelectiveCopyingConfig",
]
