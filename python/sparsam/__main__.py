"""`python -m sparsam` is the command line `sparsam`."""

from __future__ import annotations

import sys

from sparsam.cli import main

if __name__ == "__main__":
    sys.exit(main())
