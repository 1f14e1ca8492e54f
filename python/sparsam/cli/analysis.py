"""The commands that evaluate: they call a function of the user's, and print what came of it."""

from __future__ import annotations

import glob
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from sparsam import checkpoint, plot
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import SPARSITIES, SensitivityPoint, SensitivityReport
from sparsam.analysis.sweep import sensitivity as sweep
from sparsam.checkpoint.atomic import check_target
from sparsam.cli.arguments import (
    PATTERNS,
    parse_eval,
    parse_groups,
    parse_method,
    parse_override,
    parse_pattern,
    parse_sparsities,
)
from sparsam.cli.console import print_json, print_text, progress
from sparsam.config import PruningConfig

__all__ = ["register"]

Source: TypeAlias = Annotated[Path, typer.Argument(metavar="IN", help="What `inspect` takes.")]
Eval: TypeAlias = Annotated[
    str,
    typer.Option(
        "--eval",
        metavar="MODULE:FUNCTION",
        help="Called with {name: array}, returns the score; the larger, the better.",
    ),
]
Scope: TypeAlias = Annotated[str, typer.Option(help="layer (each tensor by itself), row or global.")]
PatternText: TypeAlias = Annotated[str, typer.Option("--pattern", help=f"One of {PATTERNS}.")]
Method: TypeAlias = Annotated[str, typer.Option(help="magnitude, random or lamp.")]
Exclude: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="PAT", help="Leave tensors with such names dense; repeatable.")
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="PAT=VALUE", help="As of `prune`; repeatable."),
]
Picture: TypeAlias = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg, .pdf.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(sensitivity)
    app.command()(search)


def sensitivity(
    source: Source,
    evaluate: Eval,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where the report goes, as JSON.")
    ] = None,
    sparsity: Annotated[list[str] | None, typer.Option(metavar="S,...", help="What to measure.")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PAT,...", help="Prune these tensors together, and no others; repeatable."),
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(metavar="N", help="Spend no more, and those where curves bend.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what is measured here, and go on from there.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Evaluate so many at once, each in a process.")] = 1,
    picture: Picture = None,
    scope: Scope = "layer",
    pattern: PatternText = "unstructured",
    method: Method = "magnitude",
    exclude: Exclude = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Prune each tensor alone, call a function with the weights each time, and show which tensors mind."""
    if picture:
        plot.check(picture)
    if output:
        check_target(output)
    function = parse_eval(evaluate)
    weights = checkpoint.load(source).weights
    config = _config(weights, scope, pattern, method, exclude, override)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn) if jobs > 1 else nullcontext()
    with pool as executor, progress() as bar:
        task = bar.add_task("evaluating")

        def show(done: int, total: int, point: SensitivityPoint) -> None:
            bar.update(task, description=point.name or "dense", completed=done, total=total)

        report = sweep(
            weights,
            function,
            parse_sparsities(sparsity) if sparsity else SPARSITIES,
            config=config,
            groups=parse_groups(group) if group else None,
            max_evaluations=max_evaluations,
            callback=show,
            state=state,
            executor=executor,
        )
    if output:
        report.save(output)
    if picture:
        report.plot(picture)
    print_text(report.to_json() if as_json else str(report))


def search(
    source: Source,
    evaluate: Eval,
    min_score: Annotated[float, typer.Option(help="The lowest score that is good enough.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where the pruned weights go; as of `prune`."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Share each total out by this report of `sensitivity`."),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="What each tensor gets of a total: uniform, erk, lamp or global.")
    ] = None,
    max_evaluations: Annotated[int, typer.Option(metavar="N", help="Spend no more.")] = 20,
    tolerance: Annotated[float, typer.Option(help="How exactly the sparsity is found.")] = 0.01,
    picture: Picture = None,
    scope: Scope = "layer",
    pattern: PatternText = "unstructured",
    method: Method = "magnitude",
    exclude: Exclude = None,
    override: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the input.")] = False,
    as_json: Json = False,
) -> None:
    """Find the highest sparsity at which a function of the weights still scores enough."""
    if picture:
        plot.check(picture)
    if report and allocation:
        msg = "--report and --allocation both share out the total; leave one of them out"
        raise ValueError(msg)
    if output and not force and checkpoint.overwrites(output, source):
        msg = f"{output}: expected an output other than the input; name another, or pass --force"
        raise ValueError(msg)
    function = parse_eval(evaluate)
    read = checkpoint.load(source)
    if output and read.shards is None:
        check_target(output / checkpoint.FILE_NAME if output.is_dir() else output)
    with progress() as bar:
        task = bar.add_task("evaluating", total=max_evaluations)
        result = find_smallest(
            read.weights,
            function,
            min_score,
            config=_config(read.weights, scope, pattern, method, exclude, override),
            allocation=SensitivityReport.from_json(report.read_bytes()) if report else allocation,
            max_evaluations=max_evaluations,
            tolerance=tolerance,
            callback=lambda _: bar.advance(task),
        )
    if output:
        checkpoint.save(output, result.weights, like=read)
    if picture:
        curve = [(probe.sparsity, probe.score) for probe in result.curve]
        plot.degradation({"pruned": curve}, picture, min_score=min_score)
    if as_json:
        print_json(result.to_dict())
    else:
        print_text(f"{result}\n\n{result.report}")


def _config(
    weights: Mapping[str, Any],
    scope: str,
    pattern: str,
    method: str,
    exclude: Sequence[str] | None,
    override: Sequence[str] | None,
) -> PruningConfig:
    """The configuration that the options describe; integers stay as they are."""
    numberless = [glob.escape(name) for name, array in weights.items() if array.dtype.kind in "biu"]
    return PruningConfig(
        method=parse_method(method, None, None),
        pattern=parse_pattern(pattern),
        scope=scope,
        exclude=(*(exclude or ()), *numberless),
        overrides=dict(map(parse_override, override or ())),
    )
