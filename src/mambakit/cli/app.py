"""The command `mambakit`: its verbs, and the one place where errors become exit codes.

    0    done
    1    the run failed (numbers that are not finite or wrong, no memory left), or nobody reads the output
    2    the user asked for something that does not exist or cannot be: one line on stderr says what
    130  stopped by Ctrl-C (143 by SIGTERM)

Anything else is a fault of mambakit and shows its traceback.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import mambakit
from mambakit.cli.bench import bench
from mambakit.cli.console import complain, out
from mambakit.cli.course import course
from mambakit.cli.doctor import doctor
from mambakit.cli.eval import evaluate
from mambakit.cli.evaluate import evaluate_model
from mambakit.cli.export import export
from mambakit.cli.finetune import finetune
from mambakit.cli.generate import generate
from mambakit.cli.recipes import recipes
from mambakit.cli.train import train
from mambakit.config import ConfigError
from mambakit.testing.checks import WrongResultError
from mambakit.training import NonFiniteError

app = typer.Typer(
    name="mambakit",
    epilog="Start with: mambakit train shakespeare",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(finetune)
app.command()(generate)
app.command(name="eval")(evaluate)
app.command(name="evaluate")(evaluate_model)
app.command()(export)
app.command()(recipes)
app.command()(doctor)
app.command()(bench)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)(course)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"mambakit {mambakit.__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    # Read by `main` from the words themselves: an error may come before this function runs.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Selective state space models: train them, sample from them, measure them."""
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `mambakit`; those of the process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        return app(words, prog_name="mambakit", standalone_mode=False) or 0
    except typer.TyperException as error:
        complain(error.format_message())
        return 2
    except (ValueError, OSError, NonFiniteError, WrongResultError, torch.OutOfMemoryError) as error:
        line, code = _for_the_user(error)
        if "--debug" in words:
            traceback.print_exc()
        complain(line)
        return code


def _for_the_user(error: Exception) -> tuple[str, int]:
    """One line and the exit code for an error that the user can do something about; raise any other again."""
    if isinstance(error, torch.OutOfMemoryError):
        advice = "try train.accumulate=2 (same result, less memory) or train.activation_checkpointing=true"
        return f"the GPU has no memory left; {advice}", 1
    if isinstance(error, (NonFiniteError, WrongResultError)):
        return str(error), 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    # A plain ValueError is meant for the user if mambakit raised it; from inside another library it is a bug.
    if isinstance(error, ConfigError) or _raised_by_mambakit(error):
        return str(error), 2
    raise error


def _raised_by_mambakit(error: Exception) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").split(".")[0] == "mambakit"


def _warn(message: Warning | str, *_: object) -> None:
    complain(str(message), word="warning")
