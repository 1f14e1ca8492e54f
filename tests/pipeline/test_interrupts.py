"""Ctrl-C in the middle of a long call: KeyboardInterrupt before it is done, and nothing left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import sparsam
from sparsam import NM, Block, SparseMatrix, _core, scores

# Each of these takes seconds as a whole.
LONG: dict[str, Callable[[Any], Any]] = {
    "rows": lambda w: _core.row_topk_mask(w, 1, 1),
    "tiles": lambda w: [_core.tile_scores(w, w.size, 1, 1, 1, 2) for _ in range(40)],
    "thresholds": lambda w: [sparsam.threshold(w, 0.5) for _ in range(1000)],
    "N:M": lambda w: [sparsam.select(w, 0.5, NM(100, 200)) for _ in range(40)],
    "lamp": lambda w: [scores.LAMP().score("w", w) for _ in range(4)],
    "matmul": lambda w: [SparseMatrix.from_dense(w).linear(w[:1000]) for _ in range(40)],
}


@contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Sends this process SIGINT after some seconds, as a terminal does; a background job may ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(after, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("call", LONG)
def test_long_calls_end_early(threads: int, call: str) -> None:
    w = np.random.default_rng(0).standard_normal((8000, 1000), dtype=np.float32)
    before = w.copy()
    with pytest.raises(KeyboardInterrupt), interrupted(0.2):
        LONG[call](w)
    assert np.array_equal(w, before)
    assert sparsam.select(w, 0.5).count == w.size // 2


def test_one_call_of_a_kernel_ends_early(threads: int) -> None:
    """Not only between two calls, which is Python's doing."""
    w = np.random.default_rng(0).standard_normal((8000, 1000), dtype=np.float32)
    answers: list[Any] = []

    def call() -> None:
        answers.append(_core.row_topk_mask(w, 1, 1))

    with pytest.raises(KeyboardInterrupt), interrupted(0.2):
        call()
    assert not answers


def test_other_threads_are_not_interrupted() -> None:
    w = np.random.default_rng(0).standard_normal((3000, 1000), dtype=np.float32)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_core.row_topk_mask(w, 1, 1)))
    thread.start()
    with pytest.raises(KeyboardInterrupt), interrupted(0.1):
        thread.join()
    thread.join()
    assert found[0] is not None


@pytest.mark.parametrize(
    "changes",
    [{}, {"scope": "global"}, {"scope": "row"}, {"pattern": NM(2, 4)}, {"pattern": Block(2, 2)}],
    ids=str,
)
def test_an_interrupted_prune_in_place_leaves_each_tensor_whole(changes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    originals = {
        str(i): rng.standard_normal((n, 1000), dtype=np.float32) for i, n in enumerate((2000, 40, 700, 40))
    }
    pruned = sparsam.prune(originals, target_sparsity=0.5, **changes).weights
    for trial in range(8):
        weights = {name: array.copy() for name, array in originals.items()}
        with pytest.raises(KeyboardInterrupt), interrupted(0.002 * trial):  # noqa: PT012 - again and again
            for _ in range(10_000):
                sparsam.prune(weights, target_sparsity=0.5, inplace=True, **changes)
        for name, array in weights.items():
            assert np.array_equal(array, originals[name]) or np.array_equal(array, pruned[name]), name
