"""A recipe that trains in a second, and the runs it leaves, shared by the tests of the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mambakit.cli import main

TINY = """
about: {{summary: Words., hardware: any, cost: a second, expected: nothing}}
task: {{type: language-modeling}}
data: {{type: text, path: {text}, length: 16, vocabulary: characters}}
model: {{d_model: 16, pattern: "M", mixers: {{M: {{type: mamba2, d_state: 4, headdim: 8}}}}}}
train: {{steps: 6, batch_size: 4, eval_every: 3, checkpoint_every: 3, tensorboard: false}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The recipe file."""
    folder = tmp_path_factory.mktemp("recipes")
    draw = random.Random(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    (folder / "words.txt").write_text(" ".join(draw.choice(words) for _ in range(400)))
    (folder / "tiny.yaml").write_text(TINY.format(text=folder / "words.txt"))
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def text_run(tiny, tmp_path_factory) -> Path:
    """A finished run on text. Tests may add files to it, not change what is there."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    assert main(["train", str(tiny), f"out={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def parity_run(tiny, tmp_path_factory) -> Path:
    """A finished run on data that is not text, with named tests."""
    folder = tmp_path_factory.mktemp("runs") / "bits"
    words = ["data={type: parity, evaluation_lengths: [8, 16], evaluation_samples: 32}", f"out={folder}"]
    assert main(["train", str(tiny), *words]) == 0
    return folder


@pytest.fixture
def cli(capsys):
    """Run the command in this process; gives exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run
