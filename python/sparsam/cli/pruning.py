"""The commands that read and write checkpoints: `inspect` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparsam import checkpoint
from sparsam.cli.arguments import (
    check_output,
    parse_method,
    parse_override,
    parse_pattern,
)
from sparsam.cli.console import print_text
from sparsam.cli.options import (
    Allocation,
    Exclude,
    Force,
    Json,
    Method,
    Overrides,
    PatternText,
    Scope,
    Source,
)
from sparsam.config import PruningConfig
from sparsam.pruner import prune as prune_weights
from sparsam.report import Report, measure

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(inspect)
    app.command()(prune)


def inspect(source: Source, as_json: Json = False) -> None:
    """Show every tensor of a checkpoint: its shape, its zeros, its size dense and packed."""
    tensors = (measure(*item) for item in checkpoint.stream(source))
    report = Report(sorted(tensors, key=lambda row: row.name))
    print_text(report.to_json() if as_json else str(report))


def prune(
    source: Source,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The file to write; for a sharded checkpoint, a directory."
        ),
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction to prune; 0.5 by default, or what N:M implies.")
    ] = None,
    scope: Scope = "layer",
    allocation: Allocation = "uniform",
    pattern: PatternText = "unstructured",
    method: Method = "magnitude",
    norm: Annotated[
        int | None,
        typer.Option(help="The norm of a group with --method magnitude: 1 (the default) or 2."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of --method random; 0 by default.")] = None,
    exclude: Exclude = None,
    override: Overrides = None,
    transposed: Annotated[
        list[str] | None,
        typer.Option(metavar="PAT", help="PAT matches tensors stored as (in, out); repeatable."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and print the report. Names match shell-style patterns; vectors stay dense."""
    config = PruningConfig(
        target_sparsity=sparsity,
        method=parse_method(method, norm, seed),
        pattern=parse_pattern(pattern),
        scope=cast(Any, scope),
        allocation=cast(Any, allocation),
        exclude=exclude or (),
        overrides=dict(map(parse_override, override or ())),
        transposed=transposed or (),
    )
    check_output(output, source, force=force)
    read = checkpoint.load(source)
    result = prune_weights(read.weights, config, inplace=True)
    checkpoint.save(output, result.weights, like=read)
    print_text(result.report.to_json() if as_json else str(result.report))
