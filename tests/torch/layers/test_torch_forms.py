"""Which forms a packed layer holds, what they take, and which of them multiplies."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packed_layers import fix, packed_copy, pruned

import sparsam
import torch
from cost_models import KEY, made
from sparsam import SparseMatrix
from sparsam._core import Packed
from sparsam.sparse import calibration, choices
from sparsam.sparse.cost_model import BATCHES
from sparsam.torch.layers import packed_weight
from sparsam.torch.layers.packed_weight import PackedWeight, pack_matrix
from torch import nn

BOTH = ("bitmask", "panels")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the slopes of the cost model that matrices and layers see, by number of threads."""

    def use(slopes: dict[int, dict[str, float]]) -> None:
        def now(*_: Any) -> Any:
            threads = sparsam.num_threads()
            key = replace(KEY, library=sparsam.isa(), threads=threads)
            return made(key, **slopes.get(threads, slopes[0]))

        monkeypatch.setattr(choices, "current_costs", now)

    return use


# Which kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.95])
def test_a_matrix_and_a_layer_with_the_same_forms_choose_the_same_kernel(
    isa: str, threads: int, dtype: str, sparsity: float
) -> None:
    kinds: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16}
    for shape in ((40, 24), (300, 200), (900, 600)):
        w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        w[np.random.default_rng(1).random(shape) < sparsity] = 0
        w = w.astype(kinds.get(dtype, dtype))
        matrix = SparseMatrix(Packed.pack(w), BOTH)
        weight = PackedWeight.read(pack_matrix(w, forms=BOTH))
        assert matrix._state.forms.kernels == weight.forms == BOTH
        for batch in (*BATCHES, 3, 11, 20, 100, 5000):
            assert weight.kernel(batch) == matrix.explain(batch).kernel


def test_products_follow_the_instruction_set_and_the_threads(costs: Any) -> None:
    """torch.set_num_threads included: sparsam's threads are torch's."""
    costs({0: {"bitmask": 1.0, "panels": 2.0}, 1: {"bitmask": 2.0, "panels": 1.0}})
    layer, before = fix(pruned(nn.Linear(64, 48)), *BOTH), torch.get_num_threads()
    x = torch.randn(4, 64)
    expected = x @ layer.weight.to_dense().T + layer.bias
    try:
        for set_threads in (torch.set_num_threads, sparsam.set_num_threads):
            for threads, kernel in ((2, "bitmask"), (1, "panels"), (2, "bitmask")):
                set_threads(threads)
                assert layer.weight.packed.kernel(4) == layer.weight.explain(4).kernel == kernel
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    finally:
        sparsam.set_num_threads(None)
        torch.set_num_threads(before)
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            layer(x)
            assert layer.weight.packed.choices._valid[0].settings == (name, sparsam.num_threads())


@pytest.mark.parametrize("forms", [("bitmask",), ("panels",), ("slots",), BOTH, ("panels", "slots")])
def test_copies_give_the_same_digits(isa: str, forms: tuple[str, ...]) -> None:
    """The forms travel, and choices among them depend on nothing that a copy could lose."""
    layer = fix(pruned(nn.Linear(300, 200)), *forms)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False))
    for batch in (1, 3, 9, 40):
        x = torch.randn(batch, 300)
        for other in others:
            assert other.weight.packed.forms == forms
            assert torch.equal(other(x), layer(x))


# Which forms


def test_forms_follow_the_batches_by_the_cost_model(costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "fastest", lambda *_, **__: pytest.fail("timed"))
    linear = pruned(nn.Linear(64, 48))
    for slopes, batches, forms in (
        ({"bitmask": 1.0, "panels": 2.0}, [4], ("bitmask",)),
        ({"bitmask": 2.0, "panels": 1.0}, [4], ("panels",)),
        ({"bitmask": 2.0, "panels": 3.0, "slots": 1.0}, [4], ("slots",)),
        ({"bitmask": 1.0, "panels": 2.0}, [1, 8, 100], ("bitmask",)),
        ({"bitmask": 1.0, "panels": 2.0}, range(1, 4), ("bitmask",)),
        ({"bitmask": 1.0, "panels": 0.9}, 100, ("panels",)),
    ):
        costs({0: slopes})
        layer = packed_copy(linear)
        assert layer.weight.packed.forms == ("panels",)  # until it is prepared
        layer.weight.prepare(batches)
        assert layer.weight.packed.forms == forms
        assert layer.weight.nbytes == sum(part.nbytes for part in layer.weight.packed.parts)
        for batch in (1, 16, 17, 300):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
            assert layer.weight.packed.kernel(batch) == forms[0]
        assert layer.weight.packed.forms == forms  # products build nothing
    for wrong in (0, [], [3, -1]):
        with pytest.raises(ValueError, match="batches: expected numbers of at least 1"):
            layer.weight.prepare(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.8), (0.8, 0.4), (0.9, 0.22)])
def test_two_forms_where_memory_allows(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sparsity: float, most: float
) -> None:
    """Where "bitmask" is the best for one row and "panels" for many, narrow values leave room for both."""

    def expect(weight: Any, *_: Any) -> Any:
        slow, fast = (1e-3,) * 9, (1e-6,) * 9
        curves = {
            "dense": (1e-3, *slow),
            "bitmask": (1e-6, *slow[:4]),
            "panels": (1e-3, *fast),
            "slots": (1e-3, *slow[:4]),
        }
        return replace(made().expect(weight), curves=curves, settings=(sparsam.isa(), sparsam.num_threads()))

    for module in (choices, packed_weight):
        monkeypatch.setattr(module, "expect", expect)
    linear = pruned(nn.Linear(768, 384), sparsity)
    layer = packed_copy(linear, dtype=dtype, batches=[1, 64])
    if dtype is torch.float32:
        assert len(layer.weight.packed.forms) == 1
    else:
        assert layer.weight.packed.forms == BOTH
        assert [layer.weight.packed.kernel(n) for n in (1, 64)] == ["bitmask", "panels"]
    assert layer.weight.nbytes <= most * 4 * linear.weight.numel()
    for batch in (1, 64):
        x = torch.randn(batch, 768)
        torch.testing.assert_close(layer(x), linear(x), rtol=2e-2, atol=2e-2)


def test_convolutions_have_one_form(costs: Any) -> None:
    costs({0: {"bitmask": 1.0, "panels": 2.0}})
    cases: tuple[tuple[Any, tuple[int, ...]], ...] = (
        (nn.Conv2d(6, 9, 3), (2, 6, 8, 8)),
        (nn.Conv1d(6, 9, 3, groups=3), (2, 6, 8)),
    )
    for conv, shape in cases:
        layer = packed_copy(pruned(conv), batches=[1, 4])
        assert layer.weight.packed.forms == ("panels",)
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), conv(x).detach(), rtol=1e-5, atol=1e-5)
        assert str(layer.weight.explain(3)).endswith("batch 3: panels, the kernel of convolutions")


def test_explain(costs: Any) -> None:
    costs({0: {"bitmask": 1.0, "panels": 2.0, "dense": 0.25}})
    layer = packed_copy(pruned(nn.Linear(64, 48)))
    explanation = layer.weight.explain(4)
    assert explanation.kernel == "panels"
    assert explanation.reason.startswith("the cheapest form that is held by default costs")
    assert {c.kernel for c in explanation.candidates} == {"panels", "dense", "bitmask", "slots"}
    assert layer.weight.explain(0).reason == "since there is nothing to multiply"
    with pytest.raises(ValueError, match="batch: expected numbers of at least 0; got -1"):
        layer.weight.explain(-1)


def test_dense_costs_are_those_of_torch() -> None:
    layer = packed_copy(pruned(nn.Linear(768, 768)).bfloat16())
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append({c.kernel: c.expected for c in layer.weight.explain(256).candidates}["dense"])
    finally:
        torch.set_num_threads(before)
    assert found[0] > found[1]


def test_products_write_no_memory_that_stays() -> None:
    """Neither choices nor forms grow with the shapes that were seen."""
    layer, conv = fix(pruned(nn.Linear(64, 48)), *BOTH), packed_copy(nn.Conv1d(2, 3, 3))
    sizes = [one.weight.nbytes for one in (layer, conv)]
    with torch.inference_mode():
        for length in range(8, 72):
            conv(torch.randn(1, 2, length))
        for rows in range(1, 700):
            layer(torch.ones(rows, 64))
    assert 0 < len(layer.weight.packed.choices._valid[1]) <= choices.MAX_BATCHES
    assert [one.weight.nbytes for one in (layer, conv)] == sizes


# Memory


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.8), (0.8, 0.4), (0.9, 0.22)])
@pytest.mark.parametrize("batches", [[1], [1, 8, 128], [512]])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(768, 3072), nn.Linear(384, 384), nn.Conv2d(64, 128, 3), nn.Conv1d(192, 192, 3, groups=3)],
)
def test_bytes(layer: Any, sparsity: float, most: float, batches: list[int]) -> None:
    dense = pruned(copy.deepcopy(layer), sparsity)
    packed = packed_copy(dense, batches=batches)
    assert packed.weight.nbytes <= most * 4 * dense.weight.numel()


RESIDENT = """
import gc
import torch
import sparsam.torch
from sparsam.torch.layers.packing import PackedLayer

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def layers(scale, sparsity, batches):
    torch.manual_seed(0)
    made = [torch.nn.Linear(1600 * scale, 900 * scale), torch.nn.Conv2d(40 * scale, 60 * scale, 3, groups=2)]
    made.append(torch.nn.Linear(1000 * scale, 1000 * scale).bfloat16())
    made.append(torch.nn.Conv1d(90 * scale, 90 * scale, 5))
    for layer in made:
        layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
        sparsam.torch.pack(layer, batches=batches)
        assert PackedLayer.find(layer).weights[0].release()
        width, groups = layer.weight.shape[1], getattr(layer, "groups", 1)
        places = [9] * (layer.weight.ndim - 2)
        layer(torch.ones(2, width * groups, *places, dtype=layer.weight.dtype))
    return made

with torch.inference_mode():
    layers(1, 0.5, [1])  # what torch and the core need but once
    for arguments in ((3, 0.5, [1, 64]), (4, 0.8, [1]), (5, 0.9, [64])):
        before = resident()
        made = layers(*arguments)
        print(before, resident(), sum(layer.weight.nbytes for layer in made))
        del made
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this machine does not tell a process its size")
def test_nbytes_is_what_the_process_holds() -> None:
    """Of packed layers whose dense weights are released: true to 2 %."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # torch's memory goes back
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **at_once},
    )
    assert done.returncode == 0, done.stderr
    lines = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for before, after, nbytes in lines:
        assert nbytes > 20 << 20
        assert abs(after - before - nbytes) <= 0.02 * nbytes
