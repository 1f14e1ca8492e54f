"""Packed torch layers: calls, threads shared with torch, convolutions: `pytest benchmarks/bench_torch.py`.

*Call*: a layer so small that its product takes next to nothing, by the kernel alone, by a packed layer, by
the registered operator (what torch.compile and autograd see), and by `torch.nn.Linear`. *Turns*: dense torch
and sparse products in turn, beside both alone, in processes that import torch before sparsam and after it;
extra_info has the milliseconds of each and `turns_over_alone`, 1.0 where taking turns costs nothing.
*Convolutions*: beside torch's. *First calls*: with a batch size that a matrix or layer has not met, beside
the second call with it; the first should take at most 3 times as long.
Every benchmark asserts its result. SPARSAM_BENCH_MAX caps the number of weights, for CI.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import sparsam
import sparsam.torch
import torch
from sparsam import bench
from sparsam.torch import pack

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "100_000_000"))


def pruned(layer: Any, sparsity: float) -> Any:
    """The layer, the smallest of each of its weights zeroed."""
    weights = {name: weight.detach().numpy() for name, weight in layer.named_parameters() if "weight" in name}
    sparsam.prune(weights, target_sparsity=sparsity, inplace=True)
    return layer


def side(size: int, power: int) -> int:
    """The size, halved until size ** power weights are few enough."""
    while size**power > LIMIT and size > 1:
        size //= 2
    return size


def run(
    benchmark: BenchmarkFixture, group: str, call: Callable[[], Any], expected: Any, **options: int
) -> None:
    benchmark.group = group
    benchmark.extra_info.update(machine=bench.machine(), torch_threads=torch.get_num_threads())
    pedantic: Callable[..., Any] = benchmark.pedantic
    with torch.inference_mode():
        result = pedantic(call, warmup_rounds=5, **options)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["kernel", "packed", "operator", "Linear"])
@pytest.mark.parametrize("batch", [1, 16])
def test_call(benchmark: BenchmarkFixture, batch: int, what: str) -> None:
    """What the layer adds to the kernel; on one thread, so that waking another is not measured."""
    linear = pruned(torch.nn.Linear(side(64, 2), side(32, 2)), 0.8)
    layer: Any = pack(copy.deepcopy(linear), batches=[batch])
    x, threads = torch.randn(batch, linear.in_features), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            expected = linear(x)
            layer(x)
        kernel = layer.weight.packed.kernel(batch)
        out, part, bias = torch.empty_like(expected), layer.weight.packed.parts[0], layer.bias
        assert bias is not None

        def alone() -> Any:
            part.linear_at(kernel, x.data_ptr(), False, batch, bias.data_ptr(), "", out.data_ptr())
            return out

        operator, data, outs = torch.ops.sparsam.linear, layer.weight.packed_data, len(layer.weight)
        calls = {
            "kernel": alone,
            "packed": lambda: layer(x),
            "operator": lambda: operator(x, data, bias, outs, ""),
            "Linear": lambda: linear(x),
        }
        benchmark.extra_info["kernel"] = kernel
        run(benchmark, f"call, batch {batch}", calls[what], expected, rounds=200, iterations=50)
    finally:
        torch.set_num_threads(threads)


TURNS = """
import copy, json, statistics, sys, time
if sys.argv[1] == "first":
    import torch
import sparsam
import numpy as np
w = np.random.default_rng(0).standard_normal((int(sys.argv[2]),) * 2, dtype=np.float32)
w = sparsam.prune(w, target_sparsity=0.8).weights
sparsam.SparseMatrix.from_dense(w).linear(w[:8])  # the core runs before torch is there
import torch
import sparsam.torch
torch.set_num_threads(2)
linear = torch.nn.Linear(w.shape[1], w.shape[0])
with torch.inference_mode():
    linear.weight.copy_(torch.from_numpy(w))
x = torch.randn(int(sys.argv[3]), w.shape[1])
layer = sparsam.torch.pack(copy.deepcopy(linear), batches=[len(x)])
calls = 20

def dense():
    for _ in range(calls):
        linear(x)

def sparse():
    for _ in range(calls):
        layer(x)

def turns():
    for _ in range(calls):
        linear(x)
        layer(x)

taken = {run.__name__: [] for run in (dense, sparse, turns)}
with torch.inference_mode():
    assert torch.allclose(linear(x), layer(x), rtol=1e-4, atol=1e-4)
    for _ in range(int(sys.argv[4])):
        for run in (dense, sparse, turns):
            run()  # what ran before may still spin
            start = time.perf_counter()
            run()
            taken[run.__name__].append(time.perf_counter() - start)
found = {name: 1e3 * statistics.median(times) / calls for name, times in taken.items()}
found["least"] = {name: 1e3 * min(times) / calls for name, times in taken.items()}
print(json.dumps(found | {"threads": sparsam.num_threads(), "kernel": "/".join(layer.weight.packed.forms)}))
"""


@pytest.mark.parametrize("torch_is_imported", ["first", "last"])
@pytest.mark.parametrize("batch", [8, 128])
def test_turns(benchmark: BenchmarkFixture, batch: int, torch_is_imported: str) -> None:
    """One pool of threads: turns take what both take alone. Times are the process's own, in extra_info."""
    size = side(768, 2)
    rounds = "15" if size == 768 else "2"
    command = [sys.executable, "-c", TURNS, torch_is_imported, str(size), str(batch), rounds]

    def start() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    benchmark.group = f"turns {size}x{size} s=0.8 n={batch}, the process"
    pedantic: Callable[..., Any] = benchmark.pedantic
    found = pedantic(start, rounds=1)
    assert found["threads"] == 2
    least = found["least"]
    benchmark.extra_info.update(
        found,
        machine=bench.machine(),
        turns_over_alone=round(found["turns"] / (found["dense"] + found["sparse"]), 3),
        least_turns_over_alone=round(least["turns"] / (least["dense"] + least["sparse"]), 3),
    )


@pytest.mark.parametrize("call", ["first", "second"])
@pytest.mark.parametrize("what", ["SparseMatrix", "Linear"])
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("shape", [(384, 384), (3072, 768)], ids=lambda shape: "x".join(map(str, shape)))
def test_first_call(
    benchmark: BenchmarkFixture, shape: tuple[int, int], batch: int, what: str, call: str
) -> None:
    """A new batch size in every round, from `batch` on, with the forms that float32 weights are packed in."""
    outs, ins = (side(size, 2) for size in shape)
    linear = pruned(torch.nn.Linear(ins, outs, bias=False), 0.8)
    weight = linear.weight.detach().numpy()
    x, rounds = torch.randn(batch + 60, ins), 50

    def made() -> Callable[[Any], Any]:
        if what == "Linear":
            return pack(copy.deepcopy(linear), batches=[1, 512])
        matrix = sparsam.SparseMatrix.from_dense(weight)
        matrix.prepare([1, 512])
        return lambda rows: torch.from_numpy(matrix.linear(rows.numpy()))

    product, batches = made(), iter(range(batch, batch + 60))

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        rows = x[: next(batches)]
        if call == "second":
            product(rows)
        return (rows,), {}

    benchmark.group = f"{what} {outs}x{ins} s=0.8, batches from {batch} on: first and second call"
    benchmark.extra_info.update(machine=bench.machine(), torch_threads=torch.get_num_threads())
    pedantic: Callable[..., Any] = benchmark.pedantic
    with torch.inference_mode():
        product(x)  # threads start with the first product of all
        result = pedantic(product, setup=setup, rounds=rounds)
        expected = linear(x[: len(result)])
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["packed", "torch", "torch channels_last"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("batch", [1, 8])
def test_convolution(benchmark: BenchmarkFixture, batch: int, sparsity: float, what: str) -> None:
    channels, image = side(256, 2), 16
    conv = pruned(torch.nn.Conv2d(channels, channels, 3, padding=1), sparsity)
    x = torch.randn(batch, channels, image, image)
    with torch.inference_mode():
        expected = conv(x)
    layer: Any = pack(copy.deepcopy(conv)) if what == "packed" else conv
    if what == "torch channels_last":
        layer, x = (item.to(memory_format=torch.channels_last) for item in (conv, x))
    group = f"3x3 convolution, {channels} channels, {image}x{image} s={sparsity} n={batch}"
    run(benchmark, group, lambda: layer(x), expected, rounds=50)


@pytest.mark.parametrize("what", ["packed", "torch"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent(
    benchmark: BenchmarkFixture, kind: Callable[..., torch.nn.Module], batch: int, sparsity: float, what: str
) -> None:
    width, steps = side(512, 2), 100
    dense = pruned(kind(width, width, bidirectional=True), sparsity)
    x = torch.randn(steps, batch, width)
    with torch.inference_mode():
        expected = dense(x)[0]
    layer: Any = pack(copy.deepcopy(dense), batches=[batch]) if what == "packed" else dense
    group = f"{type(dense).__name__}, {width} wide, both ways, {steps} steps s={sparsity} n={batch}"
    run(benchmark, group, lambda: layer(x)[0], expected, rounds=20)
