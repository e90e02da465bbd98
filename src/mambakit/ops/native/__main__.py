"""`python -m mambakit.ops.native`: compile the kernels in place, after a compiler or a kernel changed."""

import sys

from mambakit.ops.native import build


def main() -> int:
    """Build, and say what was built."""
    try:
        built = build.build()
    except (build.BuildError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for level, path in built.libraries.items():
        sys.stdout.write(f"{level}: {path}\n")
    for level, message in built.failed.items():
        sys.stderr.write(f"{level} failed: {message}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
