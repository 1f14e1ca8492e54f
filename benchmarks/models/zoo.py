"""Many classes of models, random and pruned to one sparsity by magnitude: what `accelerate` brings each.

    python benchmarks/models/zoo.py
    python benchmarks/models/zoo.py --after T5Model
    python benchmarks/models/zoo.py --untimed

A Markdown table, a row for each specimen of tests/torch/zoo_models.py: layers swapped, the model dense and
accelerated (timed in turn after `accelerate` is done), bytes of weights before and after, and what stayed
dense and why. Outputs are compared with those of the dense model.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _shared import accelerate, describe, in_turn, print_disturbed, print_table

import torch
from sparsam.report import readable_size
from sparsam.torch import LayerRow
from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.model_runner import as_examples, difference
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "torch"))

from torch_cases import Clock
from zoo_models import ZOO
from zoo_specimen import REAL, Size, Specimen, magnitude_pruned, stays

SMALL = Size(width=256, layers=2, batch=2, tokens=32, image=64)
CLOSE = 1e-4  # the largest difference of an output, relative to the largest
HEADER = (
    "model",
    "",
    "swapped",
    "dense ms",
    "sparsam ms",
    "faster",
    "weights before",
    "after",
    "stayed dense",
)
TIMES = ("dense ms", "sparsam ms", "faster")


def row(specimen: Specimen, size: Size, sparsity: float, seconds: float) -> tuple[str, ...]:
    """A line of the table."""
    torch.manual_seed(0)
    model, example = specimen.build(size)
    dense = magnitude_pruned(model, sparsity)
    accelerated = copy.deepcopy(dense)
    report = accelerate(accelerated, example)
    apart = difference(call(accelerated, example)(), call(dense, example)())
    assert apart is not None
    assert apart < CLOSE, (specimen.name, apart)
    times = in_turn({"dense": call(dense, example), "ours": call(accelerated, example)}, seconds=seconds)
    before, after = times["dense"][0], times["ours"][0]
    return (
        specimen.name,
        specimen.family,
        f"{report.swapped} of {len(report.layers)}",
        f"{before:.1f}",
        f"{after:.1f}",
        f"{before / after:.2f}x",
        readable_size(report.weights_before),
        readable_size(report.weights_after),
        reasons(report.layers),
    )


def untimed_row(specimen: Specimen, sparsity: float) -> tuple[str, ...]:
    """A line of the table without times: every layer wins, as in the tests."""
    torch.manual_seed(0)
    model, example = specimen.build(SMALL)
    dense = call(magnitude_pruned(model, sparsity), example)()
    report = accelerate(model, example)
    apart = difference(call(model, example)(), dense)
    assert apart is not None
    assert apart < CLOSE, (specimen.name, apart)
    bytes_of = (readable_size(report.weights_before), readable_size(report.weights_after))
    swapped = f"{report.swapped} of {len(report.layers)}"
    return (specimen.name, specimen.family, swapped, *bytes_of, reasons(report.layers))


def let_all_win() -> None:
    """Replaces the clock that `accelerate` has by one that favours packed layers."""
    clock = Clock()
    measurement.layer_times, measurement.model_times = clock.layer_times, clock.model_times  # type: ignore[assignment]


def reasons(layers: Iterable[LayerRow]) -> str:
    """What stayed dense and why, like layers together."""
    found = stays(layers)
    return "; ".join(f"{count} {kind}: {reason}" for (kind, reason), count in found.most_common())


def call(model: nn.Module, example: Any) -> Callable[[], Any]:
    """A run of the model without gradients."""
    (args, kwargs), *_ = as_examples(example)

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="parts of names: of the models to take; all if none")
    parser.add_argument("--after", help="the last model of a run that was interrupted: go on with the next")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--untimed", action="store_true", help="what can be packed, without times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each model, dense and accelerated")
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    options = options_given()
    warnings.simplefilter("ignore")  # what the libraries say of random models is no concern here
    torch.set_num_threads(options.threads)
    print(describe("torch", "transformers"))
    first = 0 if options.after is None else 1 + [s.name for s in ZOO].index(options.after)
    wanted = [s for s in ZOO[first:] if not options.only or any(part in s.name for part in options.only)]
    size = SMALL if options.untimed else REAL
    inputs = f"{size.batch} x {size.tokens} tokens or {size.batch} images of {size.image}x{size.image}"
    print(
        f"\nwidth {size.width}, {size.layers} layers, {inputs}; "
        f"{options.sparsity:.0%} pruned; {options.threads} threads"
    )
    if options.untimed:
        let_all_win()
        header = tuple(name for name in HEADER if name not in TIMES)
        print_table(header, (untimed_row(specimen, options.sparsity) for specimen in wanted))
        return
    print_table(HEADER, (row(specimen, REAL, options.sparsity, options.seconds) for specimen in wanted))
    print_disturbed()


if __name__ == "__main__":
    main()
