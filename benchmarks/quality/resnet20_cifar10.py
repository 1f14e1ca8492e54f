"""Methods of pruning compared on ResNet-20 and CIFAR-10, without fine-tuning: prints markdown tables.

    python benchmarks/quality/resnet20_cifar10.py --data FOLDER

The folder (or SPARSAM_DATA) has the weights and images; without them the script says where they are from.
Calibration uses 512 training images and no label. What was chosen by what is in docs/quality.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import torch
from _layers import (
    IN_SEQUENCE,
    ONE_SHOT,
    Array,
    Known,
    by_refit,
    check_sparsity,
    obs_mask,
    table,
)
from _resnet import (
    SOURCE,
    Images,
    Network,
    ResNet20,
    Tensor,
    accuracy,
    batches,
    dense_inputs,
    divergence,
    load,
)
from sparsam.analysis.sweep import SensitivityCurve, SensitivityPoint, SensitivityReport, sensitivity
from sparsam.torch import prune

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
GRID = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
"""Where sensitivity is measured."""


def in_sequence(
    model: ResNet20, x: Tensor, method: str, allocation: Mapping[str, float] | str, sparsity: float
) -> ResNet20:
    """`sparsam.torch.prune` of all convolutions but the first."""
    if not isinstance(allocation, str):
        allocation = {f"{name}.weight": share for name, share in allocation.items()}
    pruned = copy.deepcopy(model)
    options: Any = {"method": method, "allocation": allocation, "target_sparsity": sparsity}
    prune(pruned, None, batches(x), exclude=("conv1.weight", "linear"), **options)
    return pruned


def calibrate(network: Network, x: Tensor) -> Known:
    """What the methods may use, from calibration images without labels.

    `alone` is scored by the divergence from the dense network's predictions, `refitted` by the mean squared
    difference of the logits, which tells more where single layers hardly change a prediction.
    """
    weights, inputs, dense = network.arrays(), dense_inputs(network, x), network.logits(x)

    def score(candidate: Mapping[str, Array]) -> float:
        return -divergence(network.having(candidate).logits(x), dense)

    alone = sensitivity(weights, score, GRID)
    curves = []
    for name, array in weights.items():
        points = []
        for sparsity in GRID:
            one = Known({name: array}, inputs, alone, alone)
            refitted = by_refit(obs_mask, one, {name: sparsity})
            loss = float(((network.having(refitted).logits(x) - dense) ** 2).mean())
            points.append(SensitivityPoint(name, sparsity, round(sparsity * array.size), -loss))
        curves.append(SensitivityCurve(name, ((name, array.size),), tuple(points)))
    return Known(weights, inputs, alone, SensitivityReport(0.0, tuple(curves), "obs + refit"))


def compare(
    network: Network,
    model: ResNet20,
    x: Tensor,
    measure: Callable[[Network | ResNet20], float],
    sparsities: Sequence[float],
) -> dict[str, list[float]]:
    """Method -> what is measured at each sparsity."""
    known = calibrate(network, x)
    rows: dict[str, list[float]] = {}
    for sparsity in sparsities:
        for name, method in ONE_SHOT.items():
            pruned = network.having(method(known, sparsity))
            check_sparsity({key: pruned.arrays()[key] for key in known.weights}, sparsity, name)
            rows.setdefault(name, []).append(measure(pruned))
        for name, (word, allocation) in IN_SEQUENCE.items():
            smaller = in_sequence(model, x, word, allocation(known, sparsity), sparsity)
            check_sparsity(smaller.arrays(), sparsity, name)
            rows.setdefault(name, []).append(measure(smaller))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPARSAM_DATA"), help=SOURCE)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument(
        "--choose",
        action="store_true",
        help="no test images: calibrate with three quarters of the calibration images and print the "
        "divergence from the dense predictions on the rest, by which the method was chosen",
    )
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error(f"expected --data FOLDER or SPARSAM_DATA; {SOURCE}")
    start = time.perf_counter()
    network, model, calibration, test = load(Path(options.data))
    held_out = np.arange(len(calibration.x)) % 4 == 0
    with torch.no_grad():
        if options.choose:
            rest = calibration.x[held_out]
            rest = torch.cat([rest, rest.flip(3)])
            dense = network.logits(rest)
            rows = compare(
                network,
                model,
                calibration.x[~held_out],
                lambda pruned: divergence(pruned.logits(rest), dense),
                options.sparsities,
            )
            text = table(rows, options.sparsities, 3)
        else:
            dense_accuracy = check_dense(network, test)
            print(f"test accuracy in percent, {len(test.x)} images; dense {dense_accuracy:.1f}\n")
            rows = compare(
                network, model, calibration.x, lambda pruned: accuracy(pruned, test), options.sparsities
            )
            text = table(rows, options.sparsities)
    print(text)
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


def check_dense(network: Network, test: Images) -> float:
    """The dense accuracy, if it is what these weights are known to have on these images."""
    dense = accuracy(network, test)
    assert abs(dense - 91.5) < 0.15, f"the dense network has {dense:.1f} %: expected 91.5; other files?"
    return dense


if __name__ == "__main__":
    main()
