"""Every suite at toy sizes, so that none can rot, and what a suite does when something cannot be measured."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import peers, runner, suites
from benchmarks.__main__ import main
from benchmarks.work import block_flops, head_flops, weight_bytes
from mambakit import AttentionConfig, LanguageModel, LanguageModelConfig, Mamba1Config, Mamba2Config
from mambakit.ops.dispatch import registry

ROOT = Path(__file__).parents[2]
FIELDS = {
    "suite",
    "name",
    "variant",
    "status",
    "dtype",
    "at",
    "commit",
    "device",
    "threads",
    "versions",
    "date",
}
MEASURED = {"clock", "median", "lower", "upper", "cpu_seconds", "runs", "bytes", "flops", "share", "error"}


def run(folder: Path, suite: str, *words: str) -> tuple[int, list[dict]]:
    """The exit code and the lines of a quick run."""
    code = main(["run", suite, "--quick", "--device", "cpu", "--out", str(folder), *words])
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return code, lines


@pytest.mark.parametrize("suite", suites.NAMES)
def test_a_suite_measures_everything_of_ours_and_lists_every_peer(tmp_path, suite):
    code, lines = run(tmp_path, suite)
    assert code == 0
    assert lines
    cases: dict[str, set[str]] = {}
    for line in lines:
        assert line.keys() >= FIELDS
        cases.setdefault(line["name"], set()).add(line["variant"])
        if line["variant"].startswith(suites.OURS):
            assert line["status"] == "measured", line
        if line["status"] == "measured":
            assert line.keys() >= MEASURED
            assert 0 < line["lower"] <= line["median"] <= line["upper"]
            assert 0 <= line["error"] < 0.1
            limits = line["ceilings"]
            floor = max(line["bytes"] / limits["copy"], line["flops"] / limits["matmul"])
            assert line["share"] == pytest.approx(floor / line["median"], rel=1e-3)
        else:
            assert line["status"] in ("missing", "declined"), line
            assert line["reason"]
    offered = {
        "operators": ["selective_scan", "ssd", "norm"],
        "modules": ["mixers mamba1", "mixers mamba2"],
        "models": ["models mamba1", "models mamba2"],
        "scaling": [],
        "compat": ["models mamba1", "models mamba2"],
    }[suite]
    for what in offered:
        word = what.split()[-1]
        named = set().union(*(variants for name, variants in cases.items() if word in name))
        for peer in ("transformers",) if suite == "compat" else peers.offering(what, torch.device("cpu")):
            assert any(variant.split()[0] == peer for variant in named), (what, peer)


def test_state_is_flat_for_scans_and_grows_for_attention(tmp_path):
    _, lines = run(tmp_path, "scaling", "--only", "decode")
    states: dict[str, list[int]] = {}
    for line in lines:
        states.setdefault(line["variant"], []).append(line["state_bytes"])
    assert len(set(states["mambakit mamba1"])) == 1
    assert len(set(states["mambakit mamba2"])) == 1
    grown = states["mambakit attention"]
    assert grown[-1] / grown[0] == pytest.approx(4, rel=0.05)  # contexts 32 to 128


def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch):
    module = registry["norm"].backends["chunked"]
    right = module.norm
    monkeypatch.setattr(module, "norm", lambda *inputs: 1.01 * right(*inputs))
    code, lines = run(tmp_path, "operators", "--only", "norm")
    assert code == 1
    ours = [line for line in lines if line["variant"] == "mambakit chunked"]
    assert {line["status"] for line in ours} == {"wrong"}
    assert all("backend chunked: output0 has a relative error of 0.01" in line["reason"] for line in ours)
    # What is right is timed all the same, unless it is compared with what is wrong.
    assert {line["status"] for line in lines if line["variant"] == "torch"} <= {"measured", "wrong"}


def test_what_a_peer_cannot_do_is_written_down(tmp_path, monkeypatch):
    def load(name):
        raise {"transformers": peers.MissingError("not here"), "mambapy": KeyError("a bug of theirs")}[name]

    monkeypatch.setattr(peers, "load", load)
    code, lines = run(tmp_path, "operators", "--only", "selective_scan")
    assert code == 0
    found = {line["variant"]: (line["status"], line.get("reason")) for line in lines}
    assert found["transformers"] == ("missing", "not here")
    assert found["mambapy"] == ("failed", "KeyError: 'a bug of theirs'")
    assert found["mambakit chunked"][0] == "measured"


def test_no_case_is_started_after_the_budget(tmp_path):
    code, lines = run(tmp_path, "operators", "--budget", "0", "--only", "ssd")
    assert code == 0
    assert [line["status"] for line in lines] == ["no time"] * 2
    assert "budget of 0 s" in lines[0]["reason"]


def test_variants_that_need_the_memory_for_themselves_are_built_one_by_one(monkeypatch):
    alive, most = set(), []

    def build(name):
        def make():
            alive.add(name)
            most.append(len(alive))
            return runner.Ready(lambda: None, 0.0)

        return make

    monkeypatch.setattr(runner, "_release", lambda device: alive.clear())
    lines = []
    for together in (True, False):
        opened = runner.Opened({"a": build("a"), "b": build("b")})
        case = runner.Case("x", lambda opened=opened: opened, torch.float32, together=together)
        bench = runner.Bench(torch.device("cpu"), quick=True)
        runner.run_suite(bench, "test", [case], lines.append)
    assert most == [1, 2, 1, 1]
    assert ["over" in line for line in lines] == [False, True, False, False]


def test_importing_the_suites_needs_torch_numpy_and_safetensors_only():
    code = """
        import sys
        import numpy, safetensors.torch, torch, torch.utils.checkpoint, torch.utils.flop_counter

        present = set(sys.modules)

        class Hide:
            def find_spec(self, name, path=None, target=None):
                root = name.partition(".")[0]
                allowed = ("benchmarks", "mambakit", "torch", "numpy", "safetensors")
                if root not in allowed and root not in sys.stdlib_module_names and name not in present:
                    raise ModuleNotFoundError(f"hidden by the test: {name}", name=name)

        sys.meta_path.insert(0, Hide())
        import benchmarks.__main__
        from benchmarks import runner, suites

        bench = runner.Bench(torch.device("cpu"))
        for name in suites.NAMES:
            print(name, len(list(suites.cases(name, bench))) > 3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in suites.NAMES for word in (name, "True")]


@pytest.mark.parametrize("suite", suites.NAMES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_unique(suite, device, monkeypatch):
    monkeypatch.setattr(runner.summary, "hardware", lambda device: {})
    names = [case.name for case in suites.cases(suite, runner.Bench(torch.device(device)))]
    assert len(names) == len(set(names)) > 0


def test_the_work_of_a_model_counted_by_hand():
    """One block of each kind, width 16, 10 tokens in rows of 5."""
    mixers = {
        "S": Mamba1Config(d_state=4),
        "M": Mamba2Config(d_state=8, headdim=8),
        "*": AttentionConfig(n_heads=2),
    }
    config = LanguageModelConfig(vocab_size=7, d_model=16, pattern="SM*", mixers=mixers)
    model = LanguageModel(config)
    mamba1 = 2 * (16 * 64 + 32 * (1 + 2 * 4) + 1 * 32 + 32 * 16) + 7 * 32 * 4 + 2 * 4 * 32
    mamba2 = 2 * (16 * (2 * 32 + 2 * 8 + 4) + 32 * 16) + 6 * 32 * 8 + 2 * 4 * (32 + 2 * 8)
    attention = 2 * 4 * 16 * 16 + 4 * 5 * 16 // 2
    assert block_flops(model, tokens=10, length=5) == 10 * (mamba1 + mamba2 + attention)
    assert head_flops(model, tokens=3) == 2 * 3 * 7 * 16
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
