"""Conversations as token ids: chat templates, and which tokens a model is asked to say.

A chat template is a Jinja program that writes a list of messages, `{"role": ..., "content": ...}`, as the one
text that a model reads; published checkpoints keep theirs in `tokenizer_config.json`. It runs here in Jinja's
sandbox, with what templates expect: `messages`, `add_generation_prompt`, `raise_exception`, and the block
`{% generation %}`.

What the assistant says is asked, everything else is only read. A turn's text is what the template adds to the
conversation before it, opened by `add_generation_prompt`: exactly what a model continues when talked to.
Each piece becomes tokens by itself, so a border between what is read and what is said is a border of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.config import ConfigError
from mambakit.data.config import DataError
from mambakit.data.tokenizers import Tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""For models that have no template of their own."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja program.
        variables: Further names that the template uses, such as `bos_token`.

    Raises:
        ConfigError: It is no Jinja program.
    """

    def __init__(self, source: str = PLAIN_TEMPLATE, variables: Mapping[str, Any] | None = None) -> None:
        import jinja2

        self.source, self._variables = source, dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """Read the template of a published checkpoint, or `None` where it has none.

        Raises:
            ConfigError: Its `tokenizer_config.json` cannot be read, or the template is no Jinja program.
        """
        file, beside = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            source = beside.read_text(encoding="utf-8") if beside.is_file() else found.get("chat_template")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
        if isinstance(source, list):  # several, by name
            source = next((one["template"] for one in source if one.get("name") == "default"), None)
        if source is None:
            return None
        tokens = {key: _content(value) for key, value in found.items() if key.endswith("_token")}
        return cls(source, {key: value for key, value in tokens.items() if value is not None})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Write a conversation as text.

        Args:
            messages: Its messages, in order.
            add_generation_prompt: End with what opens a turn of the assistant.

        Raises:
            DataError: The template refuses the conversation.
        """
        import jinja2

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from None

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Cut a conversation into what is read and what the assistant says.

        Args:
            messages: Its messages, in order.

        Returns:
            Pairs (text, whether it is asked); the texts joined are `render(messages)`.

        Raises:
            DataError: The template refuses the conversation, or writes its beginning otherwise when more
                follows.
        """
        pieces: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            opened = self.render(messages[:number], add_generation_prompt=True)
            closed = self.render(messages[: number + 1])
            for text, asked in ((opened, False), (closed, True)):
                if not text.startswith(done):
                    raise DataError(
                        f"the chat template writes message {number} differently when more follows; "
                        "expected each turn to be added at the end"
                    )
                pieces.append((text[len(done) :], asked))
                done = text
        rest = self.render(messages)
        if not rest.startswith(done):
            raise DataError("the chat template rewrites earlier turns; expected each to be added at the end")
        pieces.append((rest[len(done) :], False))
        return [piece for piece in pieces if piece[0]]

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Write a conversation as tokens.

        Args:
            messages: Its messages, in order.
            tokenizer: What makes tokens of text.

        Returns:
            Token ids `(l,)` int64, and whether each is asked, `(l,)` bool.

        Raises:
            DataError: As `pieces`.
        """
        parts = [(tokenizer.encode(text), asked) for text, asked in self.pieces(messages)]
        ids = np.concatenate([part for part, _ in parts] or [np.empty(0, np.int64)])
        asked = np.concatenate([np.full(len(part), asked) for part, asked in parts] or [np.empty(0, bool)])
        return ids.astype(np.int64), asked.astype(bool)


def _content(token: Any) -> Any:
    """The text of a special token, which is written as itself or as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def _environment() -> Any:
    """Jinja as chat templates expect it."""
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}`: marks the assistant's words; here only written."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment
