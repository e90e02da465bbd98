"""Putting our modules under the names of others, and taking them away again."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Mapping
from typing import Any

from mambakit.compat import (
    conv,
    gated_norm,
    generation,
    language,
    residual_norm,
    selective_scan,
    ssd,
    state_update,
    transformers_models,
)
from mambakit.compat.mamba import Mamba
from mambakit.compat.mamba2 import Mamba2
from mambakit.compat.mamba3 import Mamba3


def _names(source: types.ModuleType, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


_SCAN = _names(selective_scan, "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref")
_CONV = _names(conv, "causal_conv1d_fn", "causal_conv1d_update")
_VARLEN = _names(conv, "causal_conv1d_varlen_states")

MODULES: Mapping[str, Mapping[str, Any]] = {
    "causal_conv1d": {**_CONV, "__version__": "1.7.0"},
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": _VARLEN,
    "mamba_ssm": {
        **_names(selective_scan, "selective_scan_fn", "mamba_inner_fn"),
        "Mamba": Mamba,
        "Mamba2": Mamba2,
        "Mamba3": Mamba3,
        "MambaLMHeadModel": language.MambaLMHeadModel,
        "__version__": "2.3.2.post1",
    },
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": language.MambaConfig},
    "mamba_ssm.models.mixer_seq_simple": _names(
        language, "MambaLMHeadModel", "MixerModel", "create_block", "MambaConfig", "Block", "GatedMLP"
    ),
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": {"Block": language.Block},
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.modules.mamba3": {"Mamba3": Mamba3},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba, "Block": language.Block},
    "mamba_ssm.modules.mlp": {"GatedMLP": language.GatedMLP},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _names(
        residual_norm, "layer_norm_fn", "rms_norm_fn", "layer_norm_linear_fn", "RMSNorm"
    ),
    "mamba_ssm.ops.triton.layernorm_gated": _names(
        gated_norm, "layernorm_fn", "rmsnorm_fn", "LayerNorm", "RMSNorm"
    ),
    "mamba_ssm.ops.triton.selective_state_update": _names(
        state_update, "selective_state_update", "selective_state_update_ref"
    ),
    "mamba_ssm.ops.triton.ssd_combined": _names(
        ssd, "mamba_chunk_scan_combined", "mamba_chunk_scan", "mamba_split_conv1d_scan_combined"
    ),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _names(generation, "InferenceParams", "GenerationMixin", "decode"),
    "mamba_ssm.utils.hf": _names(language, "load_config_hf", "load_state_dict_hf"),
}
"""What is installed: module -> its names. `__version__` is the release with these signatures."""

_ROOTS = ("mamba_ssm", "causal_conv1d")
_displaced: dict[str, types.ModuleType] = {}  # the real modules that ours stand in for
_installed: dict[str, types.ModuleType] = {}


class _Installed:
    """What `install` returns: in a `with` statement, it is undone at the end."""

    def __enter__(self) -> None:
        """Everything is installed already."""

    def __exit__(self, *exception: object) -> None:
        """Undo it."""
        uninstall()


def install(*, replace: bool = False, transformers: bool = True) -> _Installed:
    """Make `import mamba_ssm` and `import causal_conv1d` give ours, and transformers' models use ours.

    Twice is once. Modules that have imported names of the real packages before keep them.

    Args:
        replace: Stand in for the real packages where they have been imported; `uninstall` puts them back.
        transformers: Give our kernels to the Mamba models of transformers, imported now or later.

    Returns:
        A context manager that uninstalls at its end; it may be ignored.

    Raises:
        RuntimeError: A real package has been imported, without `replace`.
    """
    if not _installed:
        real = [name for name in sys.modules if name.split(".")[0] in _ROOTS]
        if real and not replace:
            raise RuntimeError(
                f"{real[0].split('.')[0]} has been imported already: call compat.install() before it, "
                "or install(replace=True) for what is imported from now on"
            )
        _displaced.update({name: sys.modules.pop(name) for name in real})
        _installed.update(_made())
        sys.modules.update(_installed)
    if transformers:
        transformers_models.install(hidden)
    return _Installed()


def uninstall() -> None:
    """Take away what `install` put, and put back what it displaced."""
    transformers_models.uninstall()
    for name in _installed:
        sys.modules.pop(name, None)
    sys.modules.update(_displaced)
    _installed.clear()
    _displaced.clear()


class hidden:
    """While this context lasts, the real packages are found, if there are any."""

    def __enter__(self) -> None:
        """Take our modules away."""
        for name in _installed:
            sys.modules.pop(name, None)
        sys.modules.update(_displaced)

    def __exit__(self, *exception: object) -> None:
        """Put them back; what was imported meanwhile is kept for `uninstall`."""
        if _installed:
            real = [name for name in sys.modules if name.split(".")[0] in _ROOTS]
            _displaced.update({name: sys.modules.pop(name) for name in real})
            sys.modules.update(_installed)


def _made() -> dict[str, types.ModuleType]:
    """The modules, each an attribute of its package, as after an import."""
    made: dict[str, types.ModuleType] = {}
    for name, names in MODULES.items():
        module = types.ModuleType(name, f"Stands in for {name}: see `mambakit.compat`.")
        is_package = any(other.startswith(f"{name}.") for other in MODULES)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
        if is_package:
            module.__path__ = []  # a submodule that is not here is not found
        vars(module).update(names)
        made[name] = module
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(made[parent], child):
            setattr(made[parent], child, module)
    return made
