"""The student's notebooks: every lesson without its solutions, with what its cells import beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import jupytext

from coursekit import lessons


def notebook(name: str, *, solved: bool = False) -> jupytext.jupytext.NotebookNode:
    """One lesson as a notebook.

    Args:
        name: As `m1/discretisation`.
        solved: Keep the solutions, for tests that run it through.
    """
    text = lessons.source(name)
    text = lessons.solved(text) if solved else lessons.student(text)
    made = jupytext.reads(lessons.body(text), fmt="md:myst")
    made.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "lesson": name,
    }
    return made


def write(folder: Path) -> list[Path]:
    """Write a notebook per lesson, and the modules that they import.

    Args:
        folder: Where; what it holds already is left alone unless it has the same name.

    Returns:
        The notebooks.
    """
    written = []
    for name in lessons.names():
        path = folder / f"{name.replace('/', '-')}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        jupytext.write(notebook(name), path, fmt="ipynb")
        written.append(path)
    for part in ("coursekit", "_static/figures"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(lessons.COURSE / part, folder / part, dirs_exist_ok=True, ignore=ignored)
    shutil.copy(lessons.COURSE / "_static" / "course.css", folder / "_static" / "course.css")
    return written
