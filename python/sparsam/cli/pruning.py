"""The commands that read and write checkpoints: `inspect` and `prune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparsam import checkpoint
from sparsam.checkpoint import file_defaults, foreign, whole_files
from sparsam.checkpoint.foreign_content import Foreign
from sparsam.cli.arguments import (
    check_output,
    check_sparsity_option,
    parse_method,
    parse_override,
    parse_pattern,
)
from sparsam.cli.console import kept, note, print_text, progress
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
    file = foreign.source_of(source)
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        tensors = []
        for item in whole_files.tensors(file):
            tensors.append(measure(*item))
            bar.advance(task)
    report = Report(sorted(tensors, key=lambda row: row.name))
    print_text(report.to_json() if as_json else str(report))


def prune(
    source: Source,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="A directory, new or not; or a file in .safetensors, .pt, .bin, .npz or .onnx.",
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
        typer.Option(metavar="PAT", help="Names of tensors stored as (in, out); repeatable."),
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Let patterns of --override prune biases and norms too.")
    ] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Prune embeddings and tied heads too.")
    ] = False,
    indivisible: Annotated[
        str,
        typer.Option(help="Tensors that N:M does not divide: error, skip (dense) or unstructured."),
    ] = "error",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory to use; for safetensors only.")
    ] = "2GiB",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and print the report. Names match shell-style patterns.

    Vectors, embeddings and tied heads stay dense unless requested or named exactly in --override. Other files
    of a Hugging Face directory are copied. An interrupted run continues when the command is called again.
    """
    check_sparsity_option(sparsity)
    if indivisible not in ("error", "skip", "unstructured"):
        msg = f"--indivisible: expected error, skip or unstructured; got {indivisible!r}; choose one of them"
        raise ValueError(msg)
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
    file = foreign.source_of(source)
    check_output(output, file, force=force)
    whole = None if foreign.kind_of(file) == "safetensors" else _read(file)
    content = whole.foreign if whole else None
    if content is not None:
        config = replace(config, transposed=(*config.transposed, *content.transposed))
    config, left = file_defaults.adapt(
        config,
        file_defaults.shapes(file) if content is None else content.weights,
        tied=file_defaults.heads_tied(file) if content is None else _tied(content),
        constants=() if content is None else content.constants,
        vectors=vectors,
        embeddings=embeddings,
        indivisible=cast(Any, indivisible),
    )
    if left:
        note(f"embeddings left dense: {', '.join(sorted(left))}; prune them with --embeddings")
    if whole is None and foreign.kind_of(output) == "safetensors":
        report = _stream(file, output, config, memory)
    else:
        report = _prune_whole(source, output, config, whole or _read(file))
    print_text(report.to_json() if as_json else str(report))


def _stream(file: Path, output: Path, config: PruningConfig, memory: str) -> Report:
    with kept("what is done so far; the same command continues from there"), progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what}, MB", completed=done // 10**6, total=total // 10**6)

        return checkpoint.prune_files(file, output, config, memory=memory, progress=show)


def _prune_whole(source: Path, output: Path, config: PruningConfig, whole: whole_files.Whole) -> Report:
    """Prunes a checkpoint in memory, if its input or output is not safetensors."""
    with progress() as bar:
        bar.add_task("pruning", total=None)
        result = prune_weights(whole.weights, config)
        whole_files.write(source, output, result.weights, whole)
    return result.report


def _tied(content: Foreign) -> list[str]:
    return [*file_defaults.heads_among(content.weights), *content.tables]


def _read(file: Path) -> whole_files.Whole:
    with progress() as bar:
        bar.add_task("reading", total=None)
        return whole_files.read(file)
