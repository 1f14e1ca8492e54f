"""All products of the blocks of SmolLM2-135M for one token: our int4 beside llama.cpp's Q4_0, as Markdown.

    pip install xllamacpp gguf
    python benchmarks/models/smollm2_products.py

Random weights in the 210 shapes of its linear layers, one row of x, one product after the other; results are
checked. Each contender multiplies `--tokens` times in turn, as decoding does, the first two not counted, and
so several times over. What llama.cpp is built for stands in the first line: wheels are for AVX2, so
`--isa avx2` compares like with like.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _llama import Ggml
from numpy.typing import NDArray

import sparsam
from sparsam import NM, SparseMatrix, Unstructured, bench
from sparsam._core import Packed

BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = 30 * BLOCK


PATTERNS: dict[str, tuple[float, NM | Unstructured]] = {
    "no zeros": (0.0, Unstructured()),
    "50 %": (0.5, Unstructured()),
    "80 %": (0.8, Unstructured()),
    "8:16": (0.5, NM(8, 16)),
    "4:16": (0.75, NM(4, 16)),
}


def pruned(w: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The weight with the zeros of a pattern."""
    return w * sparsam.select(w, *PATTERNS[name]).to_array()


def ours(
    weights: dict[tuple[int, int], NDArray[np.float32]],
    x: dict[int, NDArray[np.float32]],
    pattern: str,
    values: Any,
) -> tuple[Callable[[], object], int]:
    """All products with weights of ours, each in memory of its own, and their bytes."""
    packed = {}
    for shape in sorted(set(SHAPES)):
        matrix = SparseMatrix.from_dense(pruned(weights[shape], pattern), **values)
        right = x[shape[1]] @ matrix.to_dense().T
        assert np.abs(matrix.linear(x[shape[1]]) - right).max() < 0.03 * np.abs(right).max()
        packed[shape] = matrix._state.forms.readable()
    parts = []
    for shape in SHAPES:
        (form,) = packed[shape].forms
        copy = Packed.from_buffers([packed[shape].buffer(form).copy()], trusted=True)
        parts.append((SparseMatrix(copy), x[shape[1]][None]))

    def run() -> None:
        for matrix, row in parts:
            matrix.linear(row)

    return run, sum(matrix.nbytes for matrix, _ in parts)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=sparsam.available_isas(), default=sparsam.isa())
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = {shape: rng.standard_normal(shape).astype(np.float32) for shape in sorted(set(SHAPES))}
    x = {cols: rng.standard_normal(cols).astype(np.float32) for cols in (576, 1536)}
    library = Ggml()
    with sparsam.use_isa(options.isa):
        dense = sum(rows * cols for rows, cols in SHAPES)
        llama = library.products([weights[shape] for shape in SHAPES], x, sparsam.num_threads())
        runs: dict[str, tuple[Callable[[], object], int]] = {"llama.cpp, Q4_0": (llama, dense * 18 // 32)}
        for name in PATTERNS:
            runs[f"int4, {name}"] = ours(weights, x, name, {"dtype": "int4", "group": 64})
        runs["int8, 50 %"] = ours(weights, x, "50 %", {"dtype": "int8"})
        runs["int8, 8:16"] = ours(weights, x, "8:16", {"dtype": "int8"})
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, (run, _) in runs.items():
                for token in range(options.tokens):
                    start = time.perf_counter()
                    run()
                    if token >= 2:  # the caches hold what this contender reads
                        times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{bench.machine()}; ours: {options.isa}; llama.cpp built for {', '.join(library.features)}\n")
    header = ("", "bits per weight", "ms per token, median", "least", "times the speed of Q4_0")
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = next(iter(medians.values()))
    for name, (_, size) in runs.items():
        cells = f"{8 * size / dense:.2f} | {medians[name]:.2f} | {min(times[name]):.2f}"
        print(f"| {name} | {cells} | {first / medians[name]:.2f} |")


if __name__ == "__main__":
    main()
