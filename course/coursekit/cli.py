"""The verbs of `mambakit course`."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path

from coursekit import exercises, grading, quizzes


def main(words: Sequence[str]) -> int:
    """Run a verb.

    Args:
        words: What stands after `mambakit course`.

    Returns:
        The exit code: 0, or 1 where something that was checked is wrong.

    Raises:
        ValueError: What the user asked for does not exist or cannot be.
        ModuleNotFoundError: A package of the extra `course` is missing.
    """
    options = _parser().parse_args(list(words))
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mambakit course", description="The course: eight executable weeks."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    one = verbs.add_parser("build", help="make the site, executing every lesson that changed")
    one.add_argument("lessons", nargs="*", help="only these, as m1/discretisation, into build/course/preview")
    one.add_argument("--jobs", type=int, default=1, help="processes (1)")
    one.add_argument("--lenient", action="store_true", help="do not fail on warnings")
    one.set_defaults(run=_build)

    one = verbs.add_parser("serve", help="show the site in a browser")
    one.add_argument("--port", type=int, default=8000)
    one.set_defaults(run=_serve)

    one = verbs.add_parser("notebooks", help="write the student's notebooks")
    one.add_argument("folder", nargs="?", type=Path, default=Path("notebooks"))
    one.set_defaults(run=_notebooks)

    one = verbs.add_parser("check", help="check the exercises of a notebook, or a project")
    one.add_argument("notebook", nargs="+", type=Path)
    one.set_defaults(run=_check)

    one = verbs.add_parser("quiz", help="write a student's quiz, to be filled in")
    one.add_argument("module", help="as m1")
    one.add_argument("--student", required=True)
    one.add_argument("--secret-file", type=Path, required=True, help="made if it does not exist; keep it")
    one.set_defaults(run=_quiz)

    one = verbs.add_parser("midterm", help="write the midterm of every student, into a folder each")
    one.add_argument("folder", type=Path)
    one.add_argument("--student", action="append", required=True, help="once for each")
    one.add_argument("--secret-file", type=Path, required=True, help="made if it does not exist; keep it")
    one.set_defaults(run=_midterm)

    one = verbs.add_parser("project", help="begin, record or verify a final project")
    one.add_argument("action", choices=("new", "record", "check"))
    one.add_argument("folder", type=Path)
    one.add_argument("--track", default="", help="for new: finetune, design, evaluate or theory")
    one.set_defaults(run=_project)

    one = verbs.add_parser("grade", help="grade a folder of students' folders")
    one.add_argument("folder", type=Path)
    one.add_argument("--seed", type=int, help="of the inputs (drawn and shown if left out)")
    one.add_argument("--secret-file", type=Path, help="what the quizzes were made with")
    one.add_argument("--out", type=Path, help="for marks.json, marks.csv, marks.html (the folder itself)")
    one.set_defaults(run=_grade)
    return parser


def _build(options: argparse.Namespace) -> int:
    from coursekit import site

    page = site.build(options.lessons, jobs=options.jobs, strict=not options.lenient)
    print(page)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from coursekit import site

    site.serve(port=options.port)
    return 0


def _notebooks(options: argparse.Namespace) -> int:
    from coursekit import notebooks

    for path in notebooks.write(options.folder):
        print(path)
    return 0


def _check(options: argparse.Namespace) -> int:
    missed = 0
    for path in options.notebook:
        if (path / "project.yaml").is_file():
            missed += _verified(path)
            continue
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        for name, outcomes in grading.check_notebook(path, seed=0):
            report = exercises.Report(exercises.find(name), outcomes)
            print(report)
            missed += any(not outcome.passed for outcome in outcomes)
    return 1 if missed else 0


def _quiz(options: argparse.Namespace) -> int:
    if options.module not in quizzes.modules():
        raise ValueError(f"there is no quiz {options.module!r}; there are {', '.join(quizzes.modules())}")
    print(quizzes.form(options.module, options.student, _made_secret(options.secret_file)), end="")
    return 0


def _midterm(options: argparse.Namespace) -> int:
    from coursekit import midterm

    secret = _made_secret(options.secret_file)
    for student in options.student:
        for path in midterm.write(options.folder, student, secret):
            print(path)
    return 0


def _project(options: argparse.Namespace) -> int:
    from coursekit import projects

    if options.action == "check":
        return _verified(options.folder)
    if options.action == "record":
        for path in projects.record(options.folder):
            print(path)
        return 0
    projects.new(options.track, options.folder)
    print(f"{options.folder}: fill project.yaml, run.py and report.md in, then record it, then check it")
    return 0


def _verified(folder: Path) -> int:
    from coursekit import projects

    findings = projects.verify(folder)
    for finding in findings:
        mark = "passed" if finding.passed else "FAILED"
        print(f"  {mark}  {finding.title}" + (f": {finding.message}" if finding.message else ""))
    reached = sum(finding.points for finding in findings if finding.passed)
    print(f"{folder}: {reached} of {projects.POINTS} points by machine")
    return 0 if reached == projects.POINTS else 1


def _made_secret(path: Path) -> bytes:
    if not path.exists():
        path.write_text(secrets.token_hex(32), encoding="utf-8")
        path.chmod(0o600)
    return _secret(path)


def _secret(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path.read_bytes().strip()


def _grade(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise ValueError(f"there is no folder {options.folder}")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    secret = _secret(options.secret_file) if options.secret_file else None
    marks = grading.grade(options.folder, seed, secret)
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("marks.json", grading.as_json(marks)),
        ("marks.csv", grading.as_csv(marks)),
        ("marks.html", grading.as_html(marks)),
    ):
        (out / name).write_text(text, encoding="utf-8")
    print(grading.as_csv(marks), end="")
    print(f"seed {seed}; marks.json, marks.csv and marks.html are in {out}")
    return 0
