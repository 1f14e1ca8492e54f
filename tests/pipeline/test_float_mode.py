"""Selection does not depend on the caller's floating-point mode: subnormal numbers count as what they are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
import sparsam
from cases import DTYPES, make
from float_modes import FLUSHING
from sparsam import NM, Block, PruningConfig, Slices, Unstructured, _core, scores


@pytest.fixture(params=["flushing", "standard"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The mode of a program that called torch.set_flush_denormal(True), and rounds up besides."""
    import platform  # noqa: PLC0415

    before = _core.standard_floats()
    if request.param == "flushing":
        _core.set_float_mode(before | FLUSHING[platform.machine()])
        assert np.float64(1e-310) * np.float64(1.0) == 0
    yield request.param
    still_flushes = np.float64(1e-310) * np.float64(1.0) == 0
    _core.set_float_mode(before)
    assert still_flushes == (request.param == "flushing")


def subnormal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    """A third of the weights below the normal range, made of bits, whatever the mode."""
    rng = np.random.default_rng(seed)
    before = _core.standard_floats()
    x = rng.standard_normal(shape)
    tiny = 1e-39 if dtype == "float32" else 1e-310
    x = np.where(rng.random(shape) < 1 / 3, x * tiny, x).astype(dtype)
    _core.set_float_mode(before)
    return x


def standard(function: Any, *args: Any) -> Any:
    """Calls an oracle in the standard mode."""
    before = _core.standard_floats()
    try:
        return function(*args)
    finally:
        _core.set_float_mode(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_single_weights(isa: str, threads: int, mode: str, dtype: str, sparsity: float) -> None:
    w = subnormal((301, 300), dtype)
    before = w.copy()
    result = sparsam.prune(w, target_sparsity=sparsity)
    (expected,) = standard(reference.select, [w], sparsity)
    assert np.array_equal(result.masks.to_array(), expected)
    (row,) = result.report.layers
    assert row.pruned_params == round(sparsity * w.size)
    assert np.array_equal(w.view(np.uint8), before.view(np.uint8))
    assert np.array_equal(
        result.weights.view(np.uint8), standard(np.where, expected, w, np.zeros(1, dtype)).view(np.uint8)
    )
    t = sparsam.threshold(w, sparsity)
    value, *counts = standard(reference.threshold, [w], sparsity)
    assert struct.pack("<d", t.value) == struct.pack("<d", value)  # Printing one has a mode as well.
    assert list(t[1:]) == counts


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pattern", [Block(4, 4), Slices(0), Slices(1), NM(2, 4)], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_groups(threads: int, mode: str, dtype: str, pattern: Any, share: float) -> None:
    w = subnormal((48, 64), dtype) * np.dtype(dtype).type(1)
    w = subnormal((48, 64), dtype)
    before = _core.standard_floats()
    if share == 1.0:  # every weight below the normal range, and so every sum over a group
        w = (w * np.dtype(dtype).type(1e-39 if dtype == "float32" else 1e-310)).astype(dtype)
        assert w.any()
    _core.set_float_mode(before)
    got = sparsam.select(w, 0.5, pattern).to_array()
    if isinstance(pattern, NM):
        assert np.array_equal(got, standard(reference.select_nm, w, pattern))
        return
    labels = reference.labels(w, pattern).reshape(-1)
    scores = standard(reference.group_scores, w, pattern, 1)
    kept = standard(reference.prune_lowest, scores, round(0.5 * scores.size))
    assert np.array_equal(got.reshape(-1), kept[labels])
    pruned = sparsam.prune(w, target_sparsity=0.5, pattern=pattern)
    assert np.array_equal(pruned.masks.to_array(), got)


def test_rows(threads: int, mode: str) -> None:
    w = subnormal((64, 97), "float32")
    assert np.array_equal(
        sparsam.select(w, 0.3, scope="row").to_array(), standard(reference.select_rows, w, 0.3)
    )


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(target_sparsity=0.1, scope="global"),
        PruningConfig(target_sparsity=0.1, method="lamp", scope="global"),
        PruningConfig(target_sparsity=0.1, allocation="lamp"),
        PruningConfig(target_sparsity=0.1, allocation="global"),
        PruningConfig(target_sparsity=0.5, pattern=Block(2, 2), scope="global"),
        PruningConfig(target_sparsity=0.1, method="random"),
    ],
    ids=str,
)
def test_configurations_give_what_they_give_in_the_standard_mode(mode: str, config: PruningConfig) -> None:
    tensors = {name: subnormal((40, 50), "float32", seed) for seed, name in enumerate("abc")}
    expected = standard(sparsam.prune, tensors, config)
    got = sparsam.prune(tensors, config)
    assert got.masks == expected.masks
    assert got.report == expected.report
    for name in tensors:
        assert np.array_equal(got.weights[name].view(np.uint8), expected.weights[name].view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "method", ["Magnitude", "Random", "LAMP", "Saliency", "Fisher", "Movement", "Wanda", "RIA"]
)
def test_scores_asked_for_directly(mode: str, dtype: str, method: str) -> None:
    w, x = subnormal((40, 50), dtype), subnormal((30, 50), "float64", 1)
    inputs = standard(sparsam.InputStatistics(50).update, x)
    data: dict[str, tuple[Any, ...]] = {
        "Saliency": ({"w": subnormal((40, 50), dtype, 2)},),
        "Fisher": ({"w": standard(np.square, subnormal((40, 50), dtype, 2))},),
        "Movement": ({"w": subnormal((40, 50), dtype, 2)},),
        "Wanda": ({"w": inputs},),
        "RIA": ({"w": inputs},),
    }
    scorer = getattr(scores, method)
    got = scorer(*data.get(method, ())).score("w", w)
    expected = standard(lambda: scorer(*data.get(method, ())).score("w", w))
    assert got.dtype == expected.dtype
    assert np.array_equal(got.view(np.uint8), expected.view(np.uint8))


def test_a_growing_schedule_never_revives(mode: str) -> None:
    w = {"w": subnormal((60, 50), "float32")}
    result = sparsam.IterativePruner(
        config=PruningConfig(target_sparsity=0.4, schedule="linear", num_iterations=4)
    ).run(w, lambda _: 1.0)
    assert result.masks["w"].count == 3000 - 1200
    assert np.array_equal(result.masks["w"].to_array(), standard(reference.select, [w["w"]], 0.4)[0])


def test_the_reported_count_is_that_of_the_bits(mode: str) -> None:
    w = subnormal((100, 90), "float32")
    assert _core.count_nonzero(w) == w.size
    report = sparsam.prune({"w": w, "bias": w[0]}, target_sparsity=0.5).report
    assert [row.packed_bytes for row in report.layers] == [1125 + 4500 * 4, 360]


def test_torch_flushing(threads: int) -> None:
    torch = pytest.importorskip("torch")
    w = subnormal((301, 300), "float32")
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        mask = sparsam.prune(w, target_sparsity=0.1, pattern=Unstructured()).masks
        assert mask.size - mask.count == 9030
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extended_precision_works_afterwards(isa: str, dtype: str) -> None:
    """Instructions of MMX would leave the registers in use in which x87 computes: its next result is NaN."""
    x = make("normal", 70_000, dtype).reshape(700, 100)
    for sparsity in (0.1, 0.5, 0.9):
        sparsam.threshold(x, sparsity)
        for pattern in (Unstructured(), Block(3, 5), Slices(1)):
            sparsam.prune(x, target_sparsity=sparsity, pattern=pattern)
        sparsam.select(x, sparsity, scope="row")
    sparsam.prune(x, pattern=NM(2, 4))
    assert np.longdouble(1) + np.longdouble(2) == 3
