"""The command `compress`: a Hugging Face directory made smaller and faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sparsam import bench, plot
from sparsam.checkpoint.atomic import check_target
from sparsam.cli.arguments import parse_override, parse_pattern
from sparsam.cli.console import kept, note, print_json, print_table, print_text, progress
from sparsam.cli.options import Exclude, Json, Overrides, PatternText
from sparsam.config import PruningConfig
from sparsam.plot import html_page

if TYPE_CHECKING:  # PyTorch is an extra
    from sparsam.torch.compression.compression_report import CompressionReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(compress)


def compress(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face directory: an encoder or a decoder.")
    ],
    calibration: Annotated[
        Path, typer.Option(metavar="FILE", help="UTF-8 text, one on each line, without labels.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The directory to write; it must not exist.")
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction to prune; 0.8 by default, or what N:M implies.")
    ] = None,
    pattern: PatternText = "unstructured",
    method: Annotated[
        str, typer.Option(help="admm, obs (SparseGPT's), wanda, ria, magnitude or random.")
    ] = "admm",
    exclude: Exclude = None,
    override: Overrides = None,
    distill: Annotated[
        float, typer.Option(metavar="MINUTES", min=0, help="Minutes of training on the texts; 0: none.")
    ] = 0.0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all results, with pictures, as one page.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to use, such as 8GiB: prunes block by block from disk."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune a Hugging Face model with calibration, accelerate it, save it, and measure the result.

    With --memory, or if three copies of the model do not fit into memory, it is pruned, and trained with
    --distill, block by block from its files; nothing is packed or measured. A run that was interrupted
    continues when the command is called again.
    """
    try:
        import transformers  # noqa: F401, PLC0415 - an extra

        from sparsam.torch.compression import block_by_block, workflow  # noqa: PLC0415
    except ImportError as error:
        msg = (
            f"compress: expected PyTorch and transformers; got an import error ({error}); "
            "install them with: pip install 'sparsam[cli,huggingface]'"
        )
        raise ValueError(msg) from error
    apart = memory is not None or block_by_block.outgrows_memory(model)
    if html:
        plot.new_figure()
        check_target(html)
        if html.resolve() == output.resolve():
            msg = f"--html: expected a file beside the output; got {html}, which is the output; name another"
            raise ValueError(msg)
    parsed = parse_pattern(pattern)
    if sparsity is None and pattern == "unstructured":
        sparsity = 0.8
    config = PruningConfig(
        target_sparsity=sparsity,
        method=cast(Any, method),
        pattern=parsed,
        exclude=exclude or (),
        overrides=dict(map(parse_override, override or ())),
    )
    if apart:
        _from_disk(model, calibration, output, config, memory, distill, html, as_json=as_json)
        return
    with progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, parts: int) -> None:
            bar.update(task, description=what, completed=done, total=parts)

        report = workflow.compress(model, calibration, output, config, distill_minutes=distill, progress=show)
    if html:
        from sparsam.cli.compression_page import render  # noqa: PLC0415 - it needs PyTorch

        html_page.write(render(report), html)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report, output)


def _from_disk(
    model: Path,
    calibration: Path,
    output: Path,
    config: PruningConfig,
    memory: str | None,
    distill: float,
    html: Path | None,
    *,
    as_json: bool,
) -> None:
    from sparsam.torch.compression.block_by_block import compress_files  # noqa: PLC0415 - it needs PyTorch

    done = "pruned and trained" if distill else "only pruned"
    note(f"block by block from disk: {done}; packing and the table of quality need the whole model")
    with kept("what is done so far; the same command continues from there"), progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        report = compress_files(
            model, calibration, output, config, memory=memory, distill_minutes=distill, progress=show
        )
    if html:
        from sparsam.cli.compression_page import render_pruning  # noqa: PLC0415 - it needs PyTorch

        html_page.write(render_pruning(report, str(model)), html)
    print_text(report.to_json() if as_json else str(report))
    if not as_json:
        print_text(f"The model is in {output}.")


def _print(report: CompressionReport, output: Path) -> None:
    print_text(f"{report.model}: {report.texts}")
    measure = report.stages[0].quality.measure
    print_table(("model", "zeros", measure, "MiB", "seconds"), report.stage_rows(), texts=1)
    print_text(f"{bench.machine()}; medians in milliseconds, taken in turn")
    print_table(("texts", "tokens", "dense", "accelerated", "speed-up"), report.timing_rows())
    print_text(f"All of it took {report.seconds:.0f} s; the model is in {output}.")
