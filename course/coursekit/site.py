"""Building and serving the site, checking nothing but what Sphinx checks: warnings are errors."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.resources
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from coursekit.lessons import COURSE

ROOT = COURSE.parent
BUILD = ROOT / "build" / "course"
SITE = BUILD / "html"
VENDORED = {
    "tex-svg.js": ("sphinx-mathjax-offline", "static/mathjax/tex-svg.js"),
    "plotly.min.js": ("plotly", "package_data/plotly.min.js"),
}
"""File of the site -> installed package and file in it, so that a page asks no other machine for anything."""


class BuildError(ValueError):
    """The site was not built; the reason is on the screen."""


def source_hash() -> str:
    """Fingerprint of everything that a lesson's output depends on besides its own cells."""
    digest = hashlib.sha256()
    files = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "src").rglob("*.yaml"),
        *(COURSE / "coursekit").rglob("*.py"),
    ]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(only: list[str], *, jobs: int = 1, strict: bool = True, out: Path = BUILD) -> Path:
    """Build the site, executing lessons whose cells or whose library changed.

    Args:
        only: Lessons to build, as `m1/discretisation`; all and the whole site if empty.
        jobs: Processes.
        strict: Treat warnings as errors. References into pages that are left out are no warnings.
        out: Folder for the site, the cache and what lies between.

    Returns:
        The first page.

    Raises:
        BuildError: A cell failed, a reference leads nowhere, or another warning.
    """
    for name in only:
        if not (COURSE / f"{name}.md").is_file():
            raise BuildError(f"there is no page {name!r} in {COURSE}")
    _forget_old_caches(out / "cache")
    vendor(out / "static" / "vendor")
    site = out / ("html" if not only else "preview")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--keep-going", "-b", "html", f"-j{jobs}"]
    command += [f"-d{out / ('doctrees' if not only else 'doctrees-preview')}", *(["-W"] if strict else [])]
    environment = {
        **os.environ,
        "COURSE_SITE": "1",
        "COURSE_ONLY": " ".join(only),
        "COURSE_BUILD": str(out),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(COURSE), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        ),
    }
    # One thread in a lesson's kernel: its cost is stated, and the numbers do not depend on the machine.
    environment.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    done = subprocess.run([*command, str(COURSE), str(site)], env=environment, check=False)
    if done.returncode:
        raise BuildError(f"the site was not built: see above ({time.monotonic() - begun:.0f} s)")
    return site / (f"{only[0]}.html" if only else "index.html")


def _forget_old_caches(folder: Path) -> None:
    """Keep the execution cache of this source only: outputs of another library would be lies."""
    if folder.is_dir():
        for cache in folder.iterdir():
            if cache.name != source_hash():
                shutil.rmtree(cache)


def vendor(folder: Path) -> None:
    """Copy the scripts that pages load from the packages that bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, inside) in VENDORED.items():
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        source = importlib.resources.files(package).joinpath(inside)
        target = folder / name
        if not target.is_file():
            target.write_bytes(source.read_bytes())


def serve(folder: Path = SITE, port: int = 8000) -> None:
    """Show the site at `http://localhost:PORT/` until Ctrl-C.

    Args:
        folder: What to show.
        port: Where; 0 for any free one.

    Raises:
        BuildError: There is no site yet.
    """
    if not (folder / "index.html").is_file():
        raise BuildError(f"there is no site in {folder} yet: mambakit course build makes it")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("localhost", port), handler) as server:
        print(f"http://localhost:{server.server_address[1]}/   (Ctrl-C ends)", flush=True)
        server.serve_forever()
