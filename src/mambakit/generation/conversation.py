"""A text in the making that can be put down, picked up again, and forked.

A recurrent model remembers a text of any length in a state of the same size. So a conversation can be saved
in one file and goes on where it was, without reading its past again; and from one prefix, a document or a
long instruction, any number of continuations set out from copies of that state. A cache of keys and values
grows with the text, and all of it would have to be stored and copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambakit.generation.decode import generate, stream
from mambakit.generation.fingerprint import fingerprint
from mambakit.generation.prompts import as_prompts, read
from mambakit.generation.sampling import Sampling
from mambakit.layers.mixer import State

if TYPE_CHECKING:
    from mambakit.generation.engine import DecodeEngine
    from mambakit.generation.recorded import RecordedDecoder
    from mambakit.models.language import LanguageModel

_FORMAT = "mambakit conversation 1"
_DIFFERENCES = {
    "settings": "its network has other settings",
    "types": "its tensors have other shapes or types",
    "weights": "its weights are others",
}


class Conversation:
    """What was said, and what a model remembers of it.

    Args:
        model: The language model that reads and writes.
        chunk: Text is read in pieces of this many tokens.

    Attributes:
        model: That model.
        tokens: All tokens so far, read and written.
        state: What the model remembers of all but the last of them.
    """

    def __init__(self, model: LanguageModel, *, chunk: int = 4096) -> None:
        self.model, self.chunk = model, chunk
        self.tokens: list[int] = []
        self.state = model.init_state(1)

    def read(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text; the model reads them now, once.

        Args:
            tokens: Token numbers.
        """
        if not len(tokens):
            return
        new = [*self.tokens[-1:], *map(int, tokens)]
        self.tokens += map(int, tokens)
        if len(new) == 1:
            return
        was_training = self.model.training
        self.model.eval()
        try:
            read(self.model, as_prompts([new[:-1]], device=self._device), self.state, self.chunk)
        finally:
            self.model.train(was_training)

    def write(
        self,
        *,
        max_tokens: int,
        min_tokens: int = 0,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        vocab_size: int | None = None,
        engine: DecodeEngine | RecordedDecoder | str = "auto",
    ) -> Iterator[int]:
        """Yield new tokens, which become part of the text as they are yielded.

        Args:
            max_tokens: How many at most.
            min_tokens: Before so many none of `stop_tokens` is chosen.
            sampling: How to choose.
            stop_tokens: Tokens that end it; the one that does is yielded.
            vocab_size: Tokens from this number on are never chosen.
            engine: Decode engine, as for `stream`.

        Yields:
            Token numbers.

        Raises:
            ValueError: Nothing was said yet, or as for `stream`.
        """
        steps = stream(
            self.model,
            [self._last()],
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            vocab_size=vocab_size,
            state=self.state,
            history=self._history(1),
            engine=engine,
        )
        return self._write(steps)

    def continuations(
        self,
        count: int,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        stop_tokens: Sequence[int] = (),
        vocab_size: int | None = None,
        engine: DecodeEngine | RecordedDecoder | str = "auto",
    ) -> Tensor:
        """Several continuations at once, from copies of the state; the conversation stays where it is.

        Args:
            count: How many.
            max_tokens: Tokens of each at most.
            sampling: How to choose.
            seeds: A seed for each; by default number i has `sampling.seed + i`.
            stop_tokens: Tokens that end one.
            vocab_size: Tokens from this number on are never chosen.
            engine: Decode engine, as for `stream`.

        Returns:
            Tokens `(count, at most max_tokens)`; one that has ended repeats its stop token.

        Raises:
            ValueError: Nothing was said yet, a count below 1, or as for `stream`.
        """
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1")
        return generate(
            self.model,
            [self._last()] * count,
            max_tokens=max_tokens,
            sampling=sampling,
            seeds=seeds,
            stop_tokens=stop_tokens,
            vocab_size=vocab_size,
            state=self.state.select(torch.zeros(count, dtype=torch.int64)),
            history=self._history(count),
            engine=engine,
        )

    def fork(self) -> Conversation:
        """An independent copy, which goes its own way from here."""
        other = Conversation(self.model, chunk=self.chunk)
        other.tokens, other.state = list(self.tokens), self.state.clone()
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to one safetensors file, which says which model it belongs to.

        Args:
            path: File to write; replaced in one step.
        """
        content = State({"state": self.state, "tokens": torch.tensor(self.tokens, dtype=torch.int64)})
        metadata = {
            "format": _FORMAT,
            "model": json.dumps(fingerprint(self.model)),
            "sha256": _digest(content),
        }
        content.save(path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel, *, chunk: int = 4096) -> Conversation:
        """Pick up a conversation; it goes on bit by bit as it would have.

        Args:
            path: A file that `save` wrote.
            model: The model that it was written with.
            chunk: Text is read in pieces of this many tokens.

        Returns:
            The conversation.

        Raises:
            ValueError: A file that is missing, damaged or no conversation, or that of another model, with
                what differs.
        """
        where = os.fspath(path)
        metadata = _header(where)
        if metadata.get("format") != _FORMAT:
            found = metadata.get("format")
            raise ValueError(f"{where!r} is no conversation of this version: {found!r}, expected {_FORMAT!r}")
        belongs, own = _model_of(metadata, where), fingerprint(model)
        for part, difference in _DIFFERENCES.items():
            if belongs.get(part) != own[part]:
                raise ValueError(f"{where!r} belongs to another model than this: {difference}")
        content = State.load(path)
        if _digest(content) != metadata.get("sha256"):
            raise ValueError(f"{where!r} is damaged: its content does not have the checksum that it names")
        found = cls(model, chunk=chunk)
        found.tokens = content["tokens"].tolist()
        if "state" in content:
            found.state = _placed(content["state"], found.state)
        return found

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _last(self) -> list[int]:
        if not self.tokens:
            raise ValueError("nothing was said yet, expected at least one token to go on from")
        return self.tokens[-1:]

    def _history(self, rows: int) -> Tensor:
        return torch.tensor([self.tokens[:-1]], dtype=torch.int64).expand(rows, -1)

    def _write(self, steps: Iterator[Tensor]) -> Iterator[int]:
        for step in steps:
            token = int(step)
            self.tokens.append(token)
            yield token


def _header(path: str) -> dict[str, str]:
    """What a safetensors file says of itself, before anything of it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read a conversation from {path!r}: {error}") from None


def _model_of(metadata: dict[str, str], path: str) -> dict[str, str]:
    try:
        found = json.loads(metadata.get("model", "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} is damaged: its header does not say which model it belongs to")
    return found


def _digest(content: State) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(content.tensors()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _placed(state: State, like: State) -> State:
    """A state with every tensor on the device where an empty one has it."""
    return State(
        {
            name: _placed(state.get(name, State()), value)
            if isinstance(value, State)
            else state[name].to(value.device)
            for name, value in like.items()
        }
    )
