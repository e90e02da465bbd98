"""`mambakit course`: build, read and grade the course, from a checkout of the repository.

The course is not part of the installed package: it is text that is executed, with a small package of its own
(`course/coursekit`) beside it. This verb finds it and hands its words over.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

import mambakit
from mambakit.config import ConfigError


def course(context: typer.Context) -> None:
    """Build, serve, check and grade the course (build, serve, notebooks, check, quiz, grade)."""
    folder = find_course(Path.cwd(), Path(mambakit.__file__))
    if folder is None:
        raise ConfigError(
            "the course comes with mambakit's repository, not with the installed package: "
            "run this command inside a checkout"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        code = importlib.import_module("coursekit.cli").main(context.args or ["--help"])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the course needs {error.name}: pip install -c constraints.txt '.[course]'"
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except SystemExit as stop:  # argparse has said what is wrong
        code = stop.code if isinstance(stop.code, int) else 2
    if code:
        raise typer.Exit(code)


def find_course(*places: Path) -> Path | None:
    """The folder `course` of the checkout around the first place that is inside one.

    Args:
        places: Files or folders.
    """
    for place in places:
        for folder in (place, *place.resolve().parents):
            if (folder / "course" / "coursekit").is_dir() and (folder / "pyproject.toml").is_file():
                return folder / "course"
    return None
