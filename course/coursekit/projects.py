"""Final projects: a folder from a template, its runs recorded, and all of it that a machine can judge.

A project is a folder with

    project.yaml            track, question, variants with their roles, seeds, claims, tolerances
    run.py                  makes all runs: `python run.py --out FILE`; shorter ones with `--small`
    report.md               what was asked, done and found
    recorded/summary.json   what `record` saw when it ran the command: never written by hand
    recorded/small.json     the same with `--small`, which `verify` runs again

`run.py` writes a list of `{"variant": ..., "seed": ..., "metrics": {name: number}}` as JSON. Nothing in it
needs this module, so a project outlives the course.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import mambakit
from coursekit.lessons import COURSE

TEMPLATES = COURSE / "projects" / "templates"
SPECIMENS = COURSE / "projects" / "specimens"
POINTS = 60
"""Of 100; the others are given by people, by `rubric.yaml`."""
SEEDS = 3
SECTIONS = ("Question", "Method", "Results", "Limits", "How to run it")
ROLES = ("subject", "trivial", "other", "control")
PLACEHOLDER = "FILL IN"

TRACKS: dict[str, dict[str, int]] = {
    "finetune": {"subject": 2, "trivial": 1, "other": 1},
    "design": {"subject": 1, "trivial": 1, "other": 1, "control": 1},
    "evaluate": {"subject": 3, "trivial": 1, "other": 1},
    "theory": {"subject": 1, "control": 1},
}
"""Track -> how many variants of each role it needs. `trivial` does not learn, `other` has no state space
model in it, a `control` is what should fail: a design without its idea, a theorem without its assumption."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was verified.

    Attributes:
        title: What it demands.
        points: What it counts.
        passed: Whether it holds.
        message: What is wrong.
    """

    title: str
    points: int
    passed: bool
    message: str = ""


class Wrong(ValueError):
    """Something about a project is not as it should be; the message says what."""


# ---------------------------------------------------------------------------------------------------------
# Making and recording


def new(track: str, folder: Path) -> None:
    """Copy a track's template.

    Args:
        track: One of `TRACKS`.
        folder: Where to; it may not exist yet.

    Raises:
        ValueError: There is no such track, or the folder exists.
    """
    if track not in TRACKS:
        raise ValueError(f"there is no track {track!r}; there are {', '.join(TRACKS)}")
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    shutil.copytree(TEMPLATES / track, folder, ignore=shutil.ignore_patterns("__pycache__"))


def record(folder: Path) -> list[Path]:
    """Run a project's command, whole and small, and keep what it wrote with where and by what it was made.

    Args:
        folder: The project.

    Returns:
        The two records.

    Raises:
        ValueError: The command fails or writes something else than runs.
    """
    plan = read(folder)
    (folder / "recorded").mkdir(exist_ok=True)
    written = []
    for name, small in (("small", True), ("summary", False)):
        runs, seconds = run(folder, small=small, limit=None)
        made = {
            "command": command(small),
            "source": source_hash(folder),
            "cpu_seconds": round(seconds, 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mambakit": mambakit.__version__,
            "device": platform.processor() or platform.machine(),
            "seeds": plan["seeds"],
            "runs": runs,
        }
        path = folder / "recorded" / f"{name}.json"
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def command(small: bool) -> str:
    """What is run in the project's folder; `{out}` is the file that it writes."""
    return "python run.py --out {out}" + (" --small" if small else "")


def run(folder: Path, *, small: bool, limit: float | None) -> tuple[list[dict[str, Any]], float]:
    """Run a project's command.

    Args:
        folder: The project.
        small: Whether with `--small`.
        limit: Seconds of wall time after which it is stopped.

    Returns:
        Its runs, and the seconds of processor time that they took.

    Raises:
        ValueError: It fails, takes too long, or writes something else than runs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "runs.json"
        words = [
            sys.executable if word == "python" else word.format(out=out)
            for word in shlex.split(command(small))
        ]
        library = str(Path(mambakit.__file__).parents[1])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH", "")])),
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            raise Wrong(f"{command(small)!r} took more than {limit:.0f} s") from None
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise Wrong(f"{command(small)!r} failed: {last}")
        runs = json.loads(out.read_text(encoding="utf-8"))
    for one in runs if isinstance(runs, list) else [None]:
        if not isinstance(one, dict) or not {"variant", "seed", "metrics"} <= set(one):
            raise Wrong("run.py should write a list of objects with variant, seed and metrics")
    return runs, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def source_hash(folder: Path) -> str:
    """Fingerprint of a project's own Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# Verifying


def read(folder: Path) -> dict[str, Any]:
    """A project's plan.

    Raises:
        ValueError: There is none, or it lacks what every plan has.
    """
    path = folder / "project.yaml"
    if not path.is_file():
        raise Wrong(f"there is no file {path}")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Wrong(f"{path} is no YAML: {error}") from error
    needed = {
        "track",
        "title",
        "question",
        "variants",
        "seeds",
        "cpu_seconds",
        "tolerances",
        "claims",
        "data",
    }
    if not isinstance(plan, dict) or not needed <= set(plan):
        missing = needed - set(plan or {}) if isinstance(plan, dict) else needed
        raise Wrong(f"project.yaml has no {', '.join(sorted(missing))}")
    if plan["track"] not in TRACKS:
        raise Wrong(f"there is no track {plan['track']!r}; there are {', '.join(TRACKS)}")
    return plan


def verify(folder: Path) -> list[Finding]:
    """Verify a project: structure, baselines, seeds, numbers, claims, and its small command run again.

    Args:
        folder: The project.
    """
    checks: list[tuple[str, int, Callable[[Path], None]]] = [
        ("its files are complete, and nothing is left of the template", 5, _structure),
        ("it compares with what its track demands", 10, _baselines),
        ("every variant has the same seeds, three at least", 5, _seeds),
        ("the records were made by this code", 5, _records),
        ("its claims follow from the recorded runs", 10, _claims),
        ("every number of the report stands in the records", 10, _numbers),
        ("its small command, run again, gives the recorded numbers", 10, _again),
        ("it keeps what its track promises", 5, _track),
    ]
    return [_finding(title, points, body, folder) for title, points, body in checks]


def _finding(title: str, points: int, body: Callable[[Path], None], folder: Path) -> Finding:
    try:
        body(folder)
    except (Wrong, AssertionError) as error:
        return Finding(title, points, False, str(error))
    except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:  # what students write
        return Finding(title, points, False, f"{type(error).__name__}: {error}")
    return Finding(title, points, True)


def _structure(folder: Path) -> None:
    plan = read(folder)
    for name in ("run.py", "report.md", "recorded/summary.json", "recorded/small.json"):
        if not (folder / name).is_file():
            raise Wrong(f"there is no file {name}")
    for name in ("project.yaml", "run.py", "report.md"):
        if PLACEHOLDER in (folder / name).read_text(encoding="utf-8"):
            raise Wrong(f"{name} still says {PLACEHOLDER}")
    if not str(plan["question"]).strip().endswith("?"):
        raise Wrong("the question of project.yaml is no question")
    headings = re.findall(r"^## (.+)$", (folder / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    if missing := [section for section in SECTIONS if section not in headings]:
        raise Wrong(f"report.md has no section {', '.join(missing)}")


def _baselines(folder: Path) -> None:
    plan = read(folder)
    roles = [variant.get("role") for variant in plan["variants"].values()]
    if unknown := sorted({str(role) for role in roles} - set(ROLES)):
        raise Wrong(f"there is no role {', '.join(unknown)}; there are {', '.join(ROLES)}")
    for role, least in TRACKS[plan["track"]].items():
        if roles.count(role) < least:
            raise Wrong(f"{roles.count(role)} variants have the role {role}, expected {least} or more")


def _seeds(folder: Path) -> None:
    plan, runs = read(folder), _recorded(folder, "summary")["runs"]
    if len(set(plan["seeds"])) < SEEDS:
        raise Wrong(f"{len(set(plan['seeds']))} seeds, expected {SEEDS} or more")
    for variant in plan["variants"]:
        found = sorted(one["seed"] for one in runs if one["variant"] == variant)
        if found != sorted(plan["seeds"]):
            raise Wrong(f"{variant} ran with the seeds {found}, expected {sorted(plan['seeds'])}")
    if extra := sorted({one["variant"] for one in runs} - set(plan["variants"])):
        raise Wrong(f"project.yaml says nothing of {', '.join(extra)}")


def _recorded(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "recorded" / f"{name}.json"
    if not path.is_file():
        raise Wrong(f"there is no file recorded/{name}.json: mambakit course project record makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def _records(folder: Path) -> None:
    now = source_hash(folder)
    for name, small in (("summary", False), ("small", True)):
        made = _recorded(folder, name)
        if made["source"] != now:
            raise Wrong(
                f"recorded/{name}.json was made by other code ({made['source']}, now {now}): record it again"
            )
        if made["command"] != command(small):
            raise Wrong(f"recorded/{name}.json was made by {made['command']!r}")


def values(runs: list[dict[str, Any]], variant: str, metric: str) -> list[float]:
    """A metric of a variant, a number per seed.

    Raises:
        ValueError: It was not measured.
    """
    found = [
        float(one["metrics"][metric])
        for one in runs
        if one["variant"] == variant and metric in one["metrics"]
    ]
    if not found or not all(map(math.isfinite, found)):
        raise Wrong(f"{variant} has no finite {metric}")
    return found


def _claims(folder: Path) -> None:
    """`{variant, metric, mean, within}` or `{metric, better, than, by, higher}`: each holds there."""
    plan, runs = read(folder), _recorded(folder, "summary")["runs"]
    if not plan["claims"]:
        raise Wrong("a project claims something")
    for claim in plan["claims"]:
        if "than" in claim:
            better, worse = (values(runs, claim[side], claim["metric"]) for side in ("better", "than"))
            sign = 1 if claim.get("higher", True) else -1
            margins = [sign * (one - other) for one, other in zip(better, worse, strict=True)]
            if min(margins) < claim["by"]:
                raise Wrong(
                    f"{claim['better']} beats {claim['than']} by {min(margins):.4g} with one seed, "
                    f"not {claim['by']}"
                )
        else:
            mean = statistics.fmean(values(runs, claim["variant"], claim["metric"]))
            if not abs(mean - claim["mean"]) <= claim["within"]:
                raise Wrong(
                    f"{claim['variant']}: {claim['metric']} is {mean:.4g}, "
                    f"not {claim['mean']} +- {claim['within']}"
                )


_NUMBER = re.compile(r"(?<![\w.^])[-\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?:\s?%)?(?![\w])")


def measured(folder: Path) -> list[float]:
    """Every number that a report may state of its runs: values, means, deviations, differences of means."""
    found: list[float] = []
    for name in ("summary", "small"):
        made = _recorded(folder, name)
        found.append(float(made["cpu_seconds"]))
        metrics = sorted({metric for one in made["runs"] for metric in one["metrics"]})
        for metric in metrics:
            means = []
            for variant in dict.fromkeys(one["variant"] for one in made["runs"]):
                own = [
                    float(one["metrics"][metric])
                    for one in made["runs"]
                    if one["variant"] == variant and metric in one["metrics"]
                ]
                if own:
                    means.append(statistics.fmean(own))
                    found += [*own, means[-1], statistics.stdev(own) if len(own) > 1 else 0.0]
            found += [abs(one - other) for one in means for other in means]
    return found


def numbers(report: str) -> Iterator[str]:
    """Numbers with a decimal point, an exponent or a percent sign in a report, without code and links."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|\$[^$]*\$", " ", report, flags=re.DOTALL)
    for found in _NUMBER.finditer(text):
        if re.search(r"[.e%]", found[0]):
            yield found[0]


def _numbers(folder: Path) -> None:
    plan, known = read(folder), measured(folder)
    report = (folder / "report.md").read_text(encoding="utf-8")
    elsewhere = {str(number) for number in plan.get("elsewhere", {})}
    for written in numbers(report):
        plain = written.replace("\u2212", "-").replace(",", "").replace(" ", "")
        if plain in elsewhere:
            continue
        if not any(
            _rounds_to(value * (100 if plain.endswith("%") else 1), plain.rstrip("%")) for value in known
        ):
            raise Wrong(
                f"the report says {written}, which is in no record (or name its source under `elsewhere`)"
            )


def _rounds_to(value: float, written: str) -> bool:
    """Whether a value, rounded as a number is written, is that number (half a unit of its last digit)."""
    mantissa, _, exponent = written.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(written)) <= 0.5 * unit * (1 + 1e-6)


def _again(folder: Path) -> None:
    plan, recorded = read(folder), _recorded(folder, "small")["runs"]
    runs, seconds = run(folder, small=True, limit=20 * float(plan["cpu_seconds"]) + 60)
    if seconds > 2 * plan["cpu_seconds"]:
        raise Wrong(
            f"the small command took {seconds:.0f} s of processor time, "
            f"twice the {plan['cpu_seconds']} allowed"
        )
    old, new = ({(one["variant"], one["seed"]): one["metrics"] for one in each} for each in (recorded, runs))
    if set(old) != set(new):
        raise Wrong("the small command makes other runs than it did")
    if missing := sorted(set(plan["variants"]) - {variant for variant, _ in old}):
        raise Wrong(f"the small command leaves {', '.join(missing)} out")
    for key, metrics in old.items():
        for name, value in metrics.items():
            bound = plan["tolerances"].get(name, 0)
            if name not in new[key] or not abs(new[key][name] - value) <= bound:
                raise Wrong(
                    f"{key[0]}, seed {key[1]}: {name} is {new[key].get(name)}, recorded {value} (+- {bound})"
                )


# ---------------------------------------------------------------------------------------------------------
# What a track promises


def _track(folder: Path) -> None:
    plan = read(folder)
    {"finetune": _finetune, "design": _design, "evaluate": _evaluate, "theory": _theory}[plan["track"]](
        folder, plan
    )


def _finetune(folder: Path, plan: dict[str, Any]) -> None:
    """The old domain is measured, too: what was forgotten is part of the result."""
    runs = _recorded(folder, "summary")["runs"]
    old, new = plan["domains"]["old"], plan["domains"]["new"]
    for variant, facts in plan["variants"].items():
        if facts["role"] == "subject":
            values(runs, variant, old)
            values(runs, variant, new)


def _evaluate(folder: Path, plan: dict[str, Any]) -> None:
    """Variants are compared at equal cost, within ten per cent, in one measure at least."""
    runs, measure = _recorded(folder, "summary")["runs"], plan["equal"]
    costs = {
        variant: statistics.fmean(values(runs, variant, measure))
        for variant, facts in plan["variants"].items()
        if facts["role"] in ("subject", "other")
    }
    if max(costs.values()) > 1.1 * min(costs.values()):
        raise Wrong(f"the {measure} differ by more than a tenth: {costs}")


def _theory(folder: Path, plan: dict[str, Any]) -> None:
    """A statement and its proof; the control breaks the statement, and the subject does not."""
    report = (folder / "report.md").read_text(encoding="utf-8")
    for word in ("**Statement.**", "**Proof.**"):
        if word not in report:
            raise Wrong(f"report.md has no {word}")
    runs, metric = _recorded(folder, "summary")["runs"], plan["violations"]
    for variant, facts in plan["variants"].items():
        found = values(runs, variant, metric)
        if facts["role"] == "subject" and max(found) > 0:
            raise Wrong(f"{variant} violates the statement: {metric} is {max(found)}")
        if facts["role"] == "control" and min(found) == 0:
            raise Wrong(
                f"{variant} should violate the statement and does not: the experiment could not have failed"
            )


def _design(folder: Path, plan: dict[str, Any]) -> None:
    """The mixer agrees with itself: in pieces, token by token, in packed rows; no future; gradients."""
    spec = importlib.util.spec_from_file_location(f"project_{source_hash(folder)}", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    conformance(getattr(module, plan["mixer"])())


def conformance(config: mambakit.MixerConfig) -> None:
    """Hold a mixer to what every mixer of the library promises.

    Args:
        config: Of the mixer.

    Raises:
        ValueError: It does not agree with itself, sees the future, mixes documents, or has wrong gradients.
    """
    torch.manual_seed(0)
    mixer = config.build(16, dtype=torch.float64).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    whole = mixer(x)
    if whole.shape != x.shape:
        raise Wrong(f"the mixer maps {tuple(x.shape)} to {tuple(whole.shape)}")
    if mixer.last_weights is mambakit.Mixer.last_weights and not hasattr(mixer, "out_proj"):
        raise Wrong("the mixer does not end in out_proj, and has no last_weights")

    def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        off = (found - expected).abs().max().item()
        if not off < 1e-9:
            raise Wrong(f"{what}: off by {off:.1e}")

    with torch.no_grad():
        for sizes in ([5, 7], [1] * 12, [11, 1]):
            state = mixer.init_state(2)
            pieces = torch.cat([mixer(piece, state) for piece in x.split(sizes, dim=1)], dim=1)
            same(pieces, whole, f"the whole and pieces of {sizes}")
        changed = x.clone()
        changed[:, 8:] += 1
        same(mixer(changed)[:, :8], whole[:, :8], "outputs before a change of the input")
        packed = mixer(x, context=mambakit.Context(seq_idx=torch.tensor([[0] * 5 + [1] * 7] * 2)))
        same(packed[:, :5], mixer(x[:, :5]), "the first of two packed documents and the same alone")
        same(packed[:, 5:], mixer(x[:, 5:]), "the second of two packed documents and the same alone")
    small = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    if not torch.autograd.gradcheck(lambda x: mixer(x).sum(-1), (small,), raise_exception=False):
        raise Wrong("its gradients are not those of finite differences")
