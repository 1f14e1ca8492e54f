"""Methods of pruning compared on ResNet-20 and CIFAR-10, without fine-tuning: prints markdown tables.

    python benchmarks/quality/resnet20_cifar10.py --data FOLDER

The folder (or SPARSAM_DATA) has the weights and images; without them the script says where they are from.
Calibration uses 512 training images and no label. What was chosen by what is in docs/quality.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F

import torch
from _layers import (
    IN_SEQUENCE,
    ONE_SHOT,
    Array,
    Choose,
    Fitted,
    Known,
    Outputs,
    by_refit,
    check_sparsity,
    fit,
    obs_mask,
    refine,
    table,
)
from _resnet import (
    BLOCKS,
    SOURCE,
    Images,
    Network,
    Tensor,
    accuracy,
    cross_moments,
    dense_inputs,
    divergence,
    load,
    shortcut,
    statistics,
)
from sparsam.analysis.sweep import SensitivityCurve, SensitivityPoint, SensitivityReport, sensitivity

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
GRID = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
"""Where sensitivity is measured."""

REFINEMENTS = 3
"""How often a layer is fitted again to what the ReLU lets through."""


def in_sequence(
    network: Network, x: Tensor, choose: Choose, shares: Mapping[str, float], refinements: int = REFINEMENTS
) -> Network:
    """Prunes layer by layer; each sees what the pruned layers before it give, and aims at the dense network.

    The second convolution of a block is added to the shortcut, so it makes up for the shortcut's error too:
    its wanted outputs are those of the dense block less the pruned network's shortcut.
    """
    pruned = network
    x = dense = network.start(x)
    for block, stride in BLOCKS.items():
        first, second = f"{block}.conv1", f"{block}.conv2"
        wanted = network.conv(first, dense, stride)
        pruned = _fit(pruned, first, x, wanted, torch.zeros(()), choose, shares[first], stride, refinements)
        middle = F.relu(pruned.conv(first, x, stride))
        wanted = network.conv(second, F.relu(wanted)) + shortcut(dense, wanted.shape[1])
        added = shortcut(x, wanted.shape[1])
        pruned = _fit(pruned, second, middle, wanted, added, choose, shares[second], 1, refinements)
        x, dense = F.relu(pruned.conv(second, middle) + added), F.relu(wanted)
    return pruned


def _fit(
    network: Network,
    name: str,
    x: Tensor,
    wanted: Tensor,
    added: Tensor,
    choose: Choose,
    share: float,
    stride: int,
    refinements: int,
) -> Network:
    """The network with one convolution pruned; `wanted` is its output plus `added`, before the ReLU."""
    dense, scale, inputs = network.folded(name), network.scale[name].numpy(), statistics(x, stride)

    def used(layer: Fitted) -> Network:
        unfolded = layer.weights / scale.reshape(-1, 1, 1, 1)
        return network.having({name: unfolded}, {name: layer.bias})

    def outputs(y: Tensor) -> Outputs:
        return Outputs(*cross_moments(x, y, stride))

    layer = fit(name, dense, inputs, outputs(wanted - added), choose, share, scale)
    for _ in range(refinements):
        # Below 0 any output will do, as the ReLU gives 0: there the network is asked for what it gives.
        given = used(layer).conv(name, x, stride) + added
        visible = torch.where(wanted > 0, wanted, given.clamp(max=0))
        layer = refine(name, layer.weights, inputs, outputs(visible - added), layer.mask)
    return used(layer)


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
    network: Network, x: Tensor, measure: Callable[[Network], float], sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """Method -> what is measured at each sparsity."""
    known = calibrate(network, x)
    rows: dict[str, list[float]] = {}
    for sparsity in sparsities:
        for name, method in ONE_SHOT.items():
            pruned = network.having(method(known, sparsity))
            check_sparsity({key: pruned.arrays()[key] for key in known.weights}, sparsity, name)
            rows.setdefault(name, []).append(measure(pruned))
        for name, (choose, allocation) in IN_SEQUENCE.items():
            pruned = in_sequence(network, x, choose, allocation(known, sparsity))
            check_sparsity(pruned.arrays(), sparsity, name)
            rows.setdefault(name, []).append(measure(pruned))
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
    network, calibration, test = load(Path(options.data))
    held_out = np.arange(len(calibration.x)) % 4 == 0
    with torch.no_grad():
        if options.choose:
            rest = calibration.x[held_out]
            rest = torch.cat([rest, rest.flip(3)])
            dense = network.logits(rest)
            rows = compare(
                network,
                calibration.x[~held_out],
                lambda pruned: divergence(pruned.logits(rest), dense),
                options.sparsities,
            )
            text = table(rows, options.sparsities, 3)
        else:
            dense_accuracy = check_dense(network, test)
            print(f"test accuracy in percent, {len(test.x)} images; dense {dense_accuracy:.1f}\n")
            rows = compare(network, calibration.x, lambda pruned: accuracy(pruned, test), options.sparsities)
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
