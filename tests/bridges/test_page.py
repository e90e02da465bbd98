"""docs/bridges.md does what it shows, block by block in one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mambakit import compat

PAGE = Path(__file__).parents[2] / "docs" / "bridges.md"


@pytest.fixture
def uninstalled():
    yield
    compat.uninstall()


def test_what_the_page_shows_runs_in_its_order(tmp_path, monkeypatch, capsys, uninstalled):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        capsys.readouterr()
        exec(compile(block, "docs/bridges.md", "exec"), names)
        shown = capsys.readouterr().out
        assert shown.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)


def test_the_page_names_what_is_installed():
    text = PAGE.read_text(encoding="utf-8")
    for module, names in compat.MODULES.items():
        if module.startswith(("mamba_ssm.ops.", "causal_conv1d")):
            for name in names:
                if not name.startswith("__"):
                    assert re.sub("_ref$", "", name) in text, name
