"""The commands that evaluate pruned weights with a function of the user's: `sensitivity` and `search`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

import typer

from sparsam import checkpoint, plot
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import SPARSITIES, SensitivityPoint, SensitivityReport
from sparsam.analysis.sweep import sensitivity as sweep
from sparsam.checkpoint import foreign, whole_files
from sparsam.checkpoint.atomic import check_target
from sparsam.cli.arguments import (
    check_output,
    parse_eval,
    parse_groups,
    parse_method,
    parse_override,
    parse_pattern,
    parse_sparsities,
)
from sparsam.cli.console import kept, print_json, print_text, progress
from sparsam.cli.options import (
    AllocationOrNone,
    Exclude,
    Force,
    Json,
    Method,
    Overrides,
    PatternText,
    Picture,
    Scope,
    Source,
)
from sparsam.config import PruningConfig

__all__ = ["register"]

Eval: TypeAlias = Annotated[
    str,
    typer.Option(
        "--eval",
        metavar="MODULE:FUNCTION",
        help="A function that takes {name: array} and returns a score; larger is better.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(sensitivity)
    app.command()(search)


def sensitivity(
    source: Source,
    evaluate: Eval,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the report here, as JSON.")
    ] = None,
    sparsity: Annotated[
        list[str] | None, typer.Option(metavar="S,...", help="Sparsities to measure.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PAT,...", help="Prune these tensors together, and no others; repeatable."),
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(metavar="N", help="Evaluate at most N times, where the curves bend most.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save measurements here, and resume from them."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="The number of processes that evaluate.")] = 1,
    picture: Picture = None,
    scope: Scope = "layer",
    pattern: PatternText = "unstructured",
    method: Method = "magnitude",
    exclude: Exclude = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Prune each tensor by itself, evaluate a function of the weights, show which tensors lose most."""
    if picture:
        plot.check(picture)
    if output:
        check_target(output)
    function = parse_eval(evaluate)
    weights = whole_files.read(foreign.source_of(source)).weights
    config = _config(scope, pattern, method, exclude, override)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn) if jobs > 1 else nullcontext()
    saved = (
        kept(f"what was measured, in {state}; the same command continues from there")
        if state
        else nullcontext()
    )
    with saved, pool as executor, progress() as bar:
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
    min_score: Annotated[float, typer.Option(help="The lowest acceptable score.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Write the pruned weights here, as `prune` does."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Divide the total by this report of `sensitivity`."),
    ] = None,
    allocation: AllocationOrNone = None,
    max_evaluations: Annotated[int, typer.Option(metavar="N", help="Evaluate at most N times.")] = 20,
    tolerance: Annotated[float, typer.Option(help="How close to the highest sparsity to get.")] = 0.01,
    picture: Picture = None,
    scope: Scope = "layer",
    pattern: PatternText = "unstructured",
    method: Method = "magnitude",
    exclude: Exclude = None,
    override: Overrides = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the highest sparsity at which a function of the weights still scores enough."""
    if picture:
        plot.check(picture)
    if report and allocation:
        msg = "--report, --allocation: expected one of them; got both; leave one out"
        raise ValueError(msg)
    if output:
        check_output(output, foreign.source_of(source), force=force)
    function = parse_eval(evaluate)
    whole = whole_files.read(foreign.source_of(source))
    if output and (whole.like is None or whole.like.shards is None):
        check_target(output / checkpoint.FILE_NAME if output.is_dir() else output)
    with progress() as bar:
        task = bar.add_task("evaluating", total=max_evaluations)
        result = find_smallest(
            whole.weights,
            function,
            min_score,
            config=_config(scope, pattern, method, exclude, override),
            allocation=SensitivityReport.load(report) if report else cast(Any, allocation),
            max_evaluations=max_evaluations,
            tolerance=tolerance,
            callback=lambda _: bar.advance(task),
        )
    if output:
        whole_files.write(source, output, result.weights, whole)
    if picture:
        curve = [(probe.sparsity, probe.score) for probe in result.curve]
        plot.degradation({"pruned": curve}, picture, min_score=min_score)
    if as_json:
        print_json(result.to_dict())
    else:
        print_text(f"{result}\n\n{result.report}")


def _config(
    scope: str,
    pattern: str,
    method: str,
    exclude: Sequence[str] | None,
    override: Sequence[str] | None,
) -> PruningConfig:
    """The configuration that the options describe."""
    return PruningConfig(
        method=parse_method(method, None, None),
        pattern=parse_pattern(pattern),
        scope=cast(Any, scope),
        exclude=exclude or (),
        overrides=dict(map(parse_override, override or ())),
    )
