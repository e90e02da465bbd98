"""The site: one lesson is built on every run, all of it when asked for (`pytest -m slow tests/course`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coursekit import exercises, lessons, notebooks, site

pytest.importorskip("myst_nb")

SPECIMEN = "m1/discretisation"
CANARIES = [
    canary
    for name, (_, cell) in lessons.exercise_cells().items()
    if exercises.find(name).graded
    for canary in re.findall(r"canary-[0-9a-f]{8}", cell.code)
]
MINUTES = 15
REQUEST = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//[^>]*>"""
)


@pytest.fixture(scope="module")
def preview(tmp_path_factory) -> Path:
    """The specimen lesson alone, built afresh."""
    return site.build([SPECIMEN], out=tmp_path_factory.mktemp("site"))


def leaks(folder: Path) -> list[str]:
    """Files with a line of a graded solution."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(canary.encode() in path.read_bytes() for canary in CANARIES)
    ]


def test_a_lesson_becomes_a_page(preview):
    page = preview.read_text(encoding="utf-8")
    assert 'data-figure="discretisation"' in page and "figures/discretisation.js" in page
    assert page.count('class="quiz-item"') == 5 and "quiz.js" in page
    assert len(re.findall(r'<div class="check">', page)) == 2
    assert '<li class="failed">' not in page and page.count('<li class="passed">') == 6
    assert "Show one solution" in page and "raise" in page
    assert "{glue:" not in page and "{doc}" not in page
    assert re.search(r"agree to\s+<[^>]+>[\s\S]{0,40}e-1\d", page), "the number in the prose"
    assert "plotly.min.js" not in page, "5 MB for a page that draws nothing with them"


def test_a_page_asks_no_other_machine(preview):
    for path in preview.parent.parent.rglob("*.html"):
        asked = [
            found[0]
            for found in REQUEST.finditer(path.read_text(encoding="utf-8"))
            if 'rel="canonical"' not in found[0]
        ]
        assert not asked, (path.name, asked)


def test_a_lesson_gives_no_graded_solution_away(preview):
    assert CANARIES
    assert leaks(preview.parent.parent) == []
    assert not list(preview.parent.parent.rglob("_sources/*"))


def test_the_cache_belongs_to_the_source_of_the_library(preview):
    """Outputs are kept for unchanged cells; of an older library they would be lies."""
    caches = list((preview.parent.parent.parent / "cache").iterdir())
    assert [cache.name for cache in caches] == [site.source_hash()]


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_the_whole_site_is_built_without_a_warning_and_keeps_its_secrets(tmp_path):
    begun = time.monotonic()
    site.build([], out=tmp_path / "build")
    assert time.monotonic() - begun < 60 * MINUTES
    html = tmp_path / "build" / "html"
    pages = list(html.rglob("*.html"))
    assert len(pages) > 30
    test_a_page_asks_no_other_machine(html / "m1" / "index.html")
    assert leaks(html) == []
    notebooks.write(tmp_path / "notebooks")
    assert leaks(tmp_path / "notebooks") == []


@pytest.mark.slow
def test_the_wheel_has_no_solution(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(site.ROOT),
    ]
    subprocess.run(command, check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "wheel")], check=True)
    assert leaks(tmp_path / "wheel") == []
    assert not list((tmp_path / "wheel").rglob("coursekit"))


@pytest.mark.slow
@pytest.mark.parametrize("solved", [True, False], ids=["solved", "as handed out"])
@pytest.mark.parametrize("name", lessons.names())
def test_a_notebook_runs_from_top_to_bottom(name, solved, tmp_path):
    """Also with empty exercises: what is not written yet is said, not raised."""
    import nbclient
    import nbformat

    notebooks.write(tmp_path)
    notebook = nbformat.from_dict(json.loads(json.dumps(notebooks.notebook(name, solved=solved))))
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
