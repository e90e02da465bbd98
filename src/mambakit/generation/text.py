"""Streaming text: tokens become characters as soon as they can, and stop strings never show.

Two things make this harder than decoding token by token. A character may be spread over several tokens (bytes
of one UTF-8 sequence), and a stop string may begin in one token and end in another; so both parts hold back
what is not settled yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mambakit.generation.decode import stream
from mambakit.generation.sampling import Sampling

if TYPE_CHECKING:
    from mambakit.generation.conversation import Conversation
    from mambakit.generation.engine import DecodeEngine
    from mambakit.generation.recorded import RecordedDecoder
    from mambakit.models.language import LanguageModel

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders put where bytes are no character (yet)
_CONTEXT = 8  # tokens kept before the new ones, so that they decode as they do in place
_UNFINISHED = 3  # a character of UTF-8 has at most four bytes, so at most three tokens can lack their end


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every token number is below it."""

    def encode(self, text: str) -> Sequence[int]:
        """Turn text into token numbers."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn token numbers into text."""


class StopStrings:
    """Cuts a stream of text at the first stop string to be completed.

    Text is released once no stop string can begin in it any more, so no part of one ever shows; how the text
    was cut into pieces makes no difference.

    Args:
        stops: The stop strings; none releases all text at once.

    Raises:
        ValueError: An empty stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty, expected at least one character")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text.

        Args:
            text: The next piece.

        Returns:
            The text that may be shown now; nothing any more once `stopped` is true.
        """
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            end, minus_length = min(found)  # the first to end; of several, the longest
            self.stopped, self._held = True, ""
            return text[: end + minus_length]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Release what is held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


class Characters:
    """Turns tokens into text, holding back the tokens of an unfinished character.

    Args:
        tokenizer: Gives the text of a list of tokens.
        context: The tokens before the first one; tokenizers may join a token to the one before it.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._shown = list(context[-_CONTEXT:])
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """Take one token and return the characters that are settled now, possibly none."""
        self._held.append(token)
        if not self._text(len(self._held)).endswith(_REPLACEMENT):
            return self.flush()
        # A character still to be finished begins in the last few tokens; what is before them is no text.
        return self._release(len(self._held) - _UNFINISHED)

    def flush(self) -> str:
        """Return the characters held back, unfinished ones as replacement characters."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        if count <= 0:
            return ""
        text = self._text(count)
        self._shown = (self._shown + self._held[:count])[-_CONTEXT:]
        del self._held[:count]
        return text

    def _text(self, count: int) -> str:
        """What the first `count` tokens held back add to the text shown."""
        before = self._decode(self._shown)
        return self._decode(self._shown + self._held[:count])[len(before) :]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    min_tokens: int = 0,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Iterator[str]:
    """Yield the continuation of a prompt as text, piece by piece.

    Args:
        model: A language model.
        tokenizer: The tokenizer that the model was trained with.
        prompt: The text to continue; it is not repeated in the output.
        max_tokens: How many tokens to generate at most.
        min_tokens: Before so many tokens none of `stop_tokens` is chosen.
        sampling: How to choose; `None` is plain sampling.
        stop: Strings that end the text; neither they nor anything after them is yielded.
        stop_tokens: Tokens that end the text; they are not yielded.
        prefill_chunk: The prompt is read in pieces of this many tokens.
        engine: Decode engine for the new tokens, as for `stream`.

    Yields:
        Non-empty pieces of text.

    Raises:
        ValueError: A prompt without tokens, an empty stop string, or a count below 1.
    """
    context = _encode(tokenizer, prompt)
    watch = StopStrings(stop)
    steps = stream(
        model,
        [context],
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        vocab_size=tokenizer.vocab_size,
        prefill_chunk=prefill_chunk,
        engine=engine,
    )
    tokens = (int(step) for step in steps)
    return pieces(tokens, Characters(tokenizer, context), watch, frozenset(stop_tokens))


def stream_reply(
    conversation: Conversation,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    min_tokens: int = 0,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> Iterator[str]:
    """Add a prompt to a conversation and yield its continuation as text, piece by piece.

    What ends the text, a stop string or token, is not yielded but was said: what follows comes after it.

    Args:
        conversation: What was said so far; the prompt is read now, and what is written becomes part of it.
        tokenizer: The tokenizer that the model was trained with.
        prompt: The text to add, which may be empty where something was said already.
        max_tokens: How many tokens to generate at most.
        min_tokens: Before so many tokens none of `stop_tokens` is chosen.
        sampling: How to choose; `None` is plain sampling.
        stop: Strings that end the text; neither they nor anything after them is yielded.
        stop_tokens: Tokens that end the text; they are not yielded.
        engine: Decode engine for the new tokens, as for `stream`.

    Yields:
        Non-empty pieces of text.

    Raises:
        ValueError: Nothing was said, and the prompt is empty; an empty stop string, or a count below 1.
    """
    watch = StopStrings(stop)
    conversation.read(tokenizer.encode(prompt))
    steps = conversation.write(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        vocab_size=tokenizer.vocab_size,
        engine=engine,
    )
    return pieces(steps, Characters(tokenizer, conversation.tokens), watch, frozenset(stop_tokens))


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    min_tokens: int = 0,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 4096,
    engine: DecodeEngine | RecordedDecoder | str = "auto",
) -> list[str]:
    """Continue several prompts at once; each text is what `stream_text` makes of its prompt alone.

    Args:
        model: A language model.
        tokenizer: The tokenizer that the model was trained with.
        prompts: The texts to continue, of any lengths.
        max_tokens: How many tokens to generate at most, for each.
        min_tokens: Before so many tokens none of `stop_tokens` is chosen.
        sampling: How to choose; `None` is plain sampling.
        seeds: A seed for each prompt; by default number i has `sampling.seed + i`.
        stop: Strings that end a text and are no part of it.
        stop_tokens: Tokens that end a text and are no part of it.
        prefill_chunk: The prompts are read in pieces of this many tokens.
        engine: Decode engine for the new tokens, as for `stream`.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        ValueError: As for `stream_text`, and another number of seeds than of prompts.
    """
    contexts = [_encode(tokenizer, prompt) for prompt in prompts]
    rows = [_Row(Characters(tokenizer, one), StopStrings(stop), frozenset(stop_tokens)) for one in contexts]
    steps = stream(
        model,
        contexts,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        seeds=seeds,
        stop_tokens=stop_tokens,
        vocab_size=tokenizer.vocab_size,
        prefill_chunk=prefill_chunk,
        engine=engine,
    )
    for step in steps:
        for row, token in zip(rows, step.tolist(), strict=True):
            row.feed(token)
        if all(row.ended for row in rows):
            steps.close()
    return [row.finish() for row in rows]


class _Row:
    """The text of one row of a batch as it grows."""

    def __init__(self, characters: Characters, watch: StopStrings, stop_tokens: frozenset[int]) -> None:
        self._characters, self._watch, self._stop_tokens = characters, watch, stop_tokens
        self._text: list[str] = []
        self.ended = False

    def feed(self, token: int) -> None:
        if self.ended:
            return
        if token in self._stop_tokens:
            self.ended = True
        else:
            self._text.append(self._watch.feed(self._characters.feed(token)))
            self.ended = self._watch.stopped

    def finish(self) -> str:
        rest = self._watch.feed(self._characters.flush()) + self._watch.flush()
        return "".join(self._text) + rest


def pieces(
    tokens: Iterable[int], characters: Characters, watch: StopStrings, stop_tokens: frozenset[int]
) -> Iterator[str]:
    """Turn tokens into pieces of text until one of them, or a string, ends it.

    Args:
        tokens: Token numbers, as they are chosen.
        characters: Makes characters of them.
        watch: Looks for strings that end the text.
        stop_tokens: Tokens that end the text.

    Yields:
        Non-empty pieces of text.
    """
    for token in tokens:
        if token in stop_tokens:
            break
        if piece := watch.feed(characters.feed(token)):
            yield piece
        if watch.stopped:
            return
    if piece := watch.feed(characters.flush()) + watch.flush():
        yield piece


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    tokens = list(tokenizer.encode(prompt))
    if not tokens:
        raise ValueError(f"the prompt {prompt!r} has no tokens, expected at least one")
    return tokens


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not the whole, of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
