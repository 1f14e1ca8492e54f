"""Another thread writes to the weights meanwhile: answers mean nothing then, but every call ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from sparsam import NM, Block, Slices, SparseMatrix

SECONDS = 1.0

CALLS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "threshold": lambda w: sparsam.threshold(w, 0.5),
    "threshold of many": lambda w: sparsam.threshold([w[:100], w[100:]], 0.5),
    "select": lambda w: sparsam.select(w, 0.5),
    "in place": lambda w: sparsam.select_many({"w": w}, 0.5, out={"w": w}),
    "each by itself": lambda w: sparsam.select_many({"a": w[:4], "b": w[4:]}, 0.5, scope="layer"),
    "rows": lambda w: sparsam.select(w, 0.5, scope="row"),
    "long rows": lambda w: sparsam.select(w.reshape(8, -1), 0.5, scope="row"),
    "N:M": lambda w: sparsam.select(w, 0.5, NM(2, 4)),
    "block": lambda w: sparsam.select(w, 0.5, Block(4, 4)),
    "slices": lambda w: sparsam.select(w, 0.5, Slices(0)),
    "nothing pruned": lambda w: sparsam.select(w, 0.0),
    "prune": lambda w: sparsam.prune(w, target_sparsity=0.5),
    "prune globally": lambda w: sparsam.prune({"a": w[:9], "b": w[9:]}, target_sparsity=0.5, scope="global"),
    "random": lambda w: sparsam.prune(w, target_sparsity=0.5, method="random"),
    "pack": SparseMatrix.from_dense,
}


def nan_on_and_off(w: NDArray[Any]) -> None:
    w[-1, -1] = np.nan
    w[-1, -1] = 1.0


def scales(w: NDArray[Any]) -> None:
    np.multiply(w, 1e6, out=w)
    np.multiply(w, 1e-6, out=w)


def zeros_and_numbers(w: NDArray[Any]) -> None:
    w[::2] = 0
    w[::2] = 1.5


@contextmanager
def writer(write: Callable[[NDArray[Any]], None], w: NDArray[Any]) -> Iterator[None]:
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            write(w)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("write", [nan_on_and_off, scales, zeros_and_numbers])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_returns_or_says_what_it_saw(call: str, write: Callable[[NDArray[Any]], None]) -> None:
    w = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    calls = 0
    with writer(write, w):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            calls += 1
            try:
                CALLS[call](w)
            except ValueError as error:
                assert "NaN" in str(error)  # noqa: PT017
    assert calls > 0
    w = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    CALLS[call](w)  # and nothing of that stays behind


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_widths(isa: str, threads: int, dtype: str) -> None:
    w = np.random.default_rng(0).standard_normal((512, 1024)).astype(dtype)
    with writer(scales if dtype == "float64" else nan_on_and_off, w):
        for _ in range(20):
            for call in ("select", "rows", "N:M"):
                try:
                    CALLS[call](w)
                except ValueError as error:
                    assert "NaN" in str(error)  # noqa: PT017


def test_a_nan_that_is_gone_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.ones((4, 4), np.float32)
    monkeypatch.setattr(sparsam._core, "find_nan", lambda _: None)
    w[1, 2] = np.nan
    for call in ("threshold", "select", "rows", "N:M", "block", "each by itself"):
        with pytest.raises(ValueError, match=r"got a NaN that has been overwritten since; stop the thread"):
            CALLS[call](w) if call != "each by itself" else sparsam.select_many({"w": w}, 0.5, scope="layer")
