"""Selection against NumPy and PyTorch: `pytest benchmarks/bench_selection.py`.

One group per array size and sparsity, peers in the same group; `x.sum()` stands for one plain read of the
data. Every benchmark asserts its result. SPARSAM_BENCH_MAX caps the number of elements, for CI.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import sparsam
from cases import CASES, make
from reference import select_rows

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "50_000_000"))
SIZES = sorted({min(n, LIMIT) for n in (10_000, 1_000_000, 50_000_000)})
SPARSITIES = (0.5, 0.8, 0.9, 0.99)
ADVERSARIAL = [
    "normal",
    "constant",
    "two values",
    "all equal but one",
    "sorted",
    "reversed",
    "powers of two",
    "denormals",
    "one huge outlier",
    "99 % zeros",
]


@pytest.fixture(scope="module", params=SIZES)
def normal(request: pytest.FixtureRequest) -> NDArray[np.float32]:
    x: NDArray[np.float32] = np.random.default_rng(0).standard_normal(request.param, dtype=np.float32)
    return x


def run(
    benchmark: BenchmarkFixture, group: str, x: NDArray[Any], function: Callable[..., Any], **options: Any
) -> Any:
    benchmark.group = group
    benchmark.extra_info.update(
        isa=sparsam.isa(), threads=sparsam.num_threads(), numpy=np.__version__, bytes=x.nbytes
    )
    rounds = 5 if x.size > 5_000_000 else 30 if x.size > 50_000 else 300
    pedantic: Callable[..., Any] = benchmark.pedantic
    return pedantic(function, rounds=rounds, warmup_rounds=1, iterations=1, **options)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(
    "peer", ["sparsam", "sparsam avx2", "numpy sum", "numpy partition", "torch kthvalue"]
)
def test_threshold(
    benchmark: BenchmarkFixture, normal: NDArray[np.float32], peer: str, sparsity: float
) -> None:
    k = round(sparsity * normal.size)
    group = f"threshold n={normal.size} s={sparsity}"
    expected = np.partition(np.abs(normal), k - 1)[k - 1]
    if peer == "numpy sum":
        assert run(benchmark, group, normal, normal.sum) == normal.sum()
    elif peer == "numpy partition":
        result = run(benchmark, group, normal, lambda: np.partition(np.abs(normal), k - 1)[k - 1])
        assert result == expected
    elif peer == "torch kthvalue":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(normal)
        assert run(benchmark, group, normal, lambda: tensor.abs().kthvalue(k).values).item() == expected
    else:
        isa = peer.split()[1] if " " in peer else sparsam.isa()
        if isa not in sparsam.available_isas():
            pytest.skip(f"this machine has no {isa}")
        with sparsam.use_isa(isa):
            assert (
                run(benchmark, group, normal, lambda: sparsam.threshold(normal, sparsity)).value == expected
            )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_prune_in_place(benchmark: BenchmarkFixture, normal: NDArray[np.float32], sparsity: float) -> None:
    """Threshold, mask and zeroed weights, in place; fresh weights in every round."""
    x = np.empty_like(normal)

    def setup() -> None:
        np.copyto(x, normal)

    masks = run(
        benchmark, f"threshold n={normal.size} s={sparsity}", x,
        lambda: sparsam.select_many({"w": x}, sparsity, out={"w": x}), setup=setup,
    )  # fmt: skip
    assert masks["w"].count == np.count_nonzero(x) == x.size - round(sparsity * x.size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_per_byte(benchmark: BenchmarkFixture, dtype: str) -> None:
    n = min(LIMIT, 100_000_000 // make("normal", 1, dtype).itemsize)
    x = make("normal", n, dtype)
    t = run(benchmark, "threshold by dtype, 100 MB", x, lambda: sparsam.threshold(x, 0.8))
    assert t.below < t.k <= t.below + t.equal


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("task", ["threshold", "prune"])
def test_adversarial(benchmark: BenchmarkFixture, task: str, case: str) -> None:
    assert case in CASES
    x = make(case, min(LIMIT, 20_000_000), "float32")
    out = np.empty_like(x)
    if task == "threshold":
        t = run(benchmark, "adversarial threshold", x, lambda: sparsam.threshold(x, 0.8))
        assert t.below < t.k <= t.below + t.equal
    else:
        masks = run(
            benchmark, "adversarial prune", x, lambda: sparsam.select_many({"w": x}, 0.8, out={"w": out})
        )
        assert masks["w"].count == x.size - round(0.8 * x.size)


@pytest.mark.parametrize("tensors", [1, 200])
def test_global_over_many_tensors(benchmark: BenchmarkFixture, tensors: int) -> None:
    """One pool of 200 tensors, from 300 to half a million elements, beside one array of the same total."""
    rng = np.random.default_rng(0)
    sizes = (10 ** rng.uniform(2.5, 5.7, 200)).astype(int) if LIMIT > 1_000_000 else np.full(200, 50)
    x = rng.standard_normal(sizes.sum(), dtype=np.float32)
    parts = np.split(x, np.cumsum(sizes)[:-1]) if tensors == 200 else [x]
    t = run(benchmark, f"global, {x.size} elements", x, lambda: sparsam.threshold(parts, 0.8))
    assert t == sparsam.threshold(x, 0.8)


@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 4096), (3072, 768)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("peer", ["sparsam", "numpy argpartition", "numpy partition", "numpy sort"])
def test_rows(benchmark: BenchmarkFixture, shape: tuple[int, int], dtype: str, peer: str) -> None:
    """Half of each row, as Wanda prunes; the peers stop at an order or a threshold, sparsam at the mask."""
    if dtype == "bfloat16" and peer != "sparsam":
        pytest.skip("NumPy sorts no bfloat16 faster than object by object")
    cols = min(shape[1], LIMIT)
    rows = max(1, min(shape[0], LIMIT // cols))
    x = make("normal", rows * cols, dtype).reshape(rows, cols)
    group, k = f"half of each row, {rows}x{cols} {dtype}", round(0.5 * cols)
    kept = select_rows(x, 0.5)
    if peer == "sparsam":
        mask = run(benchmark, group, x, lambda: sparsam.select(x, 0.5, scope="row"))
        assert np.array_equal(mask.to_array(), kept)
    elif peer == "numpy argpartition":
        order = run(benchmark, group, x, lambda: np.argpartition(np.abs(x), k - 1, axis=1))
        pruned = np.ones(x.shape, np.bool_)
        np.put_along_axis(pruned, order[:, :k], False, axis=1)
        ties = np.take_along_axis(np.abs(x), order[:, k - 1 : k], axis=1) == np.abs(x)
        assert np.array_equal(pruned | ties, kept | ties)
    else:
        function = np.sort if peer == "numpy sort" else lambda a, axis: np.partition(a, k - 1, axis=axis)
        values = run(benchmark, group, x, lambda: function(np.abs(x), axis=1))
        assert ((np.abs(x) < values[:, k - 1 : k]) <= ~kept).all()


@pytest.mark.parametrize("peer", ["select", "select and copy", "prune in place", "prune"])
def test_prune_beside_select(benchmark: BenchmarkFixture, peer: str) -> None:
    """One matrix; "select and copy" is the least that new weights cost: a mask, and memory written once."""
    side = min(2048, math.isqrt(LIMIT))
    normal = make("normal", side * side, "float32").reshape(side, side)
    x = normal.copy()
    functions: dict[str, Callable[[], Any]] = {
        "select": lambda: sparsam.select(x, 0.8),
        "select and copy": lambda: (sparsam.select(x, 0.8), x.copy())[0],
        "prune in place": lambda: sparsam.prune(x, target_sparsity=0.8, inplace=True).masks,
        "prune": lambda: sparsam.prune(x, target_sparsity=0.8).masks,
    }
    mask = run(
        benchmark, f"prune and select {side}x{side}", x, functions[peer], setup=lambda: np.copyto(x, normal)
    )
    assert mask == sparsam.select(normal, 0.8)


@pytest.mark.parametrize("tensors", ["10,000 of 16x16", "560 with 560 overrides"])
@pytest.mark.parametrize("peer", ["sparsam", "numpy loop"])
def test_many_small_tensors(benchmark: BenchmarkFixture, tensors: str, peer: str) -> None:
    """`prune` beside a loop that makes the same: np.partition, a mask and the pruned array of each tensor."""
    count, side = (min(10_000, LIMIT // 256), 16) if tensors.startswith("10") else (560, 64)
    x = np.random.default_rng(0).standard_normal((count, side, side), dtype=np.float32)
    weights = {f"layers.{i}.weight": w for i, w in enumerate(x)}
    shares = np.linspace(0.3, 0.8, count) if count == 560 else np.full(count, 0.5)
    sparsities = dict(zip(weights, shares.tolist(), strict=True))
    options: dict[str, Any] = {"overrides": sparsities} if count == 560 else {"target_sparsity": 0.5}

    def loop() -> dict[str, NDArray[np.float32]]:
        pruned = {}
        for name, w in weights.items():
            k = round(sparsities[name] * w.size)
            magnitudes = np.abs(w)
            pruned[name] = w * (magnitudes > np.partition(magnitudes.ravel(), k - 1)[k - 1])
        return pruned

    expected = loop()
    function = loop if peer == "numpy loop" else lambda: sparsam.prune(weights, **options).weights
    benchmark.extra_info["tensors"] = count
    result = run(benchmark, f"many small tensors: {tensors}", x, function)
    assert all(np.array_equal(result[name], expected[name]) for name in weights)
