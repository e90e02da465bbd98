"""`python -m mambakit` is the command `mambakit`."""

import sys

from mambakit.cli import main

sys.exit(main())
