"""What importing the package costs, and that its version is one."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import mambakit

ALLOWED = ("mambakit", "torch", "numpy", "safetensors")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_only_torch_numpy_and_safetensors():
    """Every other installed distribution is hidden, except what torch itself cannot do without."""
    output = run_python(
        f"""
        import sys
        import numpy, safetensors.torch, torch, torch.utils.checkpoint, torch.utils.flop_counter

        present = set(sys.modules)  # with what these three need themselves

        class Hide:
            def find_spec(self, name, path=None, target=None):
                root = name.partition(".")[0]
                if root not in {ALLOWED!r} and root not in sys.stdlib_module_names and name not in present:
                    raise ModuleNotFoundError(f"hidden by the test: {{name}}", name=name)

        sys.meta_path.insert(0, Hide())
        import mambakit
        import mambakit.generation

        model = mambakit.LanguageModel(mambakit.LanguageModelConfig(vocab_size=11, d_model=64, pattern="M-*"))
        tokens = torch.arange(7)[None]
        model(tokens).sum().backward()
        print(mambakit.generate(model, tokens, max_tokens=3).shape)
        """
    )
    assert output.strip() == "torch.Size([1, 3])"


def test_importing_draws_in_nothing_that_training_needs():
    heavy = (
        "pydantic",
        "yaml",
        "rich",
        "typer",
        "tokenizers",
        "transformers",
        "triton",
        "matplotlib",
        "tensorboard",
    )
    output = run_python(
        f"""
        import sys
        import torch

        before = set(sys.modules)
        import mambakit

        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        print(sorted(new & set({heavy!r})))
        """
    )
    assert output.strip() == "[]"


def test_import_takes_less_than_two_seconds():
    """Processor time, which neighbours on a busy machine do not change; the best of three."""
    seconds = [
        float(run_python("import time; import mambakit; print(time.process_time())")) for _ in range(3)
    ]
    assert min(seconds) < 2.0, seconds


def test_the_changelog_knows_the_version():
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", mambakit.__version__)
    assert f"## [{mambakit.__version__}]" in changelog


def test_every_public_name_exists():
    assert all(hasattr(mambakit, name) for name in mambakit.__all__)
