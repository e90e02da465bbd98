"""Our functions in transformers' own Mamba models.

transformers (from 5.15 on) decorates the functions that its models call for convolution, scan and step: each
is looked up once, when the module of the model is imported, in `mamba_ssm` or `causal_conv1d`, and is plain
PyTorch otherwise. Such a function is a global name of the module, which is what is replaced here, in modules
that are imported already and, by a hook on the import, in those that will be.

Not replaced are the functions that take a whole block with its projections' weights (`mamba_inner_fn`,
`mamba_split_conv1d_scan_combined`). transformers would use them in training only, where they know neither the
attention mask nor adapters on the projections, and with Falcon Mamba's norms at another place than in its
evaluation; without them the model trains on the same path on which it is evaluated.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mambakit.compat.conv import causal_conv1d_fn, causal_conv1d_update
from mambakit.compat.selective_scan import selective_scan_fn
from mambakit.compat.ssd import mamba_chunk_scan_combined
from mambakit.compat.state_update import selective_state_update


def _none(*args: Any, **kwargs: Any) -> None:
    """There is no function for a whole block: the model goes on, part by part."""


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
    "mamba_inner_fn": _none,
    "mamba2_split_conv1d_scan_combined": _none,
}
"""Global names of modules of models, and what they become."""

MODELS = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "jamba",
    "zamba",
    "zamba2",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
)
"""Models with such functions."""

_MODULES = {f"transformers.models.{name}.modeling_{name}" for name in MODELS}
_PACKED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")
_before: dict[str, dict[str, Any]] = {}  # module -> global name -> what it was
_hook: _Hook | None = None


def install(hidden: Callable[[], AbstractContextManager[None]]) -> None:
    """Replace the functions in every module of `MODELS`, now or when it is imported.

    Args:
        hidden: A context in which the real packages are found; modules are imported in it, so that what is
            put back later are their own functions.
    """
    global _hook
    for name in _MODULES & set(sys.modules):
        _patch(sys.modules[name])
    if _hook is None:
        _hook = _Hook(hidden)
        sys.meta_path.insert(0, _hook)


def uninstall() -> None:
    """Put back every function that was replaced."""
    global _hook
    if _hook is not None:
        sys.meta_path.remove(_hook)
        _hook = None
    for name, functions in _before.items():
        if name in sys.modules:
            vars(sys.modules[name]).update(functions)
    _before.clear()


def _patch(module: types.ModuleType) -> None:
    if module.__name__ in _before:
        return
    found = {name: vars(module)[name] for name in FUNCTIONS if name in vars(module)}
    # In older releases these names are the packages' own, beside checks for a GPU.
    found = {name: function for name, function in found.items() if hasattr(function, "__wrapped__")}
    if not found:
        warnings.warn(
            f"{module.__name__} looks its kernels up as older releases do, expected transformers 5.15 or "
            "newer: it keeps its own",
            stacklevel=4,
        )
    _before[module.__name__] = found
    scans_documents = "mamba_selective_scan" not in found
    for name, function in found.items():
        setattr(module, name, _adapted(name, FUNCTIONS[name], function, scans_documents))


def _adapted(
    name: str, ours: Callable[..., Any], theirs: Callable[..., Any], scans_documents: bool
) -> Callable[..., Any]:
    """Our function for a call that also carries keywords for other parts of the model.

    Args:
        name: Its name in the module.
        ours: Our function.
        theirs: The one it replaces, whose keywords are options of other implementations.
        scans_documents: Whether the model tells its scan about packed documents.
    """
    known = frozenset(inspect.signature(ours).parameters)

    @functools.wraps(theirs)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        if ours is not _none:
            packed = [key for key in _PACKED if kwargs.get(key) is not None]
            if packed and not (scans_documents and kwargs.get("seq_idx") is not None):
                expected = (
                    "seq_idx for packed documents"
                    if scans_documents
                    else "no packed documents: this model does not tell its scan about them"
                )
                raise ValueError(f"{name}: {packed[0]} is given, expected {expected}")
            kwargs = {key: value for key, value in kwargs.items() if key in known and key != "cu_seqlens"}
        return ours(*args, **kwargs)

    return adapted


class _Hook(importlib.abc.MetaPathFinder):
    """Finds the modules of `MODELS` as everyone else does, and patches each after it has run."""

    def __init__(self, hidden: Callable[[], AbstractContextManager[None]]) -> None:
        self._hidden = hidden

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of one of these modules, with a loader that patches it; `None` for any other."""
        if name not in _MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._hidden)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module with the loader it has, then patches it."""

    def __init__(
        self, loader: importlib.abc.Loader, hidden: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._loader, self._hidden = loader, hidden

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """Make the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run it where our packages cannot be seen, and replace its functions."""
        with self._hidden():
            self._loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self._loader  # `inspect` reads the source through it
        _before.pop(module.__name__, None)  # of a module that is loaded again
        if _hook is not None:
            _patch(module)
