"""`mambakit train RECIPE [key=value ...]`."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from mambakit.cli.console import complain, count, duration, facts, number, out, scores
from mambakit.cli.options import Backend, Settings, forced
from mambakit.generation import Sampling, stream_text
from mambakit.recipes import load_recipe
from mambakit.training import Interrupted, LanguageModeling, TrainConfig, load_run, load_tokenizer, run

_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
_PROMPT_TOKENS, _SAMPLE_TOKENS = 32, 400


def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A name from `mambakit recipes`, or the path of a YAML file."),
    ],
    settings: Settings = None,
    backend: Backend = None,
) -> None:
    """Train a recipe and leave a run folder behind.

    mambakit train shakespeare train.steps=60 train.checkpoint_every=10 out=runs/try resume=true
    """
    words = settings or []
    carry_out("train", load_recipe(recipe, words), recipe, words, backend)


def carry_out(verb: str, config: TrainConfig, recipe: str, words: list[str], backend: str | None) -> None:
    """Do a run and show what came out.

    Args:
        verb: The verb that asked for it, to say how to go on after Ctrl-C.
        config: The run.
        recipe: Where it came from.
        words: What the command line changed.
        backend: Of the operators; None lets them choose.
    """
    try:
        with forced(backend):
            summary = run(config, console=out)
    except Interrupted as stopped:
        complain(
            f"{stopped.signal_name} after step {stopped.step}; {config.folder} holds a checkpoint", "stopped"
        )
        again = [recipe, *(word for word in words if not word.startswith("resume=")), "resume=true"]
        again += ["--backend", backend] if backend else []
        complain(f"mambakit {verb} {shlex.join(again)}", "go on with")
        raise typer.Exit(_EXIT_CODES.get(stopped.signal_name, 1)) from None
    if _writes_text(config):
        _show_sample(config)
    for table in (scores(summary["metrics"]), facts(_facts(summary, config))):
        out.print()
        out.print(table)
    out.print()
    for name, value in _next(config).items():
        # Not a table: a long path must stay in one piece to be copied.
        out.print(f"[dim]{name:<13}[/]", end="")
        out.print(value, markup=False, highlight=False, soft_wrap=True)


def _writes_text(config: TrainConfig) -> bool:
    """Whether the run's model continues text."""
    return isinstance(config.task, LanguageModeling) and load_tokenizer(config.folder) is not None


def _show_sample(config: TrainConfig) -> None:
    """Let the trained model continue the beginning of the held-out text."""
    model, _, data = load_run(config.folder)
    tokenizer = load_tokenizer(config.folder)
    prompt = tokenizer.decode(data.validation()[0]["tokens"][:_PROMPT_TOKENS])
    pieces = stream_text(
        model,
        tokenizer,
        prompt,
        max_tokens=_SAMPLE_TOKENS,
        sampling=Sampling(temperature=0.8, seed=config.seed),
    )
    out.rule("held-out text, continued by the model", style="dim", align="left")
    out.print(prompt, style="bold", end="", markup=False, highlight=False, soft_wrap=True)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def _facts(summary: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """What a run was and took, in words."""
    rows = {
        "parameters": count(summary["parameters"]),
        **({"trained": count(summary["trained_parameters"])} if config.finetune else {}),
        "tokens seen": count(summary["tokens_seen"]),
        "time": duration(summary["seconds"]),
    }
    if summary["tokens_per_second"]:
        rows["speed"] = f"{count(summary['tokens_per_second'])} tokens/s while training"
    if summary["peak_memory_bytes"]:
        rows["peak memory"] = count(summary["peak_memory_bytes"], "B")
    if summary["chance"] is not None:
        rows["chance"] = number("accuracy", summary["chance"])
    if baseline := summary["baseline"]:
        rows["to beat"] = (
            f"{baseline['metric']} {number(baseline['metric'], baseline['value'])} ({baseline['name']})"
        )
    return rows


def _next(config: TrainConfig) -> dict[str, str]:
    """What to do with a finished run."""
    folder = shlex.quote(str(config.folder))
    rows = {"run folder": str(config.folder), "curves": str(config.folder / "curves.png")}
    if _writes_text(config):
        rows["write text"] = f'mambakit generate {folder} "PROMPT"'
    return {**rows, "measure": f"mambakit eval {folder}"}
