"""The course's own modules, importable; a source distribution has no course, and then nothing is tested."""

from __future__ import annotations

import sys
from pathlib import Path

COURSE = Path(__file__).parents[2] / "course"

if COURSE.is_dir():
    sys.path.insert(0, str(COURSE))
else:
    collect_ignore_glob = ["test_*.py"]
