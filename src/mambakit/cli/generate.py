"""`mambakit generate MODEL "prompt"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mambakit.cli.console import out
from mambakit.cli.model import Writer, writer
from mambakit.cli.options import Backend, Model, forced
from mambakit.config import ConfigError
from mambakit.generation import (
    Conversation,
    DecodeEngine,
    Sampling,
    StopStrings,
    speculate,
    stream_reply,
    stream_text,
)
from mambakit.generation.text import Characters
from mambakit.generation.text import pieces as text_pieces
from mambakit.training import device as devices


def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; may be left out after a state.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 500,
    min_tokens: Annotated[int, typer.Option(help="The model may not end its text before.")] = 0,
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
    quantize: Annotated[
        str | None,
        typer.Option(metavar="FORM", help="Keep the linear layers' weights as int8 or int4."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A smaller model that proposes tokens; the text does not suffer."),
    ] = None,
    from_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on where this saved conversation stands.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save where the conversation stands afterwards.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Read the prompt in pieces of this many tokens.")] = 4096,
    engine: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="On a CPU: weights in float32, bfloat16, int8 or int4; on a GPU: recorded; off; auto.",
        ),
    ] = "auto",
    backend: Backend = None,
) -> None:
    """Continue a text with a run of yours or a published checkpoint, streaming.

    A saved conversation goes on without reading its past again, as often and as variously as you like:

    mambakit generate MODEL "A long text" --save-state talk.safetensors

    mambakit generate MODEL " One question?" --from-state talk.safetensors
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if prompt is None and from_state is None:
        raise ConfigError("PROMPT is missing, the text to continue; only --from-state needs none")
    if draft is not None and (from_state or save_state or min_tokens):
        raise ConfigError("--draft cannot be combined with --from-state, --save-state or --min-tokens")
    place = devices.choose(device)
    found = writer(model, dtype, quantize)
    speaker = found.model.to(place)
    if quantize is not None and engine == "auto" and place.type == "cpu":
        engine = quantize if DecodeEngine.supports(speaker) is None else "off"
    settings = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "sampling": sampling,
        "stop": stop or (),
        "stop_tokens": found.stop_tokens,
        "engine": engine,
    }
    talk = None
    with forced(backend):
        if draft is not None:
            helper = writer(draft, dtype)
            helper.model.to(place)
            sizes = {"max_tokens": max_tokens, "prefill_chunk": prefill_chunk}
            pieces = _with_draft(found, helper, prompt, stop or (), sampling, sizes)
        elif from_state is None and save_state is None:
            settings["prefill_chunk"] = prefill_chunk
            pieces = stream_text(speaker, found.tokenizer, prompt, **settings)
        else:
            talk = Conversation(speaker, chunk=prefill_chunk)
            if from_state is not None:
                talk = Conversation.load(from_state, speaker, chunk=prefill_chunk)
            pieces = stream_reply(talk, found.tokenizer, prompt or "", **settings)
        out.print(prompt or "", style="bold", end="", markup=False, highlight=False, soft_wrap=True)
        try:
            for piece in pieces:
                typer.echo(piece, nl=False)
        finally:
            typer.echo()  # after Ctrl-C too
    if save_state is not None:  # not after Ctrl-C, which may have come in the middle of a step
        talk.save(save_state)


def _with_draft(
    found: Writer,
    draft: Writer,
    prompt: str,
    stop: Sequence[str],
    sampling: Sampling,
    sizes: Mapping[str, int],
) -> Iterator[str]:
    """The text of a model that is helped by a smaller one."""
    tokenizer, ends = found.tokenizer, found.stop_tokens
    if tokenizer.describe() != draft.tokenizer.describe():
        raise ConfigError("--draft: its tokeniser is another one, expected a model with the same tokens")
    tokens, watch = tokenizer.encode(prompt).tolist(), StopStrings(stop)
    most = {"vocab_size": tokenizer.vocab_size, **sizes}
    steps = speculate(found.model, draft.model, tokens, sampling=sampling, stop_tokens=ends, **most)
    return text_pieces(steps, Characters(tokenizer, tokens), watch, frozenset(ends))
