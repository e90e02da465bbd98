"""Every page in a browser: no error, no foreign request, nothing too wide, figures and quizzes alive.

Needs the site (`mambakit course build`), playwright and a Chromium on this machine; `pytest -m slow` runs it.
"""

from __future__ import annotations

import importlib.util
import shutil

import pytest
from coursekit import lessons, quizzes, site

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = sorted(
    str(path.relative_to(site.SITE))
    for path in site.SITE.rglob("*.html")
    if not {"_modules", "_static"} & set(path.relative_to(site.SITE).parts)
)
# The theme asks for a mode before one is chosen, and says so.
HARMLESS = ("Got invalid theme mode",)


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None or BROWSER is None or not PAGES:
        pytest.skip("needs the site, playwright and a Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Open a page of the site at a width; at the end, what it said and asked for is judged."""
    pages, said, asked = [], [], []

    def open_one(name: str, width: int = 1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site.SITE / name).as_uri())
        page.wait_for_load_state("load")
        page.wait_for_timeout(300)
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert [text for text in said if not text.startswith(HARMLESS)] == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_says_nothing(open_page, name, width):
    page = open_page(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["pictures", *lessons.names()])
def test_every_figure_is_drawn_and_answers_the_keyboard(open_page, name):
    page = open_page(f"{name}.html")
    for figure in page.query_selector_all("figure.course-figure"):
        assert figure.query_selector_all("svg"), "nothing is drawn"
        controls = figure.query_selector_all("input[type=range], select")
        assert controls, "nothing can be moved"
        for control in controls:
            before = figure.query_selector(".canvas").inner_html()
            control.focus()
            for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "Home", "End"):
                page.keyboard.press(key)
                page.wait_for_timeout(50)
                if figure.query_selector(".canvas").inner_html() != before:
                    break
            else:
                pytest.fail(f"{figure.get_attribute('data-figure')}: a control changes nothing")
        assert figure.query_selector(".readout").inner_text(), "nothing is said"


@pytest.mark.parametrize("name", lessons.names())
def test_every_question_tells_right_from_wrong(open_page, name):
    page = open_page(f"{name}.html")
    module = name.partition("/")[0]
    for form in page.query_selector_all("form.quiz-item"):
        question = quizzes.ask(*with_values(quizzes.bank(module)[form.get_attribute("data-id")]))
        for right in (False, True):
            answer(form, question, right)
            form.query_selector("button").click()
            shown = form.query_selector("output").inner_text()
            assert shown.startswith("Right." if right else "Not yet."), (question.id, right, shown)


def with_values(item):
    return item, quizzes.first_values(item)


def answer(form, question: quizzes.Question, right: bool) -> None:
    """Fill a form in."""
    if question.type == "choice":
        wanted = (
            question.key if right else [i for i in range(len(question.choices)) if i not in question.key][:1]
        )
        for index, box in enumerate(form.query_selector_all("input")):
            if box.get_attribute("type") == "checkbox":
                box.set_checked(index in wanted)
            elif index in wanted:
                box.check()
    elif question.type == "number":
        form.query_selector("input").fill(f"{float(question.key) if right else 1.7 * question.key + 1:.6g}")
    else:
        form.query_selector("input").fill(str(question.key) if right else "something else")


@pytest.mark.parametrize("name", [name for name in PAGES if not name.startswith("api/")])
def test_a_page_is_accessible(open_page, name):
    """axe-core finds nothing serious in what is ours; where axe-playwright-python is installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(name)
    found = axe.run(page, context={"include": [["#main-content"]]}, options={"preload": False}).response[
        "violations"
    ]
    serious = {
        violation["id"]: [node["target"] for node in violation["nodes"]][:3]
        for violation in found
        if violation["impact"] in ("serious", "critical")
    }
    assert serious == {}
