"""`python -m benchmarks run SUITE` and `python -m benchmarks report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import lines, report, runner, suites
from mambakit.training import device as devices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `python -m benchmarks`.

    Returns:
        The exit code: 0, or 1 if one of our own variants was wrong or failed.
    """
    options = _parser().parse_args(arguments)
    if options.verb == "report":
        place = options.folder or lines.newest(runner.RESULTS)
        print(report.render(place))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = runner.Bench(
        devices.choose(options.device),
        quick=options.quick,
        seconds=options.seconds,
        budget=options.budget,
        only=tuple(options.only or ()),
        profile=options.profile,
        commit=options.commit,
    )
    place = options.out or runner.folder(bench)
    for name in suites.NAMES if options.suite == "all" else [options.suite]:
        write = runner.writer(place / f"{name}.jsonl")

        def tell(line: dict[str, Any], write: Any = write) -> None:
            write(line)
            print(_told(line), flush=True)

        print(f"{name}, on {bench.device}", flush=True)
        runner.run_suite(bench, name, suites.cases(name, bench), tell)
    print(f"lines in {place}; python -m benchmarks report {place}")
    ours = [line for line in bench.lines if line["variant"].startswith(suites.OURS)]
    return int(any(line["status"] in ("wrong", "failed") for line in ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure mambakit and its peers."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure a suite and write JSON lines")
    run.add_argument("suite", choices=[*suites.NAMES, "all"])
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    run.add_argument("--quick", action="store_true", help="toy sizes: does everything run?")
    run.add_argument("--only", action="append", metavar="NAME", help="cases whose name contains this")
    run.add_argument("--seconds", type=float, default=2.0, help="for the turns of one variant")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this long")
    run.add_argument("--threads", type=int, help="threads of PyTorch")
    run.add_argument("--profile", action="store_true", help="add device times by kernel")
    run.add_argument("--commit", help="of the code, where git cannot say")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="by default benchmarks/results/DATE-DEVICE")
    rendered = verbs.add_parser("report", help="render report.md and its plots")
    rendered.add_argument("folder", type=Path, nargs="?", help="by default the newest with results")
    return parser


def _told(line: dict[str, Any]) -> str:
    """A line for those who wait."""
    head = f"  {line['name']:<44} {line['variant']:<22}"
    if line["status"] != "measured":
        return f"{head} {line['status']}: {line.get('reason', '')[:100]}"
    over = f" {line['over']['median']:8.2f}x" if "over" in line else 10 * " "
    share = f"{100 * line['share']:6.1f}% of the roofline"
    return f"{head} {1e3 * line['median']:11.4g} ms {line['clock']:<6}{over} {share}"


if __name__ == "__main__":
    sys.exit(main())
