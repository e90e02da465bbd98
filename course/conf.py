"""Sphinx's settings, for `mambakit course build` (`coursekit/site.py`). Nothing here asks another machine."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from coursekit import site

import mambakit

project = "mambakit"
author = "The mambakit authors"
release = mambakit.__version__
html_title = "mambakit: the course and the guide"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_design",
    "sphinx_copybutton",
    "coursekit.directives",
]
build = Path(os.environ.get("COURSE_BUILD", site.BUILD))
only = os.environ.get("COURSE_ONLY", "").split()
if only:  # a preview of single pages: references into the others are no mistakes
    include_patterns = ["index.md", *(f"{name}.md" for name in only)]
    suppress_warnings = [
        "toc.excluded",
        "toc.not_included",
        "toc.not_readable",
        "ref.doc",
        "ref.ref",
        "ref.term",
        "myst.xref_missing",
    ]
exclude_patterns = ["README.md", "CONTRIBUTING.md", "coursekit", "_static", "quizzes", "midterm", "projects"]

# Lessons: executed, and executed again whenever the library or the course's own modules change
nb_execution_mode = "cache"
nb_execution_cache_path = str(build / "cache" / site.source_hash())
nb_execution_raise_on_error = True
nb_execution_timeout = 400
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# Docstrings
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

# The site: no source files beside the pages (they hold the solutions of graded exercises)
html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static", str(build / "static")]
html_css_files = ["course.css"]
mathjax_path = "vendor/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False, "enableAssistiveMml": True}}
