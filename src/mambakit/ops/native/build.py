"""Compile the C++ kernels: one shared library per instruction level, with whatever compiler is at hand.

    python -m mambakit.ops.native

The package's installation runs this (`hatch_build.py`), and it can be run again later: after installing a
compiler, or after changing a kernel in a checkout. Uses the standard library only, because neither torch nor
mambakit exists while a wheel is being built. A compiler is called directly: the kernels are self-contained
C++17 files without dependencies, for which a build system would be more to install than to build.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1]
WITH_KERNELS = (PACKAGE / "ops", PACKAGE / "generation")
"""Where the kernels' sources lie."""
LIBRARIES = HERE / "lib"
"""Where the libraries lie in an installed package or a checkout."""

SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
LEVELS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    }
}
"""Processor -> instruction level -> compiler flags. Every other processor has the baseline only."""

COMPILE = [
    *("-std=c++17", "-O3", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Multiply-adds are fused. No -ffast-math: NaN and infinity keep their meaning.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors are passed between inlined functions only, so their calling convention is no concern.
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-warning-option"),
]
HOW_TO_GET_A_COMPILER = (
    "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install; conda: conda install gxx) or name it in CXX"
)


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build left behind.

    Attributes:
        libraries: Instruction level -> library.
        failed: Instruction level -> the compiler's message, for levels this compiler does not know.
    """

    libraries: dict[str, Path]
    failed: dict[str, str]


def sources() -> list[Path]:
    """Every kernel's source file, and the library's own."""
    return _files("*.cpp")


def digest() -> str:
    """A digest of all sources and headers: a library knows the one it was made of."""
    found = hashlib.sha256()
    for path in sorted([*_files("*.cpp"), *_files("*.h")]):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _files(pattern: str) -> list[Path]:
    return sorted(path for folder in WITH_KERNELS for path in folder.rglob(pattern))


def processor() -> str:
    """The processor's name as in `LEVELS`."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def levels() -> dict[str, list[str]]:
    """Instruction level -> compiler flags, for this processor."""
    return LEVELS.get(processor(), {"baseline": []})


def library_name(level: str) -> str:
    """File name of one level's library."""
    return f"libmambakit-{level}{SUFFIX}"


def find_compiler() -> list[str] | None:
    """The compiler's command: `$CXX`, else the first of c++, g++, clang++ that exists."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([path] for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)


def build(folder: Path = LIBRARIES, *, only: Sequence[str] = (), flags: Sequence[str] = ()) -> Built:
    """Compile the libraries into a folder, replacing what it held.

    Args:
        folder: Where to put them.
        only: Instruction levels to build; all of this processor's by default.
        flags: Further flags for compiling and linking (sanitizers, say).

    Returns:
        The libraries, and the levels that this compiler could not build.

    Raises:
        BuildError: There is no compiler, or it cannot build even the first level.
    """
    compiler = find_compiler()
    if compiler is None:
        wanted = f"CXX={os.environ['CXX']!r} was not found" if os.environ.get("CXX") else "none was found"
        raise BuildError(f"a C++ compiler is needed and {wanted}: {HOW_TO_GET_A_COMPILER}")
    wanted_levels = {name: made for name, made in levels().items() if not only or name in only}
    libraries, failed = {}, {}
    with tempfile.TemporaryDirectory(prefix="mambakit-build-") as temporary:
        for level, level_flags in wanted_levels.items():
            work = Path(temporary) / level
            work.mkdir()
            try:
                libraries[level] = _build_level(compiler, [*level_flags, *flags], work, library_name(level))
            except subprocess.CalledProcessError as error:
                failed[level] = f"{shlex.join(error.cmd)}\n{error.stderr}".strip()
            except OSError as error:
                failed[level] = f"{shlex.join(compiler)}: {error}"
        if not libraries:
            raise BuildError("the C++ compiler failed:\n" + next(iter(failed.values())))
        folder.mkdir(parents=True, exist_ok=True)
        for level in levels():
            (folder / library_name(level)).unlink(missing_ok=True)
        for level, path in libraries.items():
            # Moved into place whole: a process that has the old file mapped keeps it.
            arrived = folder / f".{path.name}.{os.getpid()}"
            shutil.copyfile(path, arrived)
            libraries[level] = arrived.replace(folder / path.name)
    return Built(libraries, failed)


def _build_level(compiler: list[str], flags: list[str], work: Path, name: str) -> Path:
    """Compile every source in parallel and link the level's library."""
    position = [] if platform.system() == "Windows" else ["-fPIC"]
    made_of = f'-DMAMBAKIT_SOURCES="{digest()}"'

    def compile_one(source: Path) -> Path:
        target = work / f"{source.parent.name}-{source.stem}.o"
        _run([*compiler, *COMPILE, *position, *flags, made_of, "-I", str(HERE), "-c", str(source)], target)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    _run([*compiler, "-shared", *flags, *map(str, objects)], work / name)
    return work / name


def _run(command: list[str], target: Path) -> None:
    subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True)
