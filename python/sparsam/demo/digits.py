"""The demo on real data: train a network on scikit-learn's digits, prune it, and measure the accuracy.

The same dense weights are pruned in two ways at the same sparsities. *Iteratively*: each step prunes a little
more and training goes on under the masks. *One shot*: straight to the sparsity, with no training after it.
How much each layer matters is measured one layer at a time, and the smallest network that is about as good
as the dense one is searched for. Both use only the training images, so that the accuracy on the test images
is an honest estimate. Last, products with the pruned layers are timed, and with a matrix of a transformer's
size.
Everything is computed when `run` is called; nothing is stored but the settings below.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import SensitivityReport, sensitivity
from sparsam.bench import MatmulRow, Problem, break_even, median_seconds, multiply, random_problems
from sparsam.config import PruningConfig
from sparsam.masks import Mask
from sparsam.pruner import prune
from sparsam.report import Report
from sparsam.selection import select_many, threshold
from sparsam.training.iterative import IterativePruner

__all__ = ["DemoResult", "MatmulTiming", "SmallestNetwork", "Step", "run"]

HIDDEN = (512, 256)
TRAINING_PASSES = 40
RECOVERY_PASSES = 8
STEPS = 8
INITIAL_SPARSITY, FINAL_SPARSITY = 0.5, 0.95
ALLOWED_LOSS = 0.01  # of the accuracy on the training images, in the search for the smallest network
SEARCH_PASSES = 4
FEED_FORWARD = (3072, 768)  # of a transformer: random weights, since no image of 8 x 8 needs it
FEED_FORWARD_BATCHES = (1, 128)

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Step:
    """Test accuracy at one sparsity, with recovery and without."""

    iteration: int
    sparsity: float
    iterative: float
    one_shot: float


@dataclass(frozen=True)
class SmallestNetwork:
    """The result of one search.

    Attributes:
        method: How weights were chosen, and whether the others were trained.
        sparsity: Of the matrices.
        train_accuracy: The score of the search: at least that of the dense network less ALLOWED_LOSS.
        test_accuracy: On the test images, which the search did not use.
        evaluations: How many networks were tried.
    """

    method: str
    sparsity: float
    train_accuracy: float
    test_accuracy: float
    evaluations: int

    COLUMNS: ClassVar[tuple[str, ...]] = ("pruned how", "sparsity", "training", "test", "tried")

    def cells(self) -> tuple[str | int, ...]:
        """The row of a table under COLUMNS."""
        shares = (self.sparsity, self.train_accuracy, self.test_accuracy)
        return (self.method, *(f"{share:.2%}" for share in shares), self.evaluations)


@dataclass(frozen=True)
class MatmulTiming:
    """Multiplication with one matrix.

    Attributes:
        row: The times at the sparsity reached.
        break_even: The lowest sparsity at which sparse is faster than dense; None if there is none.
    """

    row: MatmulRow
    break_even: float | None


@dataclass(frozen=True)
class DemoResult:
    """The results of a run.

    Attributes:
        seed: Of the split, the initial weights and the order of the batches.
        layers: Widths, from the input to the output.
        train_images: How many images were trained on, never one of the test images.
        test_images: How many images every accuracy is measured on.
        training_passes: Passes over the training images before pruning.
        recovery_passes: Passes after each step of the iterative run.
        dense_accuracy: Test accuracy before pruning.
        longer_accuracy: Test accuracy of a dense network that was trained on for as many passes as the
            iterative run: what training alone would have changed.
        steps: One row per sparsity.
        sensitivity: Accuracy on the training images with one matrix pruned at a time, the others dense.
        smallest: The smallest networks whose accuracy on the training images is nearly the dense one.
        report: The tensors of the final, iteratively pruned network.
        selection_seconds: Choosing what to keep of the dense weights, once for each sparsity.
        partition_seconds: `np.partition` on the magnitudes of the same arrays for the same thresholds.
        matmuls: The pruned layers times all test images, and FEED_FORWARD at the same sparsity.
        seconds: The whole run.
    """

    seed: int
    layers: tuple[int, ...]
    train_images: int
    test_images: int
    training_passes: int
    recovery_passes: int
    dense_accuracy: float
    longer_accuracy: float
    steps: tuple[Step, ...]
    sensitivity: SensitivityReport
    smallest: tuple[SmallestNetwork, ...]
    report: Report
    selection_seconds: float
    partition_seconds: float
    matmuls: tuple[MatmulTiming, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the attributes."""
        plain = dict(vars(self))
        for name in ("steps", "smallest", "matmuls"):
            plain[name] = [asdict(item) for item in plain[name]]
        return plain | {"report": self.report.to_dict(), "sensitivity": self.sensitivity.to_dict()}


def run(seed: int = 0, progress: Callable[[str, int, int], None] = lambda *_: None) -> DemoResult:
    """Trains, prunes in both ways and measures; a few seconds on two cores.

    Args:
        seed: At least 0. The same seed gives the same accuracies on the same machine.
        progress: Called with the name of the current step, the number of finished steps and their total.
    """
    start = time.perf_counter()
    parts = STEPS + 6
    digits = _Digits(seed)
    progress("training", 0, parts)
    digits.train(TRAINING_PASSES)
    dense = digits.weights()
    progress("training on, dense", 1, parts)
    longer = copy.deepcopy(digits)
    longer.train(STEPS * RECOVERY_PASSES)

    config = PruningConfig(scope="global")
    pruner = IterativePruner(INITIAL_SPARSITY, FINAL_SPARSITY, STEPS, "cubic", config)

    def recover(weights: Weights, masks: Mapping[str, Mask], iteration: int) -> Weights:
        progress("pruning iteratively", 1 + iteration, parts)
        digits.assign(weights)
        return digits.train_under(masks, RECOVERY_PASSES)

    result = pruner.run(dense, digits.accuracy, recover)
    progress("pruning in one shot", 2 + STEPS, parts)
    sparsities = [row.sparsity for row in result.history]
    one_shot = [digits.accuracy(prune(dense, config, target_sparsity=s).weights) for s in sparsities]
    matrices = {name: array for name, array in dense.items() if array.ndim > 1}
    selection_seconds, partition_seconds = _selection_cost(matrices, sparsities)
    progress("measuring sensitivity", 3 + STEPS, parts)
    report = sensitivity(dense, digits.train_accuracy)
    progress("searching for the smallest network", 4 + STEPS, parts)
    smallest = _smallest_networks(digits, dense, report)
    progress("multiplying", 5 + STEPS, parts)
    matmuls = _time_matmuls(result.weights, len(digits.test_labels))
    progress("done", parts, parts)
    return DemoResult(
        seed=seed,
        layers=digits.widths,
        train_images=len(digits.train_labels),
        test_images=len(digits.test_labels),
        training_passes=TRAINING_PASSES,
        recovery_passes=RECOVERY_PASSES,
        dense_accuracy=result.dense_score,
        longer_accuracy=longer.accuracy(longer.weights()),
        steps=tuple(
            Step(row.iteration, row.sparsity, row.score, accuracy)
            for row, accuracy in zip(result.history, one_shot, strict=True)
        ),
        sensitivity=report,
        smallest=smallest,
        report=result.report,
        selection_seconds=selection_seconds,
        partition_seconds=partition_seconds,
        matmuls=matmuls,
        seconds=time.perf_counter() - start,
    )


class _Digits:
    """8 x 8 images of handwritten digits, split for training and testing, and a network that learns them."""

    def __init__(self, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(
            (images / 16).astype(np.float32), labels, test_size=0.25, stratify=labels, random_state=seed
        )
        self.train_images, self.test_images, self.train_labels, self.test_labels = split
        # A generator, not the seed: with a seed every pass would shuffle the images in the same order.
        generator = np.random.RandomState(seed)
        self.network = MLPClassifier(HIDDEN, random_state=generator)
        self.widths = (images.shape[1], *HIDDEN, 10)

    def train(self, passes: int) -> None:
        for _ in range(passes):
            self.network.partial_fit(self.train_images, self.train_labels, classes=range(10))

    def train_under(self, masks: Mapping[str, Mask], passes: int) -> dict[str, NDArray[Any]]:
        for _ in range(passes):
            self.train(1)
            trained = self.weights()
            self.assign(trained | {name: mask.apply(trained[name]) for name, mask in masks.items()})
        return self.weights()

    def _parameters(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        return zip(self.network.coefs_, self.network.intercepts_, strict=True)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Copies under torch's names and shapes; scikit-learn keeps (in, out), torch (out, in)."""
        named: dict[str, NDArray[Any]] = {}
        for i, (coefficients, bias) in enumerate(self._parameters()):
            named[f"layers.{i}.weight"] = np.array(coefficients.T, order="C")
            named[f"layers.{i}.bias"] = bias.copy()
        return named

    def assign(self, weights: Weights) -> None:
        for i, (coefficients, bias) in enumerate(self._parameters()):
            coefficients[...] = weights[f"layers.{i}.weight"].T
            bias[...] = weights[f"layers.{i}.bias"]

    def accuracy(self, weights: Weights) -> float:
        self.assign(weights)
        return float(self.network.score(self.test_images, self.test_labels))

    def train_accuracy(self, weights: Weights) -> float:
        self.assign(weights)
        return float(self.network.score(self.train_images, self.train_labels))


def _smallest_networks(
    digits: _Digits, dense: Weights, report: SensitivityReport
) -> tuple[SmallestNetwork, ...]:
    """The smallest networks, by three methods of pruning."""

    def recover(weights: Weights, masks: Mapping[str, Mask]) -> Weights:
        digits.assign(weights)
        return digits.train_under(masks, SEARCH_PASSES)

    min_score = report.dense_score - ALLOWED_LOSS
    methods: dict[str, dict[str, Any]] = {
        "one shot, one threshold for all": {"config": PruningConfig(scope="global")},
        "one shot, shared out by sensitivity": {"allocation": report},
        f"one threshold, {SEARCH_PASSES} passes of training": {
            "config": PruningConfig(scope="global"),
            "recover_fn": recover,
        },
    }
    found = []
    for method, arguments in methods.items():
        result = find_smallest(dense, digits.train_accuracy, min_score, tolerance=0.02, **arguments)
        accuracy = digits.accuracy(result.weights)
        found.append(SmallestNetwork(method, result.sparsity, result.score, accuracy, result.evaluations))
    return tuple(found)


def _selection_cost(weights: Weights, sparsities: list[float]) -> tuple[float, float]:
    """Seconds for all selections over all `weights`, and for `np.partition` to find the thresholds."""
    arrays = list(weights.values())

    def partition(k: int) -> NDArray[Any]:
        return np.partition(np.concatenate([np.abs(array).ravel() for array in arrays]), k - 1)

    ours = theirs = 0.0
    for sparsity in sparsities:
        found = threshold(arrays, sparsity)
        if partition(found.k)[found.k - 1] != found.value:
            msg = f"np.partition and sparsam disagree at sparsity {sparsity}; please report this"
            raise RuntimeError(msg)
        ours += median_seconds(select_many, weights, sparsity)
        theirs += median_seconds(partition, found.k)
    return ours, theirs


def _time_matmuls(weights: Weights, batch: int) -> tuple[MatmulTiming, ...]:
    """Times the products with the pruned matrices, and with a large one that is as sparse as all of them."""
    matrices = {name: array for name, array in weights.items() if array.ndim > 1}
    zeros = sum(array.size - np.count_nonzero(array) for array in matrices.values())
    sparsity = float(zeros / sum(array.size for array in matrices.values()))
    layers = [_problem(name, array) for name, array in matrices.items()]
    large = random_problems([FEED_FORWARD], [sparsity])
    measured = [*multiply(layers, [batch]), *multiply(large, FEED_FORWARD_BATCHES)]
    # The break-even comes from random patterns of the same shapes, measured without zeros and with many.
    steps = (0.0, 0.5, sparsity)
    around = random_problems([layer.shape for layer in layers], steps)
    even = break_even(
        [*multiply(around, [batch]), *multiply(random_problems([FEED_FORWARD], steps), FEED_FORWARD_BATCHES)]
    )
    return tuple(MatmulTiming(row, even[row.rows, row.cols, row.batch]) for row in measured)


def _problem(name: str, weights: NDArray[Any]) -> Problem:
    sparsity = 1 - np.count_nonzero(weights) / weights.size
    return Problem(name, (weights.shape[0], weights.shape[1]), float(sparsity), lambda: weights)
