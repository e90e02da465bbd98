"""`mambakit generate MODEL "prompt"`."""

from __future__ import annotations

from typing import Annotated

import typer

from mambakit.cli.console import out
from mambakit.cli.model import writer
from mambakit.cli.options import Backend, Model, forced
from mambakit.generation import Sampling, stream_text
from mambakit.training import device as devices


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 500,
    temperature: Annotated[float, typer.Option(help="Below 1 plays safe, above 1 dares; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens of this joint probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this fraction of the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 avoids tokens that have occurred.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", show_default="random")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="A checkpoint's weights: float32, bfloat16, float16.", show_default="as stored"),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="On a CPU: weights in float32, bfloat16, int8 or int4; on a GPU: recorded; off; auto.",
        ),
    ] = "auto",
    backend: Backend = None,
) -> None:
    """Continue a text with a run of yours or a published checkpoint, streaming."""
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    place = devices.choose(device)
    found = writer(model, dtype)
    with forced(backend):
        pieces = stream_text(
            found.model.to(place),
            found.tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop or (),
            stop_tokens=found.stop_tokens,
            engine=engine,
        )
        out.print(prompt, style="bold", end="", markup=False, highlight=False, soft_wrap=True)
        try:
            for piece in pieces:
                typer.echo(piece, nl=False)
        finally:
            typer.echo()  # after Ctrl-C too
