"""The commands about this machine: `calibrate` and `info`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsam.cli.console import print_text
from sparsam.runtime import build_info
from sparsam.sparse import cost_model

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(calibrate)
    app.command()(info)


def calibrate(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Measure how long matrix products take on this machine; SparseMatrix chooses its kernels by that."""
    machine = cost_model.calibrate(dtype, force=True).machine
    file = cost_model.cache_file(machine)
    kept = f"kept in {file}" if file.exists() else "not kept: it was disturbed, or there is no cache"
    print_text(f"{machine}: {kept}")


def info() -> None:
    """Show the version, the compiler, the instruction sets and the threads."""
    print_text(str(build_info()))
