"""The entry point of `sparsam` and `python -m sparsam`: the application, or one line on what is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EXTRA = {"typer", "rich"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; 2 if the extra `cli` is not installed."""
    try:
        from sparsam.cli.app import run  # noqa: PLC0415 - typer and rich are an extra
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.stderr.write(
            f"sparsam: command line: expected typer and rich; got no module {missing}; "
            "install them with: pip install 'sparsam[cli]'\n"
        )
        return 2
    return run(arguments)
