"""The command line: arguments in, the package called, what came of it printed. No logic of its own."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console

from sparsam import bench, checkpoint, plot
from sparsam.cli import minilm as cli_minilm
from sparsam.cli.analysis import register
from sparsam.cli.arguments import (
    PATTERNS,
    parse_batches,
    parse_method,
    parse_override,
    parse_pattern,
    parse_shapes,
    parse_sparsities,
)
from sparsam.cli.console import print_json as _print_json
from sparsam.cli.console import print_table as _print_table
from sparsam.cli.console import print_text as _print
from sparsam.cli.console import progress as _progress
from sparsam.config import PruningConfig
from sparsam.pruner import prune as prune_weights
from sparsam.report import Report, measure, printable
from sparsam.runtime import build_info, isa, num_threads
from sparsam.sparse import cost_model

__all__ = ["main"]

# What all errors in arguments are: click's class, or the copy of it that newer versions of typer carry.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Prune neural-network weights exactly.", add_completion=False, pretty_exceptions_enable=False
)
bench_app = typer.Typer(help="Measure this machine, against NumPy and PyTorch in the same run.")
app.add_typer(bench_app, name="bench")
register(app)

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 2, and a line on stderr, for whatever a user can mend."""
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            code = command.main(arguments, prog_name="sparsam", standalone_mode=False)
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "sparsam"
            text: str = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            return _complain(f"{text}; see {where} --help")
        except (ValueError, TypeError, OSError, MemoryError) as error:
            return _complain(str(error) or type(error).__name__)
        except (typer.Abort, KeyboardInterrupt):
            return 130
    return code if isinstance(code, int) else 0


class DemoModel(str, Enum):
    """What the demo is about."""

    digits = "digits"
    minilm = "minilm"


@app.command()
def demo(
    model: Annotated[
        DemoModel, typer.Option(help="digits, trained here; minilm, a sentence encoder made faster.")
    ] = DemoModel.digits,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the data split and the training; of minilm's token ids.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with everything, pictures inside.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a network on real digits, prune it to 95 % step by step, show what that costs: under a minute.

    With --model minilm: prune a sentence encoder to 80 %, accelerate it, time it beside PyTorch.
    """
    if model is DemoModel.minilm:
        if html:
            msg = "--html: expected --model digits, of which it makes a page; leave it out"
            raise ValueError(msg)
        cli_minilm.demo(seed, as_json=as_json)
        return
    try:
        from sparsam.demo import digits as job  # noqa: PLC0415 - scikit-learn is an extra
        from sparsam.demo import page as demo_page  # noqa: PLC0415
    except ImportError as error:
        msg = f"the demo needs scikit-learn ({error}); install it with: pip install 'sparsam[demo]'"
        raise ValueError(msg) from error
    if html:
        demo_page.check(html)
    with _progress() as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, parts: int) -> None:
            bar.update(task, description=what, completed=done, total=parts)

        result = job.run(seed, show)
    if html:
        demo_page.write(result, html)
    if as_json:
        _print_json(result.to_dict())
        return
    widths = "-".join(map(str, result.layers))
    _print(
        f"A {widths} network on scikit-learn's digits: {result.train_images} images to train on, "
        f"{result.test_images} others to test on.\n"
        f"Dense, after {result.training_passes} passes of training: {result.dense_accuracy:.2%} correct; "
        f"after {result.recovery_passes * len(result.steps)} more: {result.longer_accuracy:.2%}.\n"
    )
    _print(
        f"iterative: {result.recovery_passes} passes of training under the masks after each step\n"
        "one shot:  the dense weights pruned at once, no training after it"
    )
    _print_table(
        ("step", "sparsity", "iterative", "one shot"),
        ((s.iteration, f"{s.sparsity:.2%}", f"{s.iterative:.2%}", f"{s.one_shot:.2%}") for s in result.steps),
    )
    _print(f"\nSensitivity, as accuracy on the training images:\n{result.sensitivity}\n")
    _print(f"The smallest networks that lose at most {job.ALLOWED_LOSS:.0%} of the training images:")
    _print_table(
        ("pruned how", "sparsity", "training", "test", "tried"),
        (
            (f.how, f"{f.sparsity:.2%}", f"{f.train_accuracy:.2%}", f"{f.test_accuracy:.2%}", f.evaluations)
            for f in result.found
        ),
        texts=1,
    )
    _print(f"\n{result.report}\n")
    total = result.report.total
    _print(
        f"Size: {total.dense_bytes:,} bytes dense, {total.packed_bytes:,} packed "
        f"({total.dense_bytes / total.packed_bytes:.1f} times smaller).\n"
        f"Selection of what to keep, {len(result.steps)} times over all matrices: "
        f"{result.selection_seconds * 1e3:.2f} ms; np.partition on the same arrays: "
        f"{result.partition_seconds * 1e3:.2f} ms.\n\n"
        "Products x W^T, medians in milliseconds; even: from how many zeros on sparse is the faster one"
    )
    _print_table(
        ("matrix", "shape", "batch", "zeros", "kernel", "sparsam", "dense", "speed-up", "even"),
        (
            (
                *_cells(product.row),
                f"{product.row.dense_ms:.3f}",
                f"{product.row.speedup:.2f}x",
                "-" if product.break_even is None else f"{product.break_even:.0%}",
            )
            for product in result.products
        ),
        texts=2,
    )
    _print(f"All of it took {result.seconds:.1f} s.")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A safetensors file, an index of shards, or their directory.")],
    as_json: Json = False,
) -> None:
    """Show every tensor of a checkpoint: its shape, its zeros, its size dense and packed."""
    report = Report(sorted((measure(*item) for item in checkpoint.stream(file)), key=lambda row: row.name))
    _print(report.to_json() if as_json else str(report))


@app.command()
def prune(
    source: Annotated[Path, typer.Argument(metavar="IN", help="What `inspect` takes.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The file; of a sharded checkpoint, the directory."
        ),
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction to prune; 0.5 by default, or what N:M implies.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="layer (each tensor by itself), row (each row) or global (one pool).")
    ] = "layer",
    allocation: Annotated[
        str, typer.Option(help="What each tensor gets of the total: uniform, erk, lamp or global.")
    ] = "uniform",
    pattern: Annotated[str, typer.Option(help=f"One of {PATTERNS}.")] = "unstructured",
    method: Annotated[str, typer.Option(help="magnitude, random or lamp.")] = "magnitude",
    norm: Annotated[
        int | None, typer.Option(help="Of magnitude, over a group: 1 (the default) or 2.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of random; 0 by default.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PAT", help="Leave tensors with such names dense; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PAT=VALUE", help="Give them a sparsity, a pattern or both, as 0.5,2:4; repeatable."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the input.")] = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and print the report. Names match shell-style patterns; vectors stay dense."""
    config = PruningConfig(
        target_sparsity=sparsity,  # type: ignore[arg-type]
        method=parse_method(method, norm, seed),
        pattern=parse_pattern(pattern),
        scope=scope,
        allocation=allocation,
        exclude=exclude or (),
        overrides=dict(map(parse_override, override or ())),
    )
    if not force and checkpoint.overwrites(output, source):
        msg = f"{output}: expected an output other than the input; name another, or pass --force"
        raise ValueError(msg)
    read = checkpoint.load(source)
    numberless = [glob.escape(name) for name, array in read.weights.items() if array.dtype.kind in "biu"]
    config = replace(config, exclude=(*config.exclude, *numberless))
    result = prune_weights(read.weights, config, inplace=True)
    checkpoint.save(output, result.weights, like=read)
    _print(result.report.to_json() if as_json else str(result.report))


@bench_app.command("select")
def bench_select(
    n: Annotated[list[int], typer.Option(min=1, help="Repeatable.")] = [1_000_000],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Repeatable.")] = ["float32"],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.5, 0.8, 0.9, 0.99],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Time the choice of the smallest weights, and check it against the results of NumPy and PyTorch."""
    with _progress() as bar:
        parts = len(n) * len(dtype) * len(sparsity)
        rows = list(bar.track(bench.select(n, dtype, sparsity), parts, description="measuring"))
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    _print(f"{isa()}, {num_threads()} threads; medians in milliseconds; all results agree")
    _print_table(
        (
            "n",
            "dtype",
            "sparsity",
            "read",
            "threshold",
            "whole prune",
            "np.partition",
            "torch.kthvalue",
            "vs NumPy",
        ),
        (
            (
                f"{row.n:,}",
                row.dtype,
                row.sparsity,
                *(f"{ms:.3f}" for ms in (row.read_ms, row.threshold_ms, row.prune_ms, row.numpy_ms)),
                "not installed" if row.torch_ms is None else f"{row.torch_ms:.3f}",
                f"{row.numpy_ms / row.threshold_ms:.1f}x",
            )
            for row in rows
        ),
    )


@bench_app.command("matmul")
def bench_matmul(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN,...", help="3072x768 by default, without --dlmc.")
    ] = None,
    batch: Annotated[list[str], typer.Option(metavar="N,...", help="Rows of x.")] = ["1,8,128"],  # noqa: B006
    sparsity: Annotated[
        list[str], typer.Option(metavar="S,...", help="0 is added: the break-even needs it.")
    ] = ["0.5,0.8,0.9"],  # noqa: B006
    dlmc: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Patterns of pruned networks: *.smtx files.")
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Eight matrices in turn, too many for a cache if they are large.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw speed-up against sparsity: .png, .svg."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time products with pruned matrices beside the dense ones of NumPy and PyTorch, results compared."""
    batches = parse_batches(batch)
    problems = bench.read_dlmc(dlmc) if dlmc else []
    if shape or not dlmc:
        sparsities = sorted({0.0, *parse_sparsities(sparsity)})
        problems = bench.random_problems(parse_shapes(shape or ["3072x768"]), sparsities) + problems
    if picture:
        plot.check(picture)
    with _progress() as bar:
        parts = len(problems) * len(batches)
        measured = bench.multiply(problems, batches, cold=cold)
        rows = list(bar.track(measured, parts, description="measuring"))
    even = bench.break_even(row for row in rows if row.name == "random")
    if picture:
        plot.speedups(rows, picture, bench.machine())
    if as_json:
        _print_json(
            {
                "machine": bench.machine(),
                "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
                "break_even": [
                    {"rows": r, "cols": c, "batch": n, "sparsity": at} for (r, c, n), at in even.items()
                ],
            }
        )
        return
    _print(f"{bench.machine()}; medians in milliseconds; all results agree")
    _print_table(
        ("weights", "shape", "batch", "zeros", "kernel", "sparsam", "numpy", "torch", "speed-up"),
        (
            (
                *_cells(row),
                f"{row.numpy_ms:.3f}",
                "not installed" if row.torch_ms is None else f"{row.torch_ms:.3f}",
                f"{row.speedup:.2f}x",
            )
            for row in rows
        ),
        texts=2,
    )
    if real := [row.speedup for row in rows if row.name != "random"]:
        _print(f"{dlmc}: geometric mean of the speed-ups {bench.geometric_mean(real):.2f}x")
    for (height, width, n), at in even.items():
        says = "at no sparsity measured" if at is None else f"from {at:.0%} zeros on"
        _print(f"{height}x{width}, batch {n}: sparse beats dense {says}")


@app.command()
def calibrate(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Measure anew what products cost on this machine; SparseMatrix chooses its kernels by that."""
    machine = cost_model.calibrate(dtype, force=True).machine
    file = cost_model.cache_file(machine)
    _print(f"{machine}: kept in {file}" if file.exists() else f"{machine}: not kept, disturbed or no cache")


@app.command()
def info() -> None:
    """Show the version, the compiler, the instruction sets and the threads."""
    _print(str(build_info()))


def _cells(row: bench.MatmulRow) -> tuple[object, ...]:
    """What every table of products begins with."""
    shape = f"{row.rows}x{row.cols}"
    return row.name, shape, row.batch, f"{row.sparsity:.1%}", row.kernel, f"{row.linear_ms:.3f}"


def _complain(message: str) -> int:
    """Prints one line on stderr, whatever the message, and returns the exit code that goes with it."""
    Console(stderr=True).out("sparsam:", printable(" ".join(message.split())), highlight=False)
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _complain(f"warning: {message}")
