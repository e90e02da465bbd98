"""`mambakit bench`, on work that takes milliseconds."""

from __future__ import annotations

import json
import re

import pytest

from mambakit.cli import bench
from mambakit.ops.dispatch import registry


@pytest.fixture(autouse=True)
def small(monkeypatch):
    plan = bench.Plan(width=64, lengths=(32, 64), d_model=64, layers=2, prompt=24, batch=1, length=16)
    monkeypatch.setattr(bench, "PLAN", plan)
    ceilings = bench.timing.Ceilings.measure
    monkeypatch.setattr(
        bench.timing.Ceilings, "measure", lambda device, dtype, seconds: ceilings(device, dtype, scale=0.01)
    )


def test_it_shows_what_it_measured_and_where_attention_is_faster(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LATE", float("inf"))
    code, shown, said = cli("bench", "--seconds", 3, "--json", tmp_path / "found.json")
    assert code == 0, said
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("written to "))
    found = json.loads((tmp_path / "found.json").read_text())
    assert {line["length"] for line in found["operators"]} == {32, 64}
    names = {line["operator"] for line in found["operators"]}
    assert {name.split()[0] for name in names} == {"selective_scan", "ssd", "attention"}
    for length in (32, 64):
        row = re.search(rf"^{length} .*", shown, re.MULTILINE)[0]
        for line in found["operators"]:
            if line["length"] == length:
                assert f"{1e3 * line['median']:.3g} ms" in row
    flat = " ".join(shown.split())
    for name in names - {"attention"}:
        assert re.search(rf"{name}: (faster|slower) than attention", flat)
    for row in found["models"]:
        assert re.search(rf"^{re.escape(row['model'])} ", shown, re.MULTILINE)
        assert row["read"]["tokens_per_second"] == pytest.approx(24 / row["read"]["median"])
    attention, mamba2, _ = (row["write"]["tokens_per_second"] for row in found["models"])
    ratio = mamba2 / attention
    assert re.search(rf"Mamba-2 reads \S+ times as fast, writes {ratio:.2g} times as fast", flat)


def test_what_takes_too_long_is_left_out_and_said(cli, monkeypatch):
    monkeypatch.setattr(bench, "CALLS", 10**9)
    monkeypatch.setattr(bench, "LATE", 0.0)
    code, shown, _ = cli("bench", "--seconds", 0.001)
    assert code == 0
    assert re.search(r"^64 .*too long", shown, re.MULTILINE)
    assert "--seconds gives more" in shown


def test_a_wrong_operator_is_not_timed(cli, monkeypatch):
    module = registry["ssd"].backends["chunked"]
    right = module.ssd

    def wrong(*inputs):
        y, state = right(*inputs)
        return 1.01 * y, state

    monkeypatch.setattr(module, "ssd", wrong)
    code, _, said = cli("bench", "--seconds", 1)
    assert code == 1
    assert re.fullmatch(r"error: ssd, backend chunked: output0 has a relative error of 0\.01, .*\n", said)
