"""What the lessons of the course use: checks of exercises, figures, and numbers for the prose.

    check("m1-zoh", zoh)             run the checks of an exercise on the reader's function
    figure("discretisation", data)   an interactive figure from numbers the lesson computed
    glue("error", value)             a number that the prose shows as {glue:text}`error:.1e`

The other modules belong to the machinery: `lessons` (sources), `exercises` (checks), `quizzes`, `grading`,
`notebooks`, `site` and `directives` (Sphinx).
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

from coursekit.exercises import check
from coursekit.figures import figure, plotly
from coursekit.lessons import BUDGET

# Lessons compute in float64 on purpose, for which there are no kernels; saying so on every page helps nobody.
warnings.filterwarnings("ignore", message=".*not using the cpu kernels.* not float64")

__all__ = ["check", "figure", "finish", "glue", "plotly"]


def glue(name: str, value: Any) -> None:
    """Give a value to the prose of the page, and print it where there is no page.

    Args:
        name: What `{glue:text}` calls it; letters, digits and underscores, unique in the lesson.
        value: A number or a text; of a tensor with one element, its value.
    """
    value = value.item() if hasattr(value, "item") else value
    if "COURSE_SITE" in os.environ:
        import myst_nb

        myst_nb.glue(name, value, display=False)
    else:
        print(f"{name} = {value}")


def finish() -> None:
    """End a page: fail where the lesson took more processor time than a lesson may."""
    spent = time.process_time()
    assert spent <= BUDGET, (
        f"the lesson took {spent:.0f} s of processor time, at most {BUDGET:.0f} s are allowed"
    )
