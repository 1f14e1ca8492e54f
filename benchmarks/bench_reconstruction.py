"""Weight updates beside plain implementations: `pytest benchmarks/bench_reconstruction.py`.

A layer of 1536 x 1536 with correlated inputs, 70 % pruned. `obs` is a whole call, from second moments to
weights; `columns` is the column sweep alone, for a given mask and factor, without the products between
blocks. Peers are SparseGPT's algorithm written as its paper has it, with NumPy and with PyTorch, float32.
Every benchmark asserts its result. SPARSAM_BENCH_MAX caps the number of weights, for CI.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import sparsam
from sparsam import _core
from sparsam.reconstruction import admm, admm_mask, column_sweep, obs, reconstruction_error, refit
from sparsam.reconstruction.layer_problem import to_layer

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "100_000_000"))
SIZE = min(1536, math.isqrt(LIMIT))
SPARSITY, BLOCK = 0.7, 128

Matrix = NDArray[np.float32]


@cache
def layer() -> tuple[Matrix, NDArray[np.float64]]:
    """Weights, and the second moments of inputs that share directions of falling strength."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((SIZE, SIZE)) * np.exp(-np.arange(SIZE) / (SIZE / 5))[:, None]
    x = rng.standard_normal((2 * SIZE, SIZE)) @ shared + 0.1 * rng.standard_normal((2 * SIZE, SIZE))
    return rng.standard_normal((SIZE, SIZE), dtype=np.float32), x.T @ x


@cache
def magnitude_error() -> float:
    w, h = layer()
    return reconstruction_error(w, sparsam.select(w, SPARSITY).apply(w), h)


@cache
def factor() -> Matrix:
    w, h = layer()
    found: Matrix = column_sweep.inverse_factor(to_layer(w, h, "w"), 0.01)[0].astype(np.float32)
    return found


def run(
    benchmark: BenchmarkFixture, group: str, function: Callable[..., Any], rounds: int, **options: Any
) -> Any:
    benchmark.group = f"{group} {SIZE}x{SIZE} s={SPARSITY}"
    benchmark.extra_info.update(isa=sparsam.isa(), threads=sparsam.num_threads(), numpy=np.__version__)
    pedantic: Callable[..., Any] = benchmark.pedantic
    return pedantic(function, rounds=rounds, warmup_rounds=1, iterations=1, **options)


def columns_sparsam(w: Matrix, upper: Matrix, keep: NDArray[np.bool_]) -> Matrix:
    errors = np.empty_like(w)
    for start in range(0, SIZE, BLOCK):
        _core.sweep(w, upper, keep, errors, start, min(BLOCK, SIZE - start), 0, 0)
    return w


def columns_numpy(w: Matrix, upper: Matrix, pruned: NDArray[np.bool_], errors: Matrix) -> None:
    """One block of columns, in place."""
    for j in range(w.shape[1]):
        left = np.where(pruned[:, j], 0, w[:, j])
        errors[:, j] = (w[:, j] - left) / upper[j, j]
        w[:, j:] -= np.outer(errors[:, j], upper[j, j:])
    w[pruned] = 0


def columns_torch(w: Any, upper: Any, pruned: Any, errors: Any) -> None:
    for j in range(w.shape[1]):
        left = w[:, j].clone()
        left[pruned[:, j]] = 0
        errors[:, j] = (w[:, j] - left) / upper[j, j]
        w[:, j:] -= errors[:, j].unsqueeze(1).matmul(upper[j, j:].unsqueeze(0))
    w[pruned] = 0


def all_columns(
    w: Any, upper: Any, pruned: Any, empty_like: Callable[[Any], Any], columns: Callable[..., None]
) -> Any:
    """The columns of every block for a given mask, without what blocks owe to one another."""
    for start in range(0, SIZE, BLOCK):
        block = slice(start, min(start + BLOCK, SIZE))
        part = w[:, block]
        columns(part, upper[block, block], pruned[:, block], empty_like(part))
    return w


def sweep_numpy(w: Matrix, upper: Matrix) -> Matrix:
    for start in range(0, SIZE, BLOCK):
        stop = min(start + BLOCK, SIZE)
        part, triangle = w[:, start:stop], upper[start:stop, start:stop]
        scores = part**2 / np.diag(triangle) ** 2
        bound = np.sort(scores, axis=None)[min(int(scores.size * SPARSITY), scores.size - 1)]
        errors = np.empty_like(part)
        columns_numpy(part, triangle, scores <= bound, errors)
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def sweep_torch(torch: Any, w: Any, upper: Any) -> Any:
    for start in range(0, SIZE, BLOCK):
        stop = min(start + BLOCK, SIZE)
        part, triangle = w[:, start:stop], upper[start:stop, start:stop]
        scores = part**2 / torch.diag(triangle) ** 2
        bound = torch.sort(scores.flatten())[0][min(int(scores.numel() * SPARSITY), scores.numel() - 1)]
        errors = torch.empty_like(part)
        columns_torch(part, triangle, scores <= bound, errors)
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return w


def obs_numpy() -> Matrix:
    h = layer()[1].astype(np.float32)
    h.flat[:: SIZE + 1] += np.float32(0.01 * np.diag(h).mean())
    return sweep_numpy(layer()[0].copy(), np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(h)).T))


def obs_torch(torch: Any) -> Matrix:
    h = torch.from_numpy(layer()[1]).float()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result: Matrix = sweep_torch(torch, torch.from_numpy(layer()[0]).clone(), upper).numpy()
    return result


@pytest.mark.parametrize("peer", ["sparsam", "numpy", "torch"])
def test_columns(benchmark: BenchmarkFixture, peer: str) -> None:
    w, upper = layer()[0], factor()
    keep = sparsam.select(w, SPARSITY).to_array()
    pruned = ~keep
    expected = columns_sparsam(w.copy(), upper, keep)
    calls: dict[str, Callable[[Matrix], Any]] = {
        "sparsam": lambda w: columns_sparsam(w, upper, keep),
        "numpy": lambda w: all_columns(w, upper, pruned, np.empty_like, columns_numpy),
    }
    if peer == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(sparsam.num_threads())
        given = torch.from_numpy(upper), torch.from_numpy(pruned)
        calls["torch"] = lambda w: all_columns(
            torch.from_numpy(w), *given, torch.empty_like, columns_torch
        ).numpy()
    result = run(benchmark, "columns", calls[peer], 5, setup=lambda: ((w.copy(),), {}))
    assert np.allclose(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("peer", ["sparsam", "numpy", "torch"])
def test_obs(benchmark: BenchmarkFixture, peer: str) -> None:
    w, h = layer()
    calls: dict[str, Callable[[], Any]] = {
        "sparsam": lambda: obs(w, h, sparsity=SPARSITY, block=BLOCK).weights,
        "numpy": obs_numpy,
    }
    if peer == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(sparsam.num_threads())
        calls["torch"] = lambda: obs_torch(torch)
    result = run(benchmark, "obs", calls[peer], 5)
    pruned = result.size - np.count_nonzero(result)
    assert abs(pruned - round(SPARSITY * result.size)) <= (0 if peer == "sparsam" else 2 * SIZE)
    assert reconstruction_error(w, result, h) < magnitude_error()


@pytest.mark.parametrize("method", ["refit", "admm", "admm finds mask", "admm_mask, refit"])
def test_least_squares(benchmark: BenchmarkFixture, method: str) -> None:
    w, h = layer()
    mask = sparsam.select(w, SPARSITY)
    best = reconstruction_error(w, refit(w, h, mask), h)
    calls: dict[str, Callable[[], Any]] = {
        "refit": lambda: refit(w, h, mask),
        "admm": lambda: admm(w, h, mask).weights,
        "admm finds mask": lambda: admm(w, h, sparsity=SPARSITY).weights,
        "admm_mask, refit": lambda: refit(w, h, admm_mask(w, h, sparsity=SPARSITY)),
    }
    result = run(benchmark, "least squares", calls[method], 2)
    assert np.count_nonzero(result) == mask.count
    assert reconstruction_error(w, result, h) <= 1.01 * best
