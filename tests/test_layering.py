"""The order of the layers, read from the source: imports point down, function-local ones included."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mambakit

SOURCE = Path(mambakit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# What each part may import, besides itself: "Who imports whom" of docs/architecture.md for a test to read.
_MODELS = {"config", "layers", "models"}
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "ops": {"config"},
    "layers": {"config", "ops"},
    "models": {"config", "layers"},
    "testing": {"config", "families", "ops", *_MODELS},
    "data": {"config"},
    "checkpoints": {"config", "files"},
    "families": {"checkpoints", *_MODELS},
    "load": {"checkpoints", "families", *_MODELS},
    "generation": {"ops", *_MODELS},  # its decode engine calls a native kernel of its own
    "export": {"config", "files", "ops", *_MODELS},
    "training": {"checkpoints", "data", "files", "generation", "load", *_MODELS},
    "evaluation": {"data", "files", "generation", "ops", "training", *_MODELS},
    "recipes": {"config", "data", "training"},
    # Other libraries' words for ours: mamba_ssm's and causal_conv1d's names, transformers' classes.
    "compat": {"checkpoints", "config", "generation", "layers", "ops"},
    "bridges": {"load", *_MODELS},
    "cli": {
        "checkpoints",
        "data",
        "evaluation",
        "export",
        "files",
        "generation",
        "load",
        "ops",
        "recipes",
        "testing",
        "training",
        *_MODELS,
    },
    "__main__": {"cli"},
    # The package's own names: nothing that would need more than torch, numpy and safetensors.
    "__init__": {"config", "generation", "layers", "load", "models", "ops"},
}
# The package itself, for its version.
ROOT_READERS = {"cli", "training"}


# What is asked for by name may import the library that it serves, and has the signatures of that library.
OTHERS_WORDS = {"compat", "bridges"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(source: str, path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything a file imports from mambakit, at any depth."""
    package = ["mambakit", *path.relative_to(SOURCE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from mambakit import ops` imports a part, `from mambakit.ops import ssd` too.
            found += [
                (node.lineno, f"{module}.{alias.name}" if module == "mambakit" else module)
                for alias in node.names
            ]
    return [(line, name) for line, name in found if name.split(".")[0] == "mambakit"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    part = part_of(path)
    assert part in MAY_IMPORT, (
        f"{part} has no place in the order of the layers yet; give it one here and in the docs"
    )
    wrong = []
    for line, name in imports(path.read_text(encoding="utf-8"), path):
        target = name.split(".")[1] if "." in name else None
        if target is None or target == "__version__":
            allowed = part in ROOT_READERS
        else:
            allowed = target == part or target in MAY_IMPORT[part]
        if not allowed:
            wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_order_has_no_cycle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [part for part, below in MAY_IMPORT.items() if part not in order and below <= set(order)]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


def test_the_reader_sees_imports_at_any_depth():
    source = "import mambakit.ops\ndef f():\n    from ..models import x\n    from mambakit import cli, data\n"
    names = [name for _, name in imports(source, SOURCE / "layers" / "imagined.py")]
    assert names == ["mambakit.ops", "mambakit.models", "mambakit.cli", "mambakit.data"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_keeps_the_rules_of_the_house(path):
    """No print, no pickles, no `except Exception`, no triton or transformers at import, no utils.py."""
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what is in it"
    for node in ast.walk(tree):
        where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "pickle.load", "pickle.loads"}, f"{where} calls {called}"
            # Tensors only: what else a file says is not run.
            assert called != "torch.load" or "weights_only=True" in ast.unparse(node), f"{where} unpickles"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in {"", "Exception", "BaseException"}, f"{where} catches everything"
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and part_of(path) not in OTHERS_WORDS:
            assert node.args.kwarg is None, (
                f"{where} forward takes **{node.args.kwarg and node.args.kwarg.arg}"
            )
    for name in module_level_imports(tree):
        heavy = {"pickle"} if part_of(path) == "bridges" else {"transformers", "pickle"}
        assert name.split(".")[0] not in heavy, f"{path.name} imports {name}"
        # Kernels in Triton live in modules of their own, which are imported when one of them is first used.
        is_kernels = path.name.startswith("triton_") and path.name != "triton_utils.py"
        assert is_kernels or not name.startswith("triton"), f"{path.name} imports {name}"
        assert is_kernels or not re.search(r"triton_(?!utils)", name), f"{path.name} imports {name}"


def module_level_imports(tree: ast.Module) -> list[str]:
    """What runs when a module is imported: not inside functions, not under TYPE_CHECKING."""
    found = []
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found
