"""One layer's fit in sequence, against slow references in float64 from the inputs themselves."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsam import NM, Mask, Slices, Unstructured
from sparsam.reconstruction import admm_mask, obs
from sparsam.reconstruction.sequential import DAMPINGS, LayerProblem, fit_layer, split_counts
from sparsam.statistics import InputStatistics

OUT, IN, ROWS = 9, 12, 400
Array = NDArray[np.float64]


def data(seed: int = 0, rows: int = ROWS) -> tuple[Array, Array, Array, Array]:
    """Correlated inputs, wanted outputs, dense weights and bias."""
    rng = np.random.default_rng(7)
    mix, w, b = rng.standard_normal((IN, IN)), rng.standard_normal((OUT, IN)), rng.standard_normal(OUT)
    other = w + 0.3 * rng.standard_normal(w.shape)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, IN)) @ mix + 2
    y = x @ other.T + b + rng.standard_normal((rows, OUT))
    return x, y, w, b


def problem(
    *, bias: bool = True, targets: bool = True, held_out: bool = True, **changes: Any
) -> LayerProblem:
    x, y, w, b = data()
    size = 2 * OUT if targets else None
    # The targets of another layer with the same inputs stand before this one's.
    seen, held = (InputStatistics(IN, targets=size) for _ in range(2))
    xh, yh, _, _ = data(1, 60)
    for statistics, inputs, wanted in ((seen, x, y), (held, xh, yh)):
        statistics.update(inputs, np.hstack([-wanted, wanted]) if targets else None)
    given = LayerProblem(
        "layer",
        w,
        b if bias else None,
        seen,
        held if held_out else None,
        slice(OUT, None) if targets else None,
        "admm",
        0.5,
        Unstructured(),
    )
    return replace(given, **changes)


def reference(
    weights: Array, keep: NDArray[np.bool_], x: Array, y: Array, damping: float, *, centred: bool
) -> Array:
    """Row by row the ridge on the support, drawn to the dense weights."""
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    h, c = x.T @ x, y.T @ x
    added = damping * h.diagonal().mean()
    new = np.zeros_like(weights)
    for i, row in enumerate(keep):
        system = h[np.ix_(row, row)] + added * np.eye(int(row.sum()))
        new[i, row] = np.linalg.solve(system, c[i, row] + added * weights[i, row])
    return new


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("method", ["obs", "admm"])
def test_a_fit_is_the_least_squares_on_the_mask_of_the_optimum(
    method: str, targets: bool, bias: bool
) -> None:
    given = problem(method=method, targets=targets, bias=bias)
    found = fit_layer(given)
    x, y, w, b = data()
    if not targets:
        y = x @ w.T + (b if bias else 0)
    keep = found.mask.to_array()
    assert found.mask.count == keep.size - round(0.5 * keep.size)
    aim = w
    if targets:
        aim = reference(w, np.ones_like(keep), x, y, 1e-2, centred=bias).astype(np.float32)
    centred = x - x.mean(0) if bias else x
    gram = centred.T @ centred
    if method == "obs" and not targets:
        own = obs(w, gram, sparsity=0.5)
        assert found.mask == own.mask
        np.testing.assert_allclose(found.weights, own.weights, atol=1e-8)
    else:
        by_admm = admm_mask(aim, gram, sparsity=0.5, damping=1e-2)
        assert found.mask == (by_admm if method == "admm" else obs(aim, gram, sparsity=0.5).mask)
        assert found.damping in DAMPINGS
        want = reference(w, keep, x, y, found.damping, centred=bias)
        np.testing.assert_allclose(found.weights, want, rtol=1e-6, atol=1e-8)
    if not bias:
        assert found.bias is None
    else:
        assert found.bias is not None
        np.testing.assert_allclose(found.bias, (y - x @ found.weights.T).mean(0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [True, False])
def test_the_error_is_that_of_the_held_out_rows(targets: bool, bias: bool) -> None:
    given = problem(targets=targets, bias=bias)
    found = fit_layer(given)
    x, y, w, b = data(1, 60)
    if not targets:
        y = x @ w.T + b
    offset = found.bias if found.bias is not None else (0 if targets else b)
    error = ((y - x @ found.weights.T - offset) ** 2).sum()
    wanted = y if targets or bias else x @ w.T
    energy = ((wanted - (wanted.mean(0) if bias else 0)) ** 2).sum()
    assert found.error == pytest.approx(error / energy, rel=1e-6)


def test_the_damping_is_the_best_on_held_out_rows() -> None:
    x, y, w, _ = data()
    found = fit_layer(problem())
    xh, yh, _, _ = data(1, 60)
    errors = {}
    for damping in DAMPINGS:
        new = reference(w, found.mask.to_array(), x, y, damping, centred=True)
        bias = (y - x @ new.T).mean(0)
        errors[damping] = ((yh - xh @ new.T - bias) ** 2).sum()
    assert found.damping == min(errors, key=errors.__getitem__)
    assert fit_layer(problem(held_out=False)).damping == 1e-2


@pytest.mark.parametrize("pattern", [NM(2, 4), Slices(0), Unstructured()], ids=str)
def test_patterns(pattern: Any) -> None:
    sparsity = 0.5
    found = fit_layer(problem(pattern=pattern, sparsity=sparsity))
    keep = found.mask.to_array()
    assert ((found.weights != 0) <= keep).all()
    if isinstance(pattern, NM):
        assert (keep.reshape(OUT, -1, 4).sum(2) == 2).all()
    if isinstance(pattern, Slices):
        assert (keep.any(1) == keep.all(1)).all()
        assert int((~keep.any(1)).sum()) == round(0.5 * OUT)


def test_rows_by_obs() -> None:
    found = fit_layer(problem(method="obs", scope="row", sparsity=0.25))
    assert (found.mask.to_array().sum(1) == IN - round(0.25 * IN)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "obs", "pattern": Slices(0)},
            r"pattern: expected Unstructured\(\) or NM\(n, m\) for 'layer'",
        ),
        ({"scope": "row"}, "scope: expected 'layer' with method 'admm'; got 'row'"),
        ({"method": "obs", "scope": "global"}, "scope: expected 'layer' or 'row' with method 'obs'"),
    ],
)
def test_what_a_method_does_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_layer(problem(**changes))


def test_inputs_that_are_always_zero() -> None:
    x, y, w, b = data()
    x[:, [0, 5]] = 0
    seen = InputStatistics(IN, targets=OUT).update(x, y)
    found = fit_layer(LayerProblem("layer", w, b, seen, None, slice(None), "admm", 0.5, Unstructured()))
    assert np.isfinite(found.weights).all()
    assert not found.mask.to_array()[:, [0, 5]].any()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(sparsity: float) -> None:
    found = fit_layer(problem(sparsity=sparsity))
    assert found.mask == (
        Mask.ones((OUT, IN)) if sparsity == 0 else Mask.from_array(np.zeros((OUT, IN), bool))
    )
    y = data()[1]
    if sparsity == 1:
        assert found.bias is not None
        np.testing.assert_allclose(found.bias, y.mean(0), rtol=1e-9)
        assert found.error == pytest.approx(1, abs=0.2)


def test_a_problem_is_data_that_any_process_solves_alike() -> None:
    problems = [problem(method=method, sparsity=s) for method in ("obs", "admm") for s in (0.3, 0.7)]
    here = [fit_layer(one) for one in problems]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        there = list(pool.map(fit_layer, problems))
    for a, b in zip(
        here, [*there, *(fit_layer(pickle.loads(pickle.dumps(p))) for p in problems)], strict=False
    ):
        assert np.array_equal(a.weights, b.weights)
        assert a.bias is not None
        assert b.bias is not None
        assert np.array_equal(a.bias, b.bias)
        assert (a.mask, a.error, a.damping) == (b.mask, b.error, b.damping)


def test_counts_are_shared_out_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 9, rng.integers(1, 6)).tolist()
        total = int(rng.integers(0, sum(sizes) + 1))
        counts = split_counts(total, sizes)
        assert sum(counts) == total
        exact = [total * size / sum(sizes) for size in sizes]
        assert all(abs(count - number) < 1 for count, number in zip(counts, exact, strict=True))
