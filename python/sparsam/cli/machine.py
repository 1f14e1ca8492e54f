"""The commands about this machine: `calibrate` and `info`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from sparsam.cli.console import print_text, progress
from sparsam.runtime import build_info
from sparsam.sparse import calibration, cost_model

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(calibrate)
    app.command()(info)


def calibrate(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Measure the time of matmuls on this machine (one minute); kernels are then chosen by it.

    Kernels for values of one dtype, NumPy's dense product, and, if it is installed, PyTorch's dense linear
    layer in float32 and bfloat16. Convolutions are not measured: `accelerate` times those of a model.
    """
    with_torch = find_spec("torch") is not None
    with progress(alive=False) as bar:  # a bar that updates by itself would disturb the measurement
        task = bar.add_task("kernels and NumPy", total=2 if with_torch else 1)
        bar.refresh()
        found = calibration.calibrate(dtype)
        if with_torch:
            from sparsam.torch.layers import dense_costs  # noqa: PLC0415 - slow to import, not before the rest

            bar.update(task, description="PyTorch", advance=1)
            bar.refresh()
            found += dense_costs.calibrate()
    for measured in found:
        key = measured.costs.key
        file = cost_model.cache_file(key)
        print_text(
            f"{key}: the fit is off by {measured.error:.0%} in the median, "
            + (f"kept in {file}" if measured.stored else "not kept: it was disturbed, or there is no cache")
        )


def info() -> None:
    """Show the version, the compiler, the instruction sets and the threads."""
    print_text(str(build_info()))
