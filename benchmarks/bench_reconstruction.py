"""Weight updates beside plain implementations: `pytest benchmarks/bench_reconstruction.py`.

A layer of 1536 x 1536 with correlated inputs, 70 % pruned. `sweep` times what the column sweep alone takes,
given the factor of the inverse; `obs` a whole call, the factorisation included. Peers are SparseGPT's
algorithm written as its paper has it, with NumPy and with PyTorch, float32. Every benchmark asserts its
result. SPARSAM_BENCH_MAX caps the number of weights, for CI.
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
from sparsam.reconstruction import _obs, admm, obs, reconstruction_error, refit
from sparsam.reconstruction._layer import to_layer

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
    return _obs._inverse_factor(to_layer(w, h, "w"), 0.01)[0].astype(np.float32)


def run(benchmark: BenchmarkFixture, group: str, function: Callable[..., Any], rounds: int) -> Any:
    benchmark.group = f"{group} {SIZE}x{SIZE} s={SPARSITY}"
    benchmark.extra_info.update(isa=sparsam.isa(), threads=sparsam.num_threads(), numpy=np.__version__)
    pedantic: Callable[..., Any] = benchmark.pedantic
    return pedantic(function, rounds=rounds, warmup_rounds=1, iterations=1)


def sweep_sparsam() -> Matrix:
    w, h = layer()
    plain = to_layer(w, h, "w", np.float32)
    choice = _obs._choose_from(plain, SPARSITY, sparsam.Unstructured(), None, "layer")
    result: Matrix = _obs._sweep(plain, factor(), choice, BLOCK)
    return result


def sweep_numpy(upper: Matrix) -> Matrix:
    w = layer()[0].copy()
    for start in range(0, SIZE, BLOCK):
        stop = min(start + BLOCK, SIZE)
        part, triangle = w[:, start:stop].copy(), upper[start:stop, start:stop]
        errors = np.zeros_like(part)
        scores = part**2 / np.diag(triangle) ** 2
        bound = np.sort(scores, axis=None)[min(int(scores.size * SPARSITY), scores.size - 1)]
        pruned = scores <= bound
        for j in range(stop - start):
            left = np.where(pruned[:, j], 0, part[:, j])
            error = (part[:, j] - left) / triangle[j, j]
            part[:, j:] -= np.outer(error, triangle[j, j:])
            errors[:, j] = error
        w[:, start:stop] = np.where(pruned, 0, part)
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def sweep_torch(torch: Any, w: Any, upper: Any) -> Any:
    for start in range(0, SIZE, BLOCK):
        stop = min(start + BLOCK, SIZE)
        part, triangle = w[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        scores = part**2 / torch.diag(triangle) ** 2
        bound = torch.sort(scores.flatten())[0][min(int(scores.numel() * SPARSITY), scores.numel() - 1)]
        pruned = scores <= bound
        for j in range(stop - start):
            left = part[:, j].clone()
            left[pruned[:, j]] = 0
            error = (part[:, j] - left) / triangle[j, j]
            part[:, j:] -= error.unsqueeze(1).matmul(triangle[j, j:].unsqueeze(0))
            errors[:, j] = error
        w[:, start:stop] = torch.where(pruned, 0, part)
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return w


def obs_numpy() -> Matrix:
    h = layer()[1].astype(np.float32)
    h.flat[:: SIZE + 1] += np.float32(0.01 * np.diag(h).mean())
    return sweep_numpy(np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(h)).T))


def obs_torch(torch: Any) -> Matrix:
    h = torch.from_numpy(layer()[1]).float()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result: Matrix = sweep_torch(torch, torch.from_numpy(layer()[0]).clone(), upper).numpy()
    return result


@pytest.mark.parametrize("peer", ["sparsam", "numpy", "torch"])
@pytest.mark.parametrize("what", ["sweep", "obs"])
def test_obs(benchmark: BenchmarkFixture, what: str, peer: str) -> None:
    w, h = layer()
    if peer == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(sparsam.num_threads())
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        ("sweep", "sparsam"): sweep_sparsam,
        ("sweep", "numpy"): lambda: sweep_numpy(factor()),
        ("sweep", "torch"): lambda: sweep_torch(
            torch, torch.from_numpy(w).clone(), torch.from_numpy(factor())
        ).numpy(),
        ("obs", "sparsam"): lambda: obs(w, h, SPARSITY, block=BLOCK).weights,
        ("obs", "numpy"): obs_numpy,
        ("obs", "torch"): lambda: obs_torch(torch),
    }
    result = run(benchmark, what, calls[what, peer], 5 if peer == "sparsam" else 2)
    pruned = result.size - np.count_nonzero(result)
    assert abs(pruned - round(SPARSITY * result.size)) <= (0 if peer == "sparsam" else 2 * SIZE)
    assert reconstruction_error(w, result, h) < magnitude_error()


@pytest.mark.parametrize("method", ["refit", "admm", "admm finds mask"])
def test_least_squares(benchmark: BenchmarkFixture, method: str) -> None:
    w, h = layer()
    mask = sparsam.select(w, SPARSITY)
    best = reconstruction_error(w, refit(w, h, mask), h)
    calls: dict[str, Callable[[], Any]] = {
        "refit": lambda: refit(w, h, mask),
        "admm": lambda: admm(w, h, mask).weights,
        "admm finds mask": lambda: admm(w, h, sparsity=SPARSITY).weights,
    }
    result = run(benchmark, "least squares", calls[method], 2)
    assert np.count_nonzero(result) == mask.count
    assert reconstruction_error(w, result, h) <= 1.01 * best
