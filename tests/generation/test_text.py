"""Stop strings and characters over token borders: however the text is cut, what shows is the same."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mambakit.generation import StopStrings
from mambakit.generation.text import Characters


class Bytes:
    """UTF-8 bytes as tokens: most characters of most scripts take several."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens) -> str:
        return bytes(tokens).decode(errors="replace")


def cut(text: str, stops: list[str]) -> str:
    """The specification: read character by character until some stop string has just been completed."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["a", "b", "a", "b", "c"], stops=["abc"])
@example(pieces=["abcd"], stops=["bcd", "cd", "abcde"])
def test_stop_strings_cut_alike_however_the_text_arrives(pieces, stops):
    watch = StopStrings(stops)
    shown, text, final = "", "".join(pieces), cut("".join(pieces), stops)
    for piece in pieces:
        shown += watch.feed(piece)
        # Whatever follows, nothing that was shown may turn out to belong to a stop string.
        assert final.startswith(shown)
    assert shown + watch.flush() == final
    assert watch.stopped == (final != text)


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once():
    watch = StopStrings(["\n\n"])
    assert [watch.feed(c) for c in "one\ntwo"] == ["o", "n", "e", "", "\nt", "w", "o"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])


@pytest.mark.parametrize("text", ["To be", "naïve café", "日本語のテキスト", "🐍🐍 ok", "e\u0301", ""])
def test_characters_of_several_tokens_appear_whole(text):
    stream = Characters(Bytes(), Bytes().encode("prompt é"))
    pieces = [stream.feed(token) for token in Bytes().encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert [p for p in pieces if p] == list(text)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_shown_without_waiting_for_ever(tokens):
    stream = Characters(Bytes())
    waiting = 0
    for token in tokens:
        waiting = 0 if stream.feed(token) else waiting + 1
        assert waiting <= 3
    stream.flush()
    assert stream.feed(ord("x")) == "x"


def test_an_unfinished_character_at_the_end_shows_as_a_replacement():
    stream = Characters(Bytes())
    assert [stream.feed(token) for token in "aé".encode()[:2]] == ["a", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
