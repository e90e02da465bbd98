"""A lesson's source and what is made of it: the page of the site, the student's notebook, one solution.

A lesson is a MyST Markdown file. An exercise is a code cell with the option `:exercise: ID`; between
`### BEGIN SOLUTION` and `### END SOLUTION` stands what the reader is to write. The page shows the cell
without it (and, for practice, one solution behind a button), the notebook has it without, the tests run it
with it.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

COURSE = Path(__file__).parents[1]
"""The folder with the lessons."""

_CELL = re.compile(
    r"^```\{code-cell\}[^\n]*\n(?P<options>(?::[\w-]+:[^\n]*\n)*)(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
_SOLUTION = re.compile(
    r"^(?P<indent>[ \t]*)### BEGIN SOLUTION\n(?P<body>.*?)^[ \t]*### END SOLUTION\n?",
    re.MULTILINE | re.DOTALL,
)
_SOLUTION_MARKS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION\n?", re.MULTILINE)
BUDGET = 120.0
"""Seconds of processor time that a lesson may take."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A code cell.

    Attributes:
        code: Its Python.
        options: The lines `:name: value` above it, values as YAML.
        span: Where it stands in the text.
    """

    code: str
    options: dict[str, Any]
    span: tuple[int, int]

    @property
    def exercise(self) -> str | None:
        """Which exercise it is."""
        return self.options.get("exercise")


def names() -> list[str]:
    """Every lesson, as `m1/discretisation`: the pages with a `lesson:` in their front matter."""
    found = []
    for path in sorted(COURSE.glob("m[1-8]/*.md")):
        if "lesson" in front_matter(path.read_text(encoding="utf-8")):
            found.append(f"{path.parent.name}/{path.stem}")
    return found


def source(name: str) -> str:
    """Text of a lesson.

    Args:
        name: As `m1/discretisation`.

    Raises:
        ValueError: There is no such lesson.
    """
    path = COURSE / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"there is no lesson {name!r}; lessons are {', '.join(names())}")
    return path.read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the top of a page."""
    found = _FRONT.match(text)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def body(text: str) -> str:
    """A page without the YAML at its top."""
    return _FRONT.sub("", text)


def cells(text: str) -> Iterator[Cell]:
    """The code cells of a lesson in their order."""
    for found in _CELL.finditer(text):
        options = yaml.safe_load(re.sub(r"^:", "", found["options"], flags=re.MULTILINE)) or {}
        yield Cell(found["code"], options, found.span())


def stub(code: str) -> str:
    """An exercise's cell as the reader gets it."""
    return _SOLUTION.sub(lambda found: f'{found["indent"]}raise NotImplementedError("your turn")\n', code)


def solved(code: str) -> str:
    """An exercise's cell with its solution and without the marks around it."""
    return _SOLUTION_MARKS.sub("", code)


MIDTERM = "midterm/tasks"
"""The coding tasks that stand in the midterm only: a source like a lesson's, which is no page of the site."""


def exercise_cells() -> dict[str, tuple[str, Cell]]:
    """Exercise -> lesson and cell; those of the midterm included."""
    found: dict[str, tuple[str, Cell]] = {}
    for name in [*names(), MIDTERM]:
        for cell in cells(source(name)):
            if cell.exercise is not None:
                if cell.exercise in found:
                    raise ValueError(
                        f"exercise {cell.exercise} stands in {found[cell.exercise][0]} and {name}"
                    )
                found[cell.exercise] = (name, cell)
    return found


# ---------------------------------------------------------------------------------------------------------
# The page


def page(text: str, is_graded: Callable[[str], bool], heading: Callable[[dict[str, Any]], str]) -> str:
    """What Sphinx reads: exercises shown without their solutions, a heading, and a guard on the cost.

    Args:
        text: A lesson's source.
        is_graded: Whether an exercise counts, so that no solution of it may be shown.
        heading: Markdown for the lines under the title, from the lesson's front matter.
    """
    pieces, end = [], 0
    for cell in cells(text):
        pieces.append(text[end : cell.span[0]])
        end = cell.span[1]
        raw = text[cell.span[0] : cell.span[1]]
        pieces.append(_exercise(cell, is_graded(cell.exercise)) if cell.exercise else raw)
    whole = "".join(pieces) + text[end:]
    lesson = front_matter(text).get("lesson", {})
    whole = re.sub(
        r"^# .+\n", lambda found: f"{found[0]}\n{heading(lesson)}\n", whole, count=1, flags=re.MULTILINE
    )
    return (
        f"{whole.rstrip()}\n\n{_cell(f'import coursekit{NEWLINE}coursekit.finish()', tags='[remove-cell]')}\n"
    )


NEWLINE = "\n"


def _exercise(cell: Cell, graded: bool) -> str:
    shown = f"```python\n{stub(cell.code).rstrip()}\n```\n\n"
    if graded:
        return shown + _cell(solved(cell.code), tags="[remove-input]")
    return shown + _cell(
        solved(cell.code), tags="[hide-input]", mystnb='{code_prompt_show: "Show one solution"}'
    )


def _cell(code: str, **options: str) -> str:
    lines = "".join(f":{name}: {value}\n" for name, value in options.items())
    return f"```{{code-cell}} python\n{lines}{code.rstrip()}\n```"


# ---------------------------------------------------------------------------------------------------------
# The notebook

_DIRECTIVE = re.compile(
    r"^(?P<fence>:{3,})\{(?P<name>[\w-]+)\}[ ]*(?P<title>[^\n]*)\n(?P<options>(?::[\w-]+:[^\n]*\n)*)"
    r"(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_TITLES = {"quiz": "Questions", "note": "Note", "tip": "Hint", "warning": "Careful", "dropdown": "More"}


def student(text: str) -> str:
    """The lesson as the reader works on it: stubs, and plain Markdown in place of what only the site has."""
    pieces, end = [], 0
    for cell in cells(text):
        pieces.append(_plain(text[end : cell.span[0]]))
        end = cell.span[1]
        raw = text[cell.span[0] : cell.span[1]]
        pieces.append(raw.replace(cell.code, stub(cell.code)) if cell.exercise else raw)
    return "".join(pieces) + _plain(text[end:])


def statement(text: str, exercise: str) -> str:
    """What a source says above an exercise's cell, back to the cell or the heading before, as plain Markdown.

    Args:
        text: The source.
        exercise: Which.

    Raises:
        ValueError: It does not stand there.
    """
    end = 0
    for cell in cells(text):
        if cell.exercise == exercise:
            above = re.split(r"^#+ .*\n", text[end : cell.span[0]], flags=re.MULTILINE)[-1]
            return _plain(_HINT.sub("", above)).strip()
        end = cell.span[1]
    raise ValueError(f"there is no exercise {exercise!r} in this source")


_HINT = re.compile(r"^(:{3,})\{dropdown\}.*?^\1$\n?", re.MULTILINE | re.DOTALL)


def _plain(prose: str) -> str:
    """Prose without the directives and roles that a notebook would show as they are written."""

    def quoted(found: re.Match[str]) -> str:
        title = found["title"].strip() or _TITLES.get(found["name"], found["name"].capitalize())
        body = "These are on the page of the course.\n" if found["name"] == "quiz" else found["body"]
        return textwrap.indent(f"**{title}**\n\n{body}", "> ", lambda line: True).rstrip()

    prose = _DIRECTIVE.sub(quoted, prose)
    prose = re.sub(r"^\([\w.-]+\)=\n", "", prose, flags=re.MULTILINE)  # targets of references
    prose = re.sub(r"\{glue:text\}`(\w+)(?::[^`]*)?`", r"`\1`", prose)
    return re.sub(r"\{[\w:]+\}`([^`<]+?)(?: <[^`>]+>)?`", r"\1", prose)
