"""Interactive figures: numbers from a lesson, drawn by a script of the site.

A figure is a name (`_static/figures/NAME.js` draws it) and data, which the lesson computes. On the site the
scripts are loaded once per page; in a notebook, which has no site, they come with the figure.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
from pathlib import Path
from typing import Any

import torch

STATIC = Path(__file__).parents[1] / "_static"
LIBRARY = STATIC / "figures" / "library.js"


def available() -> list[str]:
    """Names of the figures."""
    return sorted(path.stem for path in (STATIC / "figures").glob("*.js") if path != LIBRARY)


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a cell ends in to show a figure."""

    name: str
    data: str
    label: str
    caption: str

    def _repr_html_(self) -> str:
        picture = (
            f'<figure class="course-figure" data-figure="{self.name}" aria-label="{html.escape(self.label)}">'
            f'<script type="application/json">{self.data}</script>'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )
        if "COURSE_SITE" in os.environ:
            return picture
        style = (STATIC / "course.css").read_text(encoding="utf-8")
        scripts = [
            path.read_text(encoding="utf-8") for path in (LIBRARY, LIBRARY.with_name(f"{self.name}.js"))
        ]
        inline = "".join(f"<script>{script}</script>" for script in scripts)
        return f"<style>{style}</style>{picture}{inline}<script>CourseFigures.mountAll();</script>"


def figure(name: str, data: dict[str, Any], *, label: str, caption: str) -> Figure:
    """Show an interactive figure.

    Args:
        name: Which one: the name of a file in `_static/figures`.
        data: What it shows: numbers, texts, lists, tensors, arrays, in dictionaries.
        label: What it shows, in a sentence, for those who cannot see it.
        caption: The line below it: what to try, what to look at.

    Raises:
        ValueError: There is no such figure, or a number is not finite.
    """
    if name not in available():
        raise ValueError(f"there is no figure {name!r}; there are {', '.join(available())}")
    try:
        text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"figure {name}: the data has a number that is not finite") from error
    return Figure(name, text.replace("</", "<\\/"), label, caption)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, numbers with the digits that a screen can show."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = torch.view_as_real(value) if value.is_complex() else value
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclasses.dataclass(frozen=True)
class Plotly:
    """A figure of plotly's, without its script: the page has it once, from the site itself."""

    markup: str

    def _repr_html_(self) -> str:
        return f'<div class="course-plotly">{self.markup}</div>'


def plotly(picture: Any, *, label: str) -> Plotly:
    """Show a figure made with plotly.

    Args:
        picture: A `plotly.graph_objects.Figure`.
        label: What it shows, in a sentence, for those who cannot see it.
    """
    alone = "COURSE_SITE" not in os.environ
    markup = picture.to_html(full_html=False, include_plotlyjs=alone, auto_play=False)
    return Plotly(f'<div role="img" aria-label="{html.escape(label)}">{markup}</div>')
