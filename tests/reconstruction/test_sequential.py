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
from sparsam.reconstruction.sequential import DAMPINGS, LayerProblem, fit_layer, refit_layer
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
    *, bias: bool = True, targets: bool = True, held_out: bool = True, rows: int = ROWS, **changes: Any
) -> LayerProblem:
    x, y, w, b = data(rows=rows)
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


def held_out_error(new: Array, x: Array, y: Array, bias: bool) -> float:
    """The squared error of weights over the held-out rows, with the bias that suits the others."""
    xh, yh, _, _ = data(1, 60)
    offset = (y - x @ new.T).mean(0) if bias else 0
    return float(((yh - xh @ new.T - offset) ** 2).sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("method", ["obs", "admm"])
def test_a_fit_is_the_least_squares_on_the_mask_of_the_optimum(
    method: str, targets: bool, bias: bool
) -> None:
    given = problem(method=method, targets=targets, bias=bias)
    found = fit_layer(given)
    x, y, w, b = data()
    xh, yh, _, _ = data(1, 60)
    every, wanted = np.vstack([x, xh]), np.vstack([y, yh])  # the last fit is to all inputs
    if not targets:
        y, wanted = (inputs @ w.T + (b if bias else 0) for inputs in (x, every))
    keep = found.mask.to_array()
    assert found.mask.count == keep.size - round(0.5 * keep.size)
    aim = w
    if targets:
        tried = [reference(w, np.ones_like(keep), x, y, damping, centred=bias) for damping in DAMPINGS]
        aim = min(tried, key=lambda new: held_out_error(new, x, y, bias)).astype(np.float32)
    centred = x - x.mean(0) if bias else x
    gram = centred.T @ centred
    if method == "obs" and not targets:
        own = obs(w, gram, sparsity=0.5)
        assert found.mask == own.mask
        np.testing.assert_allclose(found.weights, own.weights, atol=1e-8)
        every, wanted = x, y
    else:
        by_admm = admm_mask(aim, gram, sparsity=0.5, damping=1e-2)
        assert found.mask == (by_admm if method == "admm" else obs(aim, gram, sparsity=0.5).mask)
        assert found.damping in DAMPINGS
        want = reference(w, keep, every, wanted, found.damping, centred=bias)
        np.testing.assert_allclose(found.weights, want, rtol=1e-6, atol=1e-8)
    if not bias:
        assert found.bias is None
    else:
        assert found.bias is not None
        means = (wanted - every @ found.weights.T).mean(0)
        np.testing.assert_allclose(found.bias, means, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [True, False])
def test_the_error_is_that_of_the_held_out_rows_before_they_are_learnt(targets: bool, bias: bool) -> None:
    given = problem(targets=targets, bias=bias)
    found = fit_layer(given)
    x0, y0, w, b = data()
    x, y, _, _ = data(1, 60)
    if not targets:
        y0, y = x0 @ w.T + b, x @ w.T + b
    plain = y0 if targets or bias else x0 @ w.T
    new = reference(w, found.mask.to_array(), x0, plain, found.damping, centred=bias)
    offset = (y0 - x0 @ new.T).mean(0) if bias else (0 if targets else b)
    error = ((y - x @ new.T - offset) ** 2).sum()
    wanted = y if targets or bias else x @ w.T
    energy = ((wanted - (wanted.mean(0) if bias else 0)) ** 2).sum()
    assert found.error == pytest.approx(error / energy, rel=1e-6)


@pytest.mark.parametrize("rows", [14, 30, ROWS])
def test_the_damping_is_the_best_on_held_out_rows(rows: int) -> None:
    x, y, w, _ = data(rows=rows)
    found = fit_layer(problem(rows=rows))
    errors = {}
    for damping in DAMPINGS:
        new = reference(w, found.mask.to_array(), x, y, damping, centred=True)
        errors[damping] = held_out_error(new, x, y, True)
    assert found.damping == min(errors, key=errors.__getitem__)
    assert fit_layer(problem(held_out=False)).damping == 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_a_fit_again_is_drawn_to_the_values_it_has(bias: bool) -> None:
    given = problem(bias=bias)
    fit = fit_layer(given)
    parts = [data(), data(1, 60)]
    x, y = (np.vstack([part[i] for part in parts]) for i in (0, 1))
    moved = np.random.default_rng(3).standard_normal(y.shape)
    found = refit_layer(given, fit, moved.T @ x, moved.sum(0))
    want = reference(fit.weights, fit.mask.to_array(), x, y + moved, fit.damping, centred=bias)
    np.testing.assert_allclose(found.weights, want, rtol=1e-6, atol=1e-8)
    assert (found.mask, found.error, found.damping) == (fit.mask, fit.error, fit.damping)
    if bias:
        assert found.bias is not None
        np.testing.assert_allclose(found.bias, (y + moved - x @ found.weights.T).mean(0), rtol=1e-6)
    else:
        assert found.bias is None


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
    y = np.vstack([data()[1], data(1, 60)[1]])
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
