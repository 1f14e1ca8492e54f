"""The commands `bench select` and `bench matmul`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sparsam import bench, plot
from sparsam.cli.arguments import parse_batches, parse_shapes, parse_sparsities
from sparsam.cli.console import print_json, print_table, print_text, progress
from sparsam.cli.options import Json
from sparsam.inputs.checks import expected
from sparsam.runtime import isa, num_threads

__all__ = ["register", "table_cells"]


def register(app: typer.Typer) -> None:
    """Adds the group `bench` to the application."""
    group = typer.Typer(help="Measure sparsam against NumPy and PyTorch on this machine.")
    group.command()(select)
    group.command()(matmul)
    app.add_typer(group, name="bench")


def select(
    n: Annotated[list[int], typer.Option(min=1, help="Repeatable.")] = [1_000_000],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Repeatable.")] = ["float32"],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.5, 0.8, 0.9, 0.99],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Time the choice of the smallest weights, and check it against the results of NumPy and PyTorch."""
    with progress() as bar:
        parts = len(n) * len(dtype) * len(sparsity)
        rows = list(bar.track(bench.select(n, dtype, sparsity), parts, description="measuring"))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_text(f"{isa()}, {num_threads()} threads; medians in milliseconds; all results agree")
    print_table(
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


def matmul(
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
        bool,
        typer.Option("--cold", help="Use eight matrices in turn; large ones then miss the cache."),
    ] = False,
    values: Annotated[
        str,
        typer.Option(
            metavar="float32|int8|int4", help="Integers: beside dense int8, PyTorch's and ONNX Runtime's."
        ),
    ] = "float32",
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
    if values not in {"float32", "int8", "int4"}:
        raise ValueError(expected("--values", values, "float32, int8 or int4", "choose one of them"))
    if picture:
        if values != "float32":
            msg = f"--plot: expected --values float32; got {values}; leave one of them out"
            raise ValueError(msg)
        plot.check(picture)
    if values != "float32":
        _integers(problems, batches, values, cold=cold, as_json=as_json)
        return
    with progress() as bar:
        parts = len(problems) * len(batches)
        measured = bench.multiply(problems, batches, cold=cold)
        rows = list(bar.track(measured, parts, description="measuring"))
    even = bench.break_even(row for row in rows if row.name == "random")
    if picture:
        plot.speedups(rows, picture, bench.machine())
    if as_json:
        print_json(
            {
                "machine": bench.machine(),
                "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
                "break_even": [
                    {"rows": r, "cols": c, "batch": n, "sparsity": at} for (r, c, n), at in even.items()
                ],
            }
        )
        return
    print_text(f"{bench.machine()}; medians in milliseconds; all results agree")
    print_table(
        ("weights", "shape", "batch", "zeros", "kernel", "sparsam", "numpy", "torch", "speed-up"),
        (
            (
                *table_cells(row),
                f"{row.numpy_ms:.3f}",
                "not installed" if row.torch_ms is None else f"{row.torch_ms:.3f}",
                f"{row.speedup:.2f}x",
            )
            for row in rows
        ),
        texts=2,
    )
    if real := [row.speedup for row in rows if row.name != "random"]:
        print_text(f"{dlmc}: geometric mean of the speed-ups {bench.geometric_mean(real):.2f}x")
    for (height, width, n), at in even.items():
        says = "at no sparsity measured" if at is None else f"from {at:.0%} zeros on"
        print_text(f"{height}x{width}, batch {n}: sparse beats dense {says}")


def _integers(
    problems: list[bench.Problem], batches: list[int], values: str, *, cold: bool, as_json: bool
) -> None:
    with progress() as bar:
        measured = bench.multiply_int8(problems, batches, cold=cold, values=values)
        rows = list(bar.track(measured, len(problems) * len(batches), description="measuring"))
    if as_json:
        print_json(
            {
                "machine": bench.machine(),
                "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
            }
        )
        return
    print_text(f"{bench.machine()}; medians in milliseconds, {values} values; all results agree")
    print_table(
        ("weights", "shape", "batch", "zeros", "bits/weight", "sparsam", "torch", "ONNX Runtime", "speed-up"),
        (
            (
                row.name,
                f"{row.rows}x{row.cols}",
                row.batch,
                f"{row.sparsity:.1%}",
                f"{row.bits:.2f}",
                f"{row.linear_ms:.3f}",
                *("not installed" if ms is None else f"{ms:.3f}" for ms in (row.torch_ms, row.onnx_ms)),
                "" if row.speedup is None else f"{row.speedup:.2f}x",
            )
            for row in rows
        ),
        texts=2,
    )


def table_cells(row: bench.MatmulRow) -> tuple[object, ...]:
    """The first columns of every table of matrix products."""
    shape = f"{row.rows}x{row.cols}"
    return row.name, shape, row.batch, f"{row.sparsity:.1%}", row.kernel, f"{row.linear_ms:.3f}"
