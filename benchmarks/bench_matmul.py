"""Products with pruned matrices, and what else computes them: `pytest benchmarks/bench_matmul.py`.

One group per shape, sparsity and batch; dense products of NumPy and PyTorch and the CSR products of SciPy,
PyTorch (MKL) and sparse_dot_mkl are in the same group where installed. x and y are float32, (batch, in) and
(batch, out) in C order; the CSR peers get x and give y transposed, as suits them, nothing converted. Every
benchmark asserts its result. extra_info has the GFLOP/s of the nonzero weights, the bytes of weights, x and
y, and the fraction of the roofline: what share of the time the arithmetic alone, or reading as many bytes
alone, takes at the best that this machine was seen to do in the same run.

SPARSAM_BENCH_MAX caps the number of weights, for CI. SPARSAM_DLMC names a folder of *.smtx patterns.
"""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import sparsam
from sparsam import SparseMatrix, bench
from sparsam.sparse.calibration import fastest, wait_for_idle_threads

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "100_000_000"))
DLMC = os.environ.get("SPARSAM_DLMC", "")
COLD = 8

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
# (out, in), batch
PROBLEMS = (
    *(((3072, 768), batch) for batch in (1, 8, 128, 512)),
    ((768, 3072), 512),
    *(((4096, 4096), batch) for batch in (1, 16, 128)),
    *((shape, batch) for shape in ((384, 384), (1536, 384), (384, 1536)) for batch in (32, 4096)),
)
PEERS = ("sparsam", "sparsam avx2", "numpy", "torch", "scipy csr", "torch csr", "sparse_dot_mkl")

Matrix = NDArray[np.float32]
Product = Callable[[], Matrix]


def capped(shape: tuple[int, int], batch: int) -> tuple[tuple[int, int], int]:
    """The problem, with sides halved until the weights are few enough."""
    rows, cols = shape
    while rows * cols > LIMIT and rows * cols > 1:
        rows, cols, batch = max(rows // 2, 1), max(cols // 2, 1), max(batch // 2, 1)
    return (rows, cols), batch


@cache
def pruned(shape: tuple[int, int], sparsity: float) -> Matrix:
    (problem,) = bench.random_problems([shape], [sparsity])
    return problem.make()


def inputs(batch: int, cols: int) -> Matrix:
    return np.random.default_rng(1).standard_normal((batch, cols), dtype=np.float32)


@cache
def peak_gflops() -> float:
    """The most arithmetic per second that a dense matrix gets, by BLAS or by a kernel of ours."""
    w, x = pruned((512, 512), 0.0), inputs(512, 512)
    y, matrix = np.empty_like(x), SparseMatrix.from_dense(w)
    matrix.prepare(512, kernel="panels")
    wait_for_idle_threads()
    seconds = min(fastest(lambda: matrix.linear(x, out=y)), fastest(lambda: np.dot(x, w.T, out=y)))
    return 2e-9 * w.size * 512 / seconds


@cache
def gigabytes_per_second(size: int) -> float:
    """What reading that many bytes over and over gets, from the cache that they fit in."""
    v = np.ones(max(size // 4, 1), np.float32)
    return 1e-9 * v.nbytes / fastest(lambda: np.vdot(v, v))


def run(
    benchmark: BenchmarkFixture, group: str, products: Sequence[Product], w: Matrix, x: Matrix, size: int
) -> None:
    """Times the products in turn, checks the first, and notes what it was."""
    work = 2e-9 * np.count_nonzero(w) * len(x)
    bytes_read = size + x.nbytes + 4 * len(x) * len(w)
    bound = max(work / peak_gflops(), 1e-9 * bytes_read / gigabytes_per_second(bytes_read))
    expected, error = x @ w.T, np.abs(x) @ np.abs(w.T)
    assert (np.abs(products[0]() - expected) <= w.shape[1] * np.finfo(np.float32).eps * error).all()
    benchmark.group = group
    turn = itertools.cycle(products)

    def product() -> Matrix:
        return next(turn)()

    wait_for_idle_threads()  # those of the products above
    rounds = int(min(200, max(5, 0.3 / fastest(products[0], warm_up=0.0, seconds=0.0))))
    pedantic: Callable[..., Any] = benchmark.pedantic
    pedantic(product, rounds=rounds, warmup_rounds=len(products), iterations=1)
    median = benchmark.stats.stats.median if benchmark.stats else bound
    benchmark.extra_info.update(
        isa=sparsam.isa(),
        threads=sparsam.num_threads(),
        machine=bench.machine(),
        nonzero=int(np.count_nonzero(w)),
        bytes=bytes_read,
        gflops=round(work / median, 2),
        roofline=round(bound / median, 3),
    )


def peer_products(peer: str, ws: Sequence[Matrix], x: Matrix) -> tuple[list[Product], int]:
    """The products of a peer with each of the matrices, and the bytes of one matrix as the peer holds it."""
    if peer == "numpy":
        return [partial(np.matmul, x, w.T) for w in ws], ws[0].nbytes
    xt = np.ascontiguousarray(x.T)
    if "torch" in peer:
        torch = pytest.importorskip("torch")
        tx, txt = torch.from_numpy(x), torch.from_numpy(xt)
        held = [torch.from_numpy(w) for w in ws]
        if peer == "torch":
            return [partial(_torch_linear, torch.nn.functional.linear, tx, w) for w in held], ws[0].nbytes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CSR tensors are in beta, it says
            csr = [w.to_sparse_csr() for w in held]
        return [partial(_transposed, torch.matmul, w, txt) for w in csr], csr_bytes(ws[0], 8)
    scipy = pytest.importorskip("scipy.sparse")
    if peer == "scipy csr":
        product, held = operator.matmul, [scipy.csr_array(w) for w in ws]
    else:
        product = pytest.importorskip("sparse_dot_mkl", exc_type=ImportError).dot_product_mkl
        held = [scipy.csr_matrix(w) for w in ws]
    return [partial(_transposed, product, w, xt) for w in held], csr_bytes(ws[0], 4)


def _torch_linear(linear: Any, x: Any, w: Any) -> Matrix:
    y: Matrix = linear(x, w).numpy()
    return y


def _transposed(product: Any, w: Any, x: Any) -> Matrix:
    y: Matrix = np.asarray(product(w, x)).T
    return y


def csr_bytes(w: Matrix, index: int) -> int:
    return int(np.count_nonzero(w)) * (4 + index) + index * (len(w) + 1)


def ours(w: Matrix, x: Matrix) -> tuple[Product, int, str]:
    matrix = SparseMatrix.from_dense(w)
    matrix.prepare(len(x))
    kernel = matrix.explain(len(x)).kernel
    return lambda: matrix.linear(x), matrix.nbytes, kernel


def compare(benchmark: BenchmarkFixture, group: str, peer: str, ws: Sequence[Matrix], x: Matrix) -> None:
    if not peer.startswith("sparsam"):
        products, size = peer_products(peer, ws, x)
        run(benchmark, group, products, ws[0], x, size)
        return
    isa = peer.split()[1] if " " in peer else sparsam.isa()
    if isa not in sparsam.available_isas():
        pytest.skip(f"this machine has no {isa}")
    with sparsam.use_isa(isa):
        made = [ours(w, x) for w in ws]
        run(benchmark, group, [product for product, _, _ in made], ws[0], x, made[0][1])
    benchmark.extra_info["kernel"] = made[0][2]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(("shape", "batch"), PROBLEMS, ids=lambda v: "x".join(map(str, np.atleast_1d(v))))
def test_random_pattern(
    benchmark: BenchmarkFixture, shape: tuple[int, int], batch: int, sparsity: float, peer: str
) -> None:
    (rows, cols), batch = capped(shape, batch)
    group = f"{rows}x{cols} s={sparsity} n={batch}"
    compare(benchmark, group, peer, [pruned((rows, cols), sparsity)], inputs(batch, cols))


@pytest.mark.parametrize("peer", ["sparsam", "numpy", "torch"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("batch", [1, 4, 8, 16])
def test_cold_weights(benchmark: BenchmarkFixture, batch: int, sparsity: float, peer: str) -> None:
    """Eight matrices in turn, as the layers of a model are: they come from memory."""
    (rows, cols), batch = capped((4096, 4096), batch)
    w = pruned((rows, cols), sparsity)
    copies = [w, *(w.copy() for _ in range(COLD - 1))]
    compare(benchmark, f"cold {rows}x{cols} s={sparsity} n={batch}", peer, copies, inputs(batch, cols))


@pytest.mark.parametrize("peer", ["sparsam", "sparsam avx2", "numpy", "torch"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [(sparsam.NM(2, 4), 0.5), (sparsam.Block(4, 1), 0.8), (sparsam.Block(16, 1), 0.8)],
    ids=["2:4", "4x1", "16x1"],
)
def test_patterns(benchmark: BenchmarkFixture, pattern: Any, sparsity: float, peer: str) -> None:
    (rows, cols), batch = capped((3072, 768), 128)
    dense = pruned((rows, cols), 0.0)
    w = sparsam.select(dense, sparsity, pattern).apply(dense)
    compare(benchmark, f"{rows}x{cols} {pattern} s={sparsity} n={batch}", peer, [w], inputs(batch, cols))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 128])
def test_dtypes(benchmark: BenchmarkFixture, batch: int, dtype: str) -> None:
    (rows, cols), batch = capped((4096, 4096), batch)
    packed = SparseMatrix.from_dense(pruned((rows, cols), 0.8), dtype=np.dtype(dtype))
    w = packed.to_dense().astype(np.float32)
    x = inputs(batch, cols)
    packed.prepare(batch)
    run(
        benchmark,
        f"dtypes {rows}x{cols} s=0.8 n={batch}",
        [lambda: packed.linear(x)],
        w,
        x,
        packed.nbytes,
    )


@pytest.mark.parametrize("what", ["copy", "pack", "unpack"])
def test_packing(benchmark: BenchmarkFixture, what: str) -> None:
    shape, _ = capped((4096, 4096), 1)
    w = pruned(shape, 0.5)
    matrix = SparseMatrix.from_dense(w)
    benchmark.group = f"packing {shape[0]}x{shape[1]} s=0.5"
    benchmark.extra_info.update(isa=sparsam.isa(), threads=sparsam.num_threads(), bytes=w.nbytes)
    pedantic: Callable[..., Any] = benchmark.pedantic
    call = {"copy": w.copy, "pack": lambda: SparseMatrix.from_dense(w), "unpack": matrix.to_dense}[what]
    result = pedantic(call, rounds=10, warmup_rounds=1, iterations=1)
    assert np.array_equal(result.to_dense() if what == "pack" else result, w)


@pytest.mark.skipif(not DLMC, reason="SPARSAM_DLMC names no folder")
@pytest.mark.parametrize("peer", ["sparsam", "numpy", "torch", "scipy csr", "torch csr", "sparse_dot_mkl"])
@pytest.mark.parametrize("name", [problem.name for problem in bench.read_dlmc(Path(DLMC))] if DLMC else [])
def test_pruned_networks(benchmark: BenchmarkFixture, name: str, peer: str) -> None:
    (problem,) = (problem for problem in bench.read_dlmc(Path(DLMC)) if problem.name == name)
    compare(benchmark, f"dlmc {name} n=256", peer, [problem.make()], inputs(256, problem.shape[1]))
