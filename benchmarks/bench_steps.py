"""A transformer's block in one call, beside its steps one by one: `pytest benchmarks/bench_steps.py`.

BERT's block with the sizes of MiniLM (384 columns, 12 heads, 1536 in between), 80 % of the weights zero, int8
values, sequences of full length. "separate calls" is each step as a call of its own, with nothing in between;
both have the same bits. SPARSAM_BENCH_MAX caps the number of rows, for CI.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import sparsam
from sparsam._core import Packed, Steps
from sparsam.sparse.packing import pack

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "100_000_000"))
WIDTH, HEADS, INNER, SPARSITY = 384, 12, 1536, 0.8
WIDTHS = [WIDTH] * 7 + [INNER] + [WIDTH] * 2
INPUT, OUTPUT = 0, 9

Matrix = NDArray[np.float32]


def random(*shape: int, seed: int) -> Matrix:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def packed(rows: int, cols: int, seed: int) -> Packed:
    w = random(rows, cols, seed=seed) * np.float32(2 * cols**-0.5)
    weight = pack(sparsam.select(w, SPARSITY).apply(w), "int8", None, None)
    weight.add("slots")
    return weight


@cache
def block() -> tuple[tuple[Any, ...], ...]:
    def linear(rows: int, cols: int, x: int, y: int, bias: int, activation: str = "") -> tuple[Any, ...]:
        return ("linear", packed(rows, cols, y), "slots", x, y, bias, activation)

    return (
        linear(WIDTH, WIDTH, 0, 1, 0),
        linear(WIDTH, WIDTH, 0, 2, 1),
        linear(WIDTH, WIDTH, 0, 3, 2),
        ("attention", 1, 2, 3, 4, HEADS, (WIDTH / HEADS) ** -0.5, 0),
        linear(WIDTH, WIDTH, 4, 5, 3),
        ("add_layer_norm", 5, 0, -1, 6, 5, 6, 1e-12),
        linear(INNER, WIDTH, 6, 7, 4, "gelu"),
        linear(WIDTH, INNER, 7, 8, 7),
        ("add_layer_norm", 8, 6, -1, 9, 8, 9, 1e-12),
    )


@cache
def tensors() -> list[Matrix]:
    return [random(n, seed=20 + i) for i, n in enumerate([WIDTH] * 4 + [INNER] + [WIDTH] * 5)]


class Calls:
    """The block of one shape, on buffers that are made once."""

    def __init__(self, sequences: int, positions: int) -> None:
        self.shape = sequences, positions
        self.buffers = [np.zeros((sequences * positions, width), np.float32) for width in WIDTHS]
        self.buffers[INPUT][:] = random(sequences * positions, WIDTH, seed=1)
        self.addresses = [buffer.ctypes.data for buffer in self.buffers]
        self.vectors = [vector.ctypes.data for vector in tensors()]
        self.whole = Steps(WIDTHS, block())
        self.steps = [Steps(WIDTHS, [step]) for step in block()]
        self.scratch = np.zeros(
            max(steps.scratch(*self.shape) for steps in (self.whole, *self.steps)), np.float32
        )

    def call(self, steps: Steps, given: list[tuple[int, int]]) -> None:
        steps.run(*self.shape, given, self.vectors, None, self.scratch.ctypes.data, self.scratch.size)

    def one_call(self) -> Matrix:
        self.call(self.whole, [(i, self.addresses[i]) for i in (INPUT, OUTPUT)])
        return self.buffers[OUTPUT]

    def separate_calls(self) -> Matrix:
        given = list(enumerate(self.addresses))
        for steps in self.steps:
            self.call(steps, given)
        return self.buffers[OUTPUT]


@pytest.mark.parametrize("shape", [(1, 16), (8, 64), (32, 128)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("who", ["one call", "separate calls"])
def test_block(benchmark: BenchmarkFixture, shape: tuple[int, int], who: str) -> None:
    calls = Calls(max(1, min(shape[0], LIMIT // shape[1])), shape[1])
    functions: dict[str, Callable[[], Matrix]] = {
        "one call": calls.one_call,
        "separate calls": calls.separate_calls,
    }
    benchmark.group = f"block {calls.shape[0]}x{calls.shape[1]}"
    benchmark.extra_info.update(isa=sparsam.isa(), threads=sparsam.num_threads(), values="int8")
    wanted = calls.separate_calls().copy()
    calls.buffers[OUTPUT][:] = np.nan
    found = benchmark(functions[who])
    assert np.isfinite(found).all()
    assert np.array_equal(found, wanted)
