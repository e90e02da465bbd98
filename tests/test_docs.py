"""The README does what it says, and every public name says what it does."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import mambakit
from mambakit import ops
from mambakit.cli import main
from mambakit.config import Config
from mambakit.layers.mixer import Mixer
from mambakit.ops.dispatch import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE = Path(mambakit.__file__).parent


# Training as documented, cut short; everything else runs as it is written.
SHORT = [
    "train.steps=2",
    "train.batch_size=2",
    "train.eval_batch_size=512",
    "train.tensorboard=false",
    "model.d_model=16",
    "model.pattern=M",
    "model.mixers.M={type: mamba2, d_state: 4, headdim: 8}",
]
SHORTENED = {"train": SHORT, "finetune": ["train.steps=2", "train.batch_size=2", "train.tensorboard=false"]}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/using.md",
        "docs/decoding.md",
        "docs/generation.md",
        "docs/conversations.md",
        "docs/finetuning.md",
        "docs/evaluation.md",
        "docs/export.md",
    ],
)
def test_what_a_page_shows_runs_in_its_order(page, tmp_path, monkeypatch, capsys):
    """Its commands, its recipes and its Python, in one folder; `print(x)  # this` promises its output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    ran = set()
    for language, block in re.findall(r"^```(bash|python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        ran.add(language)
        capsys.readouterr()
        if language == "yaml":
            Path("my-recipe.yaml").write_text(block)
        elif language == "python":
            exec(compile(block, page, "exec"), {"__name__": "__main__"})
            shown = capsys.readouterr().out
            assert shown.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        else:
            for line in block.splitlines():
                # Installing and testing is what .ci/run does.
                if line.startswith("mambakit "):
                    words = shlex.split(line)[1:]
                    code = main([*words, *SHORTENED.get(words[0], [])])
                    assert code == 0, f"{line}\n{capsys.readouterr().err}"
    assert {"bash", "python"} <= ran


def test_the_commands_of_the_readme_are_those_of_the_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt .\n" in README
    assert "mambakit train shakespeare\n" in README
    assert "pip install -c constraints.txt '.[dev]' && pytest\n" in README
    assert re.search(r"^pip install .*-c constraints.txt '\.\[dev\]'$", script, re.MULTILINE)
    assert re.search(r"^pytest$", script, re.MULTILINE)


def test_the_tree_of_the_readme_is_the_tree():
    [tree] = re.findall(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    inside = tree.split("src/mambakit/", 1)[1]
    named = set(re.findall(r"^  (\w+)(?:/|\.py)", inside, re.MULTILINE))
    real = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert named == real - {"__init__", "__main__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


# ---------------------------------------------------------------------------------------------------------
# Docstrings


def modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


MODULES = [
    module
    for name in ("ops", "layers", "models")
    for module in modules(importlib.import_module(f"mambakit.{name}"))
]


def public(module: ModuleType, kind) -> list:
    """What a module itself defines under a public name."""
    return [
        value
        for name, value in vars(module).items()
        if kind(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


CLASSES = [cls for module in MODULES for cls in public(module, inspect.isclass)]
FUNCTIONS = [function for module in MODULES for function in public(module, inspect.isfunction)]
OPERATORS = [getattr(ops, name) for name in sorted(registry)]


def full_name(value) -> str:
    return f"{value.__module__.removeprefix('mambakit.')}.{value.__qualname__}"


def described(documentation: str) -> set[str]:
    """The names that have a line of their own in an Args or Attributes section."""
    return set(re.findall(r"^ {4}\*{0,2}(\w+): ", documentation, re.MULTILINE))


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("value", [*CLASSES, *FUNCTIONS], ids=full_name)
def test_everything_public_is_documented(value):
    assert value.__doc__, "no docstring"
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(getattr(value, name)), f"{name} has no docstring"


@pytest.mark.parametrize("operator", OPERATORS, ids=full_name)
def test_an_operator_states_its_whole_contract(operator):
    text = inspect.getdoc(operator)
    missing = set(parameters(operator)) - described(text)
    assert not missing, f"not described: {missing}"
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert re.search(rf"^{section}$", text, re.MULTILINE), f"no section {section}"
    for name, annotation in operator.__annotations__.items():
        if "Tensor" in str(annotation) and name != "return":
            [entry] = re.findall(rf"^    {name}: ((?:.|\n(?=     ))*)", text, re.MULTILINE)
            # Letters in brackets, or the same as another argument whose shape is given.
            assert re.search(r"\((\.\.\., )?[bldnhpgwqv][^)]*\)|same|scalar", entry), (
                f"{name} has no shape: {entry}"
            )


@pytest.mark.parametrize("module", [cls for cls in CLASSES if issubclass(cls, nn.Module)], ids=full_name)
def test_a_module_describes_its_arguments_and_shapes(module):
    text = inspect.getdoc(module)
    refers = re.search(r"arguments.* as for `(\w+)`", text)
    if "__init__" in vars(module) and not refers:
        assert set(parameters(module)) <= described(text), set(parameters(module)) - described(text)
    if "forward" in vars(module):
        text = inspect.getdoc(module.forward)
        refers = re.search(r"as for `[\w.]+`", text)
        assert refers or set(parameters(module.forward)) <= described(text)
        assert refers or re.search(r"\((b|\.\.\.), ", text), "no shapes"
        assert refers or "Returns:" in text


@pytest.mark.parametrize(
    "config",
    [cls for cls in CLASSES if issubclass(cls, Config) and dataclasses.is_dataclass(cls)],
    ids=full_name,
)
def test_a_config_describes_its_fields(config):
    own = {name for name in inspect.get_annotations(config) if name in config.__dataclass_fields__}
    assert own <= described(inspect.getdoc(config)), own - described(inspect.getdoc(config))


@pytest.mark.parametrize(
    "mixer", [cls for cls in CLASSES if issubclass(cls, Mixer) and cls is not Mixer], ids=full_name
)
def test_a_mixer_names_its_source(mixer):
    """The paper, in the file or in the class."""
    text = f"{sys.modules[mixer.__module__].__doc__}\n{mixer.__doc__}"
    assert re.search(r"Source:|\d{4}\.\d{5}|et al\.", text)


@pytest.mark.parametrize("operator", sorted(path.parent.name for path in SOURCE.glob("ops/*/reference.py")))
def test_an_operator_has_its_mathematics_beside_it(operator):
    text = (SOURCE / "ops" / operator / "MATH.md").read_text(encoding="utf-8")
    assert len(text) > 1000
