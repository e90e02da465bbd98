"""Final projects: the specimens are verified, an empty template is refused, and every cheat is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from coursekit import projects

TRACKS = sorted(projects.TRACKS)
THEORY = projects.SPECIMENS / "theory"


def failed(folder: Path) -> dict[str, str]:
    return {finding.title: finding.message for finding in projects.verify(folder) if not finding.passed}


@pytest.mark.slow
@pytest.mark.parametrize("track", [track for track in TRACKS if track != "theory"])
def test_a_specimen_is_verified(track):
    assert failed(projects.SPECIMENS / track) == {}


def test_the_quickest_specimen_is_verified_and_its_points_add_up():
    findings = projects.verify(THEORY)
    assert [finding for finding in findings if not finding.passed] == []
    assert sum(finding.points for finding in findings) == projects.POINTS
    rubric = yaml.safe_load((projects.SPECIMENS.parent / "rubric.yaml").read_text())
    assert projects.POINTS + sum(line["points"] for line in rubric.values()) == 100


@pytest.mark.parametrize("track", TRACKS)
def test_specimens_stay_within_their_budget(track):
    made = json.loads((projects.SPECIMENS / track / "recorded" / "summary.json").read_text())
    assert made["cpu_seconds"] <= 60
    assert made["source"] == projects.source_hash(projects.SPECIMENS / track)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The theory specimen to be spoiled; its runs are not repeated."""
    shutil.copytree(THEORY, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))
    recorded = json.loads((THEORY / "recorded" / "small.json").read_text())["runs"]
    monkeypatch.setattr(projects, "run", lambda folder, *, small, limit: (recorded, 1.0))
    return tmp_path / "project"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("project.yaml", "states has", "FILL IN", "still says FILL IN"),
        ("project.yaml", "models?", "models.", "is no question"),
        ("project.yaml", "role: control", "role: other", "0 variants have the role control"),
        ("project.yaml", "role: trivial", "role: baseline", "there is no role baseline"),
        ("project.yaml", "[0, 1, 2]", "[0, 1]", "2 seeds, expected 3"),
        ("project.yaml", "[0, 1, 2]", "[0, 1, 3]", "ran with the seeds"),
        ("project.yaml", "mean: 5", "mean: 4", "is 5, not 4"),
        ("project.yaml", "by: 1", "by: 8", "beats chain by 7"),
        ("report.md", "## Limits", "## Ends", "no section Limits"),
        ("report.md", "| chain | 5 | 0 |", "| chain | 5.01 | 0 |", "5.01, which is in no record"),
        ("report.md", "**Proof.**", "Evidently.", "no **Proof.**"),
        ("run.py", "1e-10", "1e-9", "made by other code"),
        ("recorded/small.json", '"largest_rank": 5', '"largest_rank": 6', "recorded 6"),
        ("recorded/summary.json", '"violations": 20', '"violations": 0', "could not have failed"),
        ("recorded/summary.json", '"violations": 0', '"violations": 1', "violates the statement"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(copy, name, old, new, message):
    assert failed(copy) == {}
    change(copy / name, old, new)
    assert any(message in found for found in failed(copy).values()), failed(copy)


def test_numbers_are_compared_as_they_are_written():
    assert list(projects.numbers("12 of 3.5 and 1,024.5, 97 % `0.3` $0.4$ [x](y/2.5) v2.0a")) == [
        "3.5",
        "1,024.5",
        "97 %",
    ]
    for value, written, right in (
        (0.97654, "0.977", True),
        (0.97654, "0.976", False),
        (1234.5, "1.2e3", True),
    ):
        assert projects._rounds_to(value, written) is right


@pytest.mark.parametrize("track", TRACKS)
def test_a_template_runs_and_is_refused_until_it_is_filled_in(track, tmp_path, monkeypatch):
    projects.new(track, tmp_path / "mine")
    compile((tmp_path / "mine" / "run.py").read_text(), "run.py", "exec")
    plan = projects.read(tmp_path / "mine")
    runs = [{"variant": v, "seed": s, "metrics": {}} for v in plan["variants"] for s in plan["seeds"]]
    monkeypatch.setattr(projects, "run", lambda folder, *, small, limit: (runs, 1.0))
    projects.record(tmp_path / "mine")
    found = " ".join(failed(tmp_path / "mine").values())
    assert "still says FILL IN" in found
    with pytest.raises(ValueError, match="exists already"):
        projects.new(track, tmp_path / "mine")


def test_a_template_runs_as_it_is(tmp_path):
    projects.new("evaluate", tmp_path / "mine")
    out = tmp_path / "runs.json"
    subprocess.run([sys.executable, "run.py", "--out", str(out)], cwd=tmp_path / "mine", check=True)
    assert len(json.loads(out.read_text())) == 15


def test_there_are_four_tracks():
    with pytest.raises(ValueError, match="there is no track 'poetry'"):
        projects.new("poetry", Path("nowhere"))
    assert {path.name for path in projects.TEMPLATES.iterdir()} == set(TRACKS)


def test_a_mixer_that_sees_the_future_or_forgets_its_state_is_refused():
    import dataclasses

    import torch
    from torch import nn

    import mambakit

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SumConfig(mambakit.MixerConfig, tag="test-sum"):
        whole: bool = False

    class Sum(mambakit.Mixer, config=SumConfig):
        def __init__(self, d_model, config=None, *, device=None, dtype=None):
            super().__init__()
            self.config, self.out_proj = config, nn.Linear(d_model, d_model, dtype=dtype)

        def forward(self, x, state=None, context=None):
            if self.config.whole:
                return self.out_proj(x.mean(1, keepdim=True).expand_as(x))
            return self.out_proj(torch.cumsum(x, 1))

    for config in (SumConfig(whole=True), SumConfig()):
        with pytest.raises(ValueError, match="the whole and pieces"):
            projects.conformance(config)
    projects.conformance(mambakit.layers.Mamba2Config(d_state=8, headdim=8))
