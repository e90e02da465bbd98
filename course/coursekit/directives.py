"""The Sphinx extension: exercises without solutions, quizzes, pages of docs/, readable docstrings."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from coursekit import curriculum, exercises, lessons, quizzes

ROOT = lessons.COURSE.parent
SALT = "mambakit course"


def heading(lesson: dict[str, Any]) -> str:
    """The lines under a lesson's title: what it is for, and what it takes."""
    if not lesson:
        return ""
    facts = [f"{lesson['minutes']} minutes", f"{lesson['cpu_seconds']} s of one processor"]
    needs = ", ".join(f"{{doc}}`/{name}`" for name in lesson.get("needs", []))
    after = f" · after {needs}" if needs else ""
    return f"\n::::{{div}} lesson-head\n**{lesson['goal']}**\n\n{' · '.join(facts)}{after}\n::::\n"


def read_source(app: Sphinx, name: str, source: list[str]) -> None:
    """Before a page is parsed: lessons lose their solutions, guide pages get their text from docs/."""
    text = source[0]
    if "lesson" in lessons.front_matter(text):
        text = lessons.page(text, lambda exercise: exercises.find(exercise).graded, heading)
    for directive, made in (("docs", _from_docs), ("lessons", _lessons)):
        pattern = rf"^```\{{{directive}\}} (\S+)\n```$"
        text = re.sub(pattern, lambda found, made=made: made(found[1]), text, flags=re.MULTILINE)
    source[0] = re.sub(r"\{anchor\}`([\w-]+)`", lambda found: _anchor(found[1]), text)


def _from_docs(page: str) -> str:
    """A page of docs/ without its title; links to other files of the repository become their names."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"\A# .*\n", "", text)

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        known = GUIDE_PAGES.get(Path(target.partition("#")[0]).name)
        return f"[{words}](/guide/{known}.md)" if known else f"{words}"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", link, text)


def _lessons(module: str) -> str:
    """A module's topics with where each is taught, and its lessons in the order of the curriculum."""
    entries, written = curriculum.entries(module), curriculum.written(module)
    rows = [
        f"| {entry.topic} | {entry.text} | {_anchor(entry.anchor) if entry.is_written else 'to come'} |"
        for entry in entries
    ]
    table = "\n".join(["| topic | what | where |", "|---|---|---|", *rows])
    toctree = "\n".join(f"/{name}" for name in written)
    return f"{table}\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```" if written else table


def _anchor(name: str) -> str:
    """A link to where something is taught, or a word where that is not written yet."""
    entry = curriculum.find(name)
    if not entry.is_written:
        return f"module {entry.module[1:]}, to come"
    [title] = re.findall(r"^# (.+)$", lessons.source(entry.lesson), re.MULTILINE)[:1]
    return f"{{ref}}`{title} <{name}>`"


GUIDE_PAGES = {
    "using.md": "train",
    "checkpoints.md": "checkpoints",
    "decoding.md": "decoding",
    "decoding_gpu.md": "decoding",
    "architecture.md": "architecture",
    "log.md": "benchmarks",
    "finetuning.md": "fine-tuning",
    "evaluation.md": "evaluation",
    "generation.md": "generation",
    "conversations.md": "conversations",
    "export.md": "export",
    "bridges.md": "bridges",
}
"""Page of docs/ -> page of the guide that shows it."""


# ---------------------------------------------------------------------------------------------------------
# Quizzes


class Quiz(SphinxDirective):
    """`{quiz}` with the names of items: a form that checks itself.

    The page holds a salted hash of each key and, encoded, what to say afterwards: nobody reads an answer by
    accident. Nothing is graded here.
    """

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        """Build the form."""
        content: list[nodes.Node] = []
        for number, name in enumerate(self.arguments[0].split(), start=1):
            items = quizzes.bank(name.partition("-")[0])
            if name not in items:
                raise self.error(f"there is no quiz item {name!r}")
            self.env.note_dependency(str(lessons.COURSE / "quizzes" / f"{name.partition('-')[0]}.yaml"))
            question = quizzes.ask(items[name], quizzes.first_values(items[name]))
            content += self._question(number, question)
        return [nodes.container("", *content, classes=["quiz"])]

    def _question(self, number: int, question: quizzes.Question) -> list[nodes.Node]:
        facts = {
            "type": question.type,
            "key": [digest(question.id, key) for key in _accepted(question)],
            "why": _encoded(question.why),
            "whys": [_encoded(choice.why) for choice in question.choices],
        }
        data = html.escape(json.dumps(facts), quote=True)
        name = html.escape(question.id)
        opening = f'<form class="quiz-item" id="quiz-{name}" data-id="{name}" data-quiz="{data}">'
        asked = nodes.container(
            "", *self.parse_text_to_nodes(f"**{number}.** {question.ask}"), classes=["ask"]
        )
        asked["ids"] = [f"ask-{question.id}"]
        parts: list[nodes.Node] = [_raw(opening), asked]
        if question.type == "choice":
            kind = "radio" if len(question.key) == 1 else "checkbox"
            parts.append(_raw(f'<div role="group" aria-labelledby="ask-{name}"><ul>'))
            for index, choice in enumerate(question.choices):
                words, messages = self.parse_inline(choice.text.strip())
                # Of a choice that is a formula only, a reader of the screen would hear nothing.
                spoken = (
                    html.escape(choice.text.strip().replace("$", ""), quote=True)
                    if "$" in choice.text
                    else ""
                )
                label = f' aria-label="{spoken}"' if spoken else ""
                box = f'<li><label><input type="{kind}" name="{name}" value="{index}"{label}> <span>'
                parts += [_raw(box), nodes.inline("", "", *words), *messages]
                parts.append(_raw('</span></label><div class="why" hidden></div></li>'))
            parts.append(_raw("</ul></div>"))
        else:
            hint = "three significant digits" if question.type == "number" else "your answer"
            mode = "decimal" if question.type == "number" else "text"
            parts.append(
                _raw(
                    f'<p><input type="text" inputmode="{mode}" name="{name}" aria-labelledby="ask-{name}" '
                    f'placeholder="{hint}" autocomplete="off"></p>'
                )
            )
        parts.append(
            _raw('<p><button type="submit">Check</button> <output aria-live="polite"></output></p></form>')
        )
        return parts


def _accepted(question: quizzes.Question) -> list[str]:
    if question.type == "number":
        return list(quizzes.neighbours(float(question.key)))
    return [question.normal(question.key)]


def digest(item: str, answer: str) -> str:
    """What the page holds in place of a key; `quiz.js` computes the same."""
    return hashlib.sha256(f"{SALT}|{item}|{answer}".encode()).hexdigest()


def _encoded(text: str) -> str:
    return base64.b64encode(text.strip().encode()).decode()


def _raw(markup: str) -> nodes.raw:
    return nodes.raw("", markup, format="html")


# ---------------------------------------------------------------------------------------------------------
# Docstrings are written for an editor, with backticks and indented formulas; reStructuredText wants more


def readable_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring's single backticks into code and its indented formulas into literal blocks."""
    lines[:] = docstring(lines)


def skip_tuple_fields(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple are described in its docstring; Python's own words for them say nothing."""
    return True if type(value).__name__ == "_tuplegetter" else None


def docstring(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    literal_above: int | None = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal_above is not None and line.strip() and indent <= literal_above:
            literal_above = None
        if literal_above is not None:
            out.append(line)
            continue
        if _formula_follows(lines, index):
            line = _escaped(line) + ("" if line.rstrip().endswith("::") else ":")
            line = line if line.rstrip().endswith("::") else line + "\n\n::"
            out += line.split("\n")
            literal_above = indent
            continue
        out.append(_escaped(line))
    return out


_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Source|Yields|Note|Example|Examples):$")


def _formula_follows(lines: list[str], index: int) -> bool:
    """Whether the next paragraph stands deeper than this line, as a formula or a table does."""
    line = lines[index]
    if (
        not line.strip()
        or _SECTION.match(line.strip())
        or index + 2 >= len(lines)
        or lines[index + 1].strip()
    ):
        return False
    here = len(line) - len(line.lstrip())
    after = next((later for later in lines[index + 1 :] if later.strip()), "")
    return len(after) - len(after.lstrip()) >= here + 4 and here == 0


def _escaped(line: str) -> str:
    pieces = re.split(r"(`[^`]*`)", line)
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = f"`{piece}`"
        else:
            pieces[index] = re.sub(
                r"(?<!\w)(\*+)(?=\w)", lambda found: re.sub(r"\*", r"\\*", found[1]), piece
            )
            pieces[index] = re.sub(r"\|", r"\\|", pieces[index])
            pieces[index] = re.sub(r"(?<=\w)_(?=[\s,.;:)]|$)", r"\\_", pieces[index])
    return "".join(pieces)


# ---------------------------------------------------------------------------------------------------------


def load_what_a_page_needs(
    app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Scripts only where something uses them: plotly has 5 MB."""
    body = context.get("body") or ""
    if 'class="quiz' in body:
        app.add_js_file("quiz.js")
    if "data-figure=" in body:
        app.add_js_file("figures/library.js")
        for figure in sorted(set(re.findall(r'data-figure="([\w-]+)"', body))):
            app.add_js_file(f"figures/{figure}.js")
    if 'class="course-plotly"' in body:
        app.add_js_file("vendor/plotly.min.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything."""
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", readable_docstring, priority=100)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("html-page-context", load_what_a_page_needs)
    app.add_directive("quiz", Quiz)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
