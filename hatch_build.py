"""Build hook: compile the C++ kernels while a wheel is made, or leave them out where no compiler exists.

With libraries inside, the wheel belongs to the platform but to no particular Python (`ctypes` loads them).
Without a compiler the wheel is pure Python and operators run as PyTorch programs; `mambakit doctor` says so.
`MAMBAKIT_NATIVE=off` leaves them out on purpose.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD_MODULE = Path("src") / "mambakit" / "ops" / "native" / "build.py"
INSIDE = "mambakit/ops/native/lib"


class NativeBuildHook(BuildHookInterface):
    """Compile into the wheel, or beside the sources for an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the libraries and tell hatchling where they go."""
        self.folder: str | None = None
        if self.target_name != "wheel" or os.environ.get("MAMBAKIT_NATIVE") == "off":
            return
        native = _load(Path(self.root) / BUILD_MODULE)
        if version != "editable":
            self.folder = tempfile.mkdtemp(prefix="mambakit-wheel-")
        folder = Path(self.folder) if self.folder else native.LIBRARIES
        try:
            built = native.build(folder)
        except native.BuildError as error:
            self.app.display_warning(f"mambakit is installed without its C++ kernels: {error}")
            return
        for level, message in built.failed.items():
            self.app.display_warning(f"the {level} kernels are left out: {message}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        if self.folder:
            for path in built.libraries.values():
                build_data["force_include"][str(path)] = f"{INSIDE}/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built for the wheel, now that it is inside."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _load(path: Path) -> Any:
    """The build module by its path: the package around it needs torch, which is not here."""
    spec = importlib.util.spec_from_file_location("mambakit_native_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
