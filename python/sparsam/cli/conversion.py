"""The command `convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparsam.checkpoint.conversion import convert as convert_files
from sparsam.cli.arguments import check_output
from sparsam.cli.console import print_json, print_text, progress
from sparsam.cli.options import Force, Json
from sparsam.report import readable_size

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(convert)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A checkpoint of any kind, compressed or not; .smtx; .npz of scipy.sparse."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A directory or a file.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="dense, sparse-bitmask, sparse-24-bitmask, semi-structured, scipy or smtx; "
            "by the name of OUT if left out.",
        ),
    ] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="This matrix alone.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write pruned weights in a format of compressed-tensors, PyTorch, scipy or DLMC, or dense again."""
    check_output(output, source, force=force)
    with progress() as bar:
        bar.add_task("converting", total=None)
        done = convert_files(source, output, cast(Any, to), tensor=tensor)
    if as_json:
        print_json(asdict(done))
        return
    sizes = f"{readable_size(done.bytes_before)} before, {readable_size(done.bytes_after)} after"
    print_text(f"{len(done.converted)} tensors {done.format}, {len(done.others)} left dense; {sizes}")
