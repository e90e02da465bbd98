"""Published families of models, a file each: their configuration files, tensor names and sizes, as data.

`FAMILIES` lists them; `mambakit.load` finds the one that a checkpoint belongs to.
"""

from mambakit.families.bamba import BAMBA
from mambakit.families.blackmamba import BLACKMAMBA
from mambakit.families.falcon_h1 import FALCON_H1
from mambakit.families.falcon_mamba import FALCON_MAMBA
from mambakit.families.family import Family, Layout, Published, Size
from mambakit.families.granite import GRANITE
from mambakit.families.jamba import JAMBA
from mambakit.families.mamba import MAMBA
from mambakit.families.mamba2 import MAMBA2
from mambakit.families.mamba2_hybrid import MAMBA2_HYBRID
from mambakit.families.mamba3 import MAMBA3
from mambakit.families.nemotron_h import NEMOTRON_H
from mambakit.families.zamba import ZAMBA
from mambakit.families.zamba2 import ZAMBA2

_ALL = (
    *(MAMBA, MAMBA2, MAMBA3, FALCON_MAMBA, FALCON_H1, JAMBA, BLACKMAMBA, ZAMBA, ZAMBA2),
    *(BAMBA, GRANITE, NEMOTRON_H, MAMBA2_HYBRID),
)
FAMILIES = {family.name: family for family in _ALL}
"""Family by name."""

__all__ = ["FAMILIES", "Family", "Layout", "Published", "Size"]
