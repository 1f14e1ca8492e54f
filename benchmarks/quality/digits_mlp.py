"""Methods of pruning compared on a network for scikit-learn's digits, without training after it.

    python benchmarks/quality/digits_mlp.py

Prints a markdown table: test accuracy over several splits and trainings. Calibration uses training images and
no label.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

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
from sparsam.analysis.sweep import SensitivityCurve, SensitivityPoint, SensitivityReport, sensitivity
from sparsam.statistics import InputStatistics
from sparsam.torch import prune
from torch import nn

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
GRID = (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Where sensitivity is measured."""

HIDDEN = (128, 64)
PASSES = 60
CALIBRATION = 512


@dataclass(frozen=True)
class Network:
    """Weights (out, in) and biases by name, in order, with a ReLU between layers."""

    weights: Mapping[str, Array]
    biases: Mapping[str, Array]

    def layer(self, name: str, x: Array) -> Array:
        """The outputs of one layer, before the ReLU."""
        outputs: Array = x @ self.weights[name].T + self.biases[name]
        return outputs

    def inputs(self, x: Array) -> dict[str, Array]:
        """The inputs of each layer, and under "" the logits."""
        found = {}
        for name in self.weights:
            found[name] = x
            logits = self.layer(name, x)
            x = np.maximum(logits, 0)
        return found | {"": logits}

    def logits(self, x: Array) -> Array:
        return self.inputs(x)[""]

    def having(self, weights: Mapping[str, Array]) -> Network:
        return replace(self, weights={**self.weights, **weights})


@dataclass(frozen=True)
class Problem:
    """A trained network, calibration images and test images with labels."""

    network: Network
    calibration: Array
    test: Array
    labels: Array

    def accuracy(self, network: Network) -> float:
        """In percent, on the test images."""
        return 100 * float(np.mean(network.logits(self.test).argmax(1) == self.labels))


def train(seed: int) -> Problem:
    """Splits the 1797 images in halves and trains on one of them."""
    images, labels = load_digits(return_X_y=True)
    x, test, y, test_labels = train_test_split(
        (images / 16).astype(np.float32), labels, test_size=0.5, random_state=seed, stratify=labels
    )
    model = MLPClassifier(HIDDEN, random_state=seed, batch_size=64)
    for _ in range(PASSES):
        model.partial_fit(x, y, classes=np.arange(10))
    names = [f"layer{i}" for i in range(len(model.coefs_))]
    weights = [np.ascontiguousarray(w.T, dtype=np.float32) for w in model.coefs_]
    biases = [b.astype(np.float32) for b in model.intercepts_]
    network = Network(dict(zip(names, weights, strict=True)), dict(zip(names, biases, strict=True)))
    return Problem(network, x[:CALIBRATION], test, test_labels)


def calibrate(network: Network, x: Array) -> Known:
    """What the methods may use; both sensitivities are mean squared differences of the logits."""
    inputs = {name: statistics(values) for name, values in network.inputs(x).items() if name}
    dense = network.logits(x)

    def score(candidate: Mapping[str, Array]) -> float:
        return -float(np.mean((network.having(candidate).logits(x) - dense) ** 2))

    alone = sensitivity(network.weights, score, GRID)
    curves = []
    for name, array in network.weights.items():
        one = Known({name: array}, inputs, alone, alone)
        points = tuple(
            SensitivityPoint(name, s, round(s * array.size), score(by_refit(obs_mask, one, {name: s})))
            for s in GRID
        )
        curves.append(SensitivityCurve(name, ((name, array.size),), points))
    return Known(network.weights, inputs, alone, SensitivityReport(0.0, tuple(curves), "obs + refit"))


def statistics(x: Array) -> InputStatistics:
    return InputStatistics(x.shape[1]).update(x)


def in_sequence(
    network: Network, x: Array, method: str, allocation: Mapping[str, float] | str, sparsity: float
) -> Network:
    """`sparsam.torch.prune` of the network as a model of PyTorch."""
    layers: dict[str, nn.Module] = {}
    for name, weights in network.weights.items():
        layers[name] = layer = nn.Linear(weights.shape[1], len(weights))
        layer.weight.data = torch.tensor(weights)
        layer.bias.data = torch.tensor(network.biases[name])
        layers[f"{name}_relu"] = nn.ReLU()
    layers.popitem()
    model = nn.Sequential(OrderedDict(layers))
    if not isinstance(allocation, str):
        allocation = {f"{name}.weight": share for name, share in allocation.items()}
    options: Any = {"method": method, "allocation": allocation, "target_sparsity": sparsity}
    prune(model, None, torch.from_numpy(x).chunk(16), **options)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    matrices = {name: state[f"{name}.weight"] for name in network.weights}
    return Network(matrices, {name: state[f"{name}.bias"] for name in network.weights})


def compare(problem: Problem, sparsities: Sequence[float]) -> dict[str, list[float]]:
    """Method -> test accuracy at each sparsity."""
    network, x = problem.network, problem.calibration
    known = calibrate(network, x)
    rows: dict[str, list[float]] = {}
    for sparsity in sparsities:
        candidates = {name: network.having(method(known, sparsity)) for name, method in ONE_SHOT.items()}
        candidates |= {
            name: in_sequence(network, x, word, allocation(known, sparsity), sparsity)
            for name, (word, allocation) in IN_SEQUENCE.items()
        }
        for name, pruned in candidates.items():
            check_sparsity(pruned.weights, sparsity, name)
            rows.setdefault(name, []).append(problem.accuracy(pruned))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--seeds", type=int, default=5, help="how many splits and trainings")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    problems = [train(seed) for seed in range(options.seeds)]
    dense = [problem.accuracy(problem.network) for problem in problems]
    assert min(dense) > 94, f"a dense network has {min(dense):.1f} %: training went wrong"
    results = [compare(problem, options.sparsities) for problem in problems]
    rows = {name: np.mean([result[name] for result in results], axis=0).tolist() for name in results[0]}
    print(f"test accuracy in percent, mean over {options.seeds} seeds; dense {np.mean(dense):.1f}\n")
    print(table(rows, options.sparsities))
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
