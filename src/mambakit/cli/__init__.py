"""The command line: one file per verb, and `app` which puts them together and speaks of errors."""

from mambakit.cli.app import main

__all__ = ["main"]
