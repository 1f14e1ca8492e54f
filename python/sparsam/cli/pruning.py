"""The commands that read and write checkpoints: `inspect` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparsam import checkpoint
from sparsam.checkpoint import companions, file_defaults, foreign
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
    if foreign.kind_of(file) == "safetensors":
        tensors = [measure(*item) for item in checkpoint.stream(file)]
    else:
        tensors = [measure(*item) for item in foreign.read(file).weights.items()]
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
            help="A directory, new or not; or a file in .safetensors, .pt, .bin or .npz, which is its kind.",
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
        str, typer.Option(metavar="SIZE", help="How much to take of it; of safetensors only.")
    ] = "2GiB",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and print the report. Names match shell-style patterns.

    Vectors, embeddings and tied heads stay dense unless asked for or named exactly in --override. What else a
    Hugging Face directory holds is copied along. A run that was stopped goes on when it is called again.
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
    streamed = foreign.kind_of(file) == "safetensors"
    read = None if streamed else foreign.read(file)
    arrays = file_defaults.shapes(file) if read is None else read.weights
    config, left = file_defaults.settle(
        config,
        arrays,
        tied=file_defaults.heads_tied(file) if streamed else (),
        vectors=vectors,
        embeddings=embeddings,
        indivisible=cast(Any, indivisible),
    )
    if left:
        note(f"dense stay the embeddings {', '.join(left)}; prune them with --embeddings")
    if read is None and foreign.kind_of(output) == "safetensors":
        report = _stream(file, output, config, memory)
    else:
        report = _prune_whole(source, file, output, config, read)
    print_text(report.to_json() if as_json else str(report))


def _stream(file: Path, output: Path, config: PruningConfig, memory: str) -> Report:
    with kept("what is done so far; the same command goes on from there"), progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what}, MB", completed=done // 10**6, total=total // 10**6)

        return checkpoint.prune_files(file, output, config, memory=memory, progress=show)


def _prune_whole(
    source: Path, file: Path, output: Path, config: PruningConfig, read: foreign.Foreign | None
) -> Report:
    """Prunes a checkpoint that is read or written as another kind, in memory."""
    weights = checkpoint.load(file).weights if read is None else read.weights
    result = prune_weights(weights, config)
    if foreign.kind_of(output) != "safetensors":
        foreign.write(output, result.weights, read)
        return result.report
    folder = output.suffix != ".safetensors" and not output.is_file()
    if folder:
        output.mkdir(exist_ok=True)
        if source.is_dir():
            companions.copy(source, output, leave=output)
    target = output / checkpoint.FILE_NAME if folder else output
    checkpoint.save(target, result.weights, {"format": "pt"})
    return result.report
