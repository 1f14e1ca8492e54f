"""What products do without being asked, which is nothing; what prepare() does; what choices depend on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from cost_models import KEY, made
from sparsam import SparseMatrix
from sparsam._core import Packed
from sparsam.sparse import calibration, choices, cost_model, preparation
from sparsam.sparse import matrix as module
from sparsam.sparse.cost_model import CostModel, Weight
from sparsam.sparse.forms import Forms
from sparsam.sparse.matmul import KERNELS


def weights(rows: int = 64, cols: int = 48, sparsity: float = 0.5) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def inputs(batch: int, cols: int = 48) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((batch, cols), dtype=np.float32)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the slopes of the cost model that matrices see, by default for any number of threads."""

    def use(slopes: dict[str, float], at_3_threads: dict[str, float] | None = None) -> None:
        def now(*_: Any) -> CostModel:
            threads = sparsam.num_threads()
            key = replace(KEY, library=sparsam.isa(), threads=threads)
            return made(key, **(at_3_threads if at_3_threads and threads == 3 else slopes))

        monkeypatch.setattr(choices, "current_costs", now)

    return use


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Kernel -> seconds that prepare() measures; every kernel is tried."""
    found = dict.fromkeys(KERNELS, 1.0)

    def fastest(run: Any) -> float:
        run()
        return found[run.__defaults__[0]]

    monkeypatch.setattr(calibration, "fastest", fastest)
    monkeypatch.setattr(calibration, "SPINNING", 0.0)
    monkeypatch.setattr(preparation, "_PLAUSIBLE", np.inf)
    return found


# Products


def test_products_measure_and_write_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "fastest", lambda *_, **__: pytest.fail("timed"))
    matrix = SparseMatrix.from_dense(weights())
    for batch in (0, 1, 2, 3, 8, 17, 64, 1000):
        matrix.linear(inputs(batch))
        matrix.explain(batch)
    assert not list(cache.iterdir())


def test_packed_kernels_are_not_timed_while_threads_of_blas_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def fastest(run: Any) -> float:
        run()
        events.append(run.__defaults__[0])
        return 1.0

    monkeypatch.setattr(calibration, "fastest", fastest)
    monkeypatch.setattr(calibration, "wait_for_idle_threads", lambda: events.append("wait"))
    monkeypatch.setattr(preparation, "_PLAUSIBLE", np.inf)
    SparseMatrix.from_dense(weights()).prepare([2, 0, 8])
    packed = [kernel for kernel in KERNELS if kernel != "dense"]
    assert events == ["wait", *packed * 4, *["dense"] * 4]
    events.clear()
    SparseMatrix.from_dense(weights()).prepare([0])
    assert events == []


@pytest.mark.parametrize("best", KERNELS)
def test_the_form_that_batches_need_is_there_from_the_beginning_and_counted(costs: Any, best: str) -> None:
    costs(dict.fromkeys(KERNELS, 10.0) | {best: 1.0})
    w, x = weights(), inputs(4)
    matrix = SparseMatrix.from_dense(w)
    before = matrix.nbytes
    assert matrix.explain(4).kernel == best
    assert matrix._state.forms.kernels == (best,)
    if best == "dense":
        assert before == w.nbytes
    y = matrix.linear(x)
    for batch in (1, 9, 33, 300):
        assert np.allclose(matrix.linear(inputs(batch)), inputs(batch) @ w.T, atol=1e-4)
    assert matrix.nbytes == before
    assert np.array_equal(matrix.linear(x), y)


def test_two_forms_where_one_would_be_slow_and_never_three() -> None:
    w, fits = Weight.of(Packed.pack(weights())), dict(made().kernels.fits)
    for kind, (first, others) in {
        "bitmask": (1e-6, 1e-3),
        "panels": (1e-3, 1e-6),
        "slots": (1.0, 1.0),
    }.items():
        fits[kind] = [(others if i else first, *row[1:]) for i, row in enumerate(fits[kind])]
    forms = Forms.of(Packed.pack(weights()))
    for dense, needed in ((1e3, ("bitmask", "panels")), (1e-6, ("dense",)), (0.5, None)):
        model = replace(made(dense=dense), kernels=cost_model.Costs(fits=fits, **asdict(KEY)))
        found = forms.needed(model.expect(w))
        assert found == needed if needed else len(found) <= 2


def test_products_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no instruction set and no number of threads, so no first product is a slow one."""
    matrices = [SparseMatrix.from_dense(weights(sparsity=s)) for s in (0.1, 0.5, 0.95)]
    monkeypatch.setattr(Forms, "with_kernel", lambda *_: pytest.fail("built"))
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            for matrix, batch in itertools.product(matrices, (1, 2, 7, 40, 600)):
                before = matrix.nbytes
                matrix.linear(inputs(batch))
                assert matrix.explain(batch).kernel in matrix._state.forms.kernels
                assert matrix.nbytes == before


def test_few_choices_are_kept(costs: Any) -> None:
    costs({})
    matrix_ = SparseMatrix(Packed.pack(weights(4, 2)), ["bitmask", "panels"])
    for batch in range(1, 1500):
        matrix_.linear(np.ones((batch, 2), np.float32))
    valid = matrix_._state.choices._valid
    assert valid is not None
    assert 0 < len(valid[1]) <= choices.MAX_BATCHES


# prepare


@pytest.mark.parametrize("best", KERNELS)
def test_prepare_keeps_the_one_form_that_batches_need(times: dict[str, float], best: str) -> None:
    times |= dict.fromkeys(KERNELS, 3.0) | {best: 1.0}
    w = weights()
    matrix = SparseMatrix.from_dense(w)
    matrix.prepare([1, 4, 100])
    assert matrix._state.forms.kernels == (best,)
    if best == "dense":
        assert matrix.nbytes == w.nbytes
    for batch in (1, 4, 100):
        explanation = matrix.explain(batch)
        assert explanation.kernel == best
        assert explanation.reason == "measured by prepare() on this matrix"
        assert {c.measured for c in explanation.candidates} == {1e6, 3e6}
    before = matrix.nbytes
    for batch in (1, 4, 7, 100, 3000):  # others are multiplied with what there is
        x = inputs(batch)
        assert np.allclose(matrix.linear(x), x @ w.T, atol=1e-4)
    assert matrix.nbytes == before
    assert matrix.nnz == np.count_nonzero(w)
    assert np.array_equal(matrix.to_dense(), w)
    x = inputs(4)
    x[0, 0] = np.inf
    assert np.isfinite(matrix.linear(x)[0, w[:, 0] == 0]).all()  # dense too


def test_a_second_form_must_win_clearly(times: dict[str, float]) -> None:
    times |= {"dense": 9.0, "bitmask": 1.0, "panels": 2.0, "slots": 9.0}
    matrix = SparseMatrix.from_dense(weights())
    matrix.prepare(1)
    times |= {"bitmask": 1.2, "panels": 1.0}
    matrix.prepare(64)
    assert matrix._state.forms.kernels == ("bitmask",)
    assert "panels is not faster by enough to hold another form" in matrix.explain(64).reason
    times |= {"bitmask": 2.0}
    matrix.prepare(64)
    assert set(matrix._state.forms.kernels) == {"bitmask", "panels"}
    assert [matrix.explain(n).kernel for n in (1, 64)] == ["bitmask", "panels"]


def test_prepare_with_a_kernel_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "fastest", lambda *_, **__: pytest.fail("timed"))
    matrix = SparseMatrix.from_dense(weights())
    matrix.prepare([3, 100], kernel="panels")
    assert matrix._state.forms.kernels == ("panels",)
    assert [matrix.explain(n).reason for n in (3, 97)] == ["as requested with prepare()"] * 2
    assert "by default costs" in matrix.explain(1).reason
    assert matrix.explain(1).kernel == "panels"


def test_prepare_for_nothing() -> None:
    for matrix in (SparseMatrix.from_dense(weights()), SparseMatrix.from_dense(np.zeros((3, 4), np.float32))):
        matrix.prepare([])
        matrix.prepare(0)
        assert "nothing to multiply" in matrix.explain(0).reason
    assert "nothing to multiply" in matrix.explain(5).reason
    assert matrix.linear(np.ones((5, 4), np.float32)).tolist() == [[0, 0, 0]] * 5


def test_kept_zeros_stay_when_dense_is_best() -> None:
    w = np.array([[0, 1], [2, 0]], np.float32)
    matrix = SparseMatrix.from_mask(w, np.array([[True, True], [True, False]]))
    assert matrix.nnz == 3
    matrix.prepare(4, kernel="dense")
    assert matrix.nnz == matrix.to_scipy().nnz == 3
    x = np.array([[np.inf, 1]], np.float32)
    assert np.array_equal(matrix.linear(x), [[np.nan, np.inf]], equal_nan=True)


# What choices depend on


def test_choices_expire_with_the_instruction_set_and_the_threads(times: dict[str, float]) -> None:
    times |= {"dense": 3.0, "bitmask": 2.0, "panels": 1.0, "slots": 4.0}
    before = sparsam.isa()
    switches: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: sparsam.use_isa(sparsam.available_isas()[-1]), lambda: sparsam.use_isa(before)),
        (lambda: sparsam.set_num_threads(3), lambda: sparsam.set_num_threads(None)),
    ]
    for switch, back in switches:
        matrix = SparseMatrix.from_dense(weights())
        matrix.prepare(8)
        matrix.linear(inputs(8))
        assert matrix.explain(8).reason == "measured by prepare() on this matrix"
        switch()
        try:
            assert matrix.explain(8).kernel == "panels"  # the only one that is held
            assert (
                f"by default costs ({sparsam.isa()}, {sparsam.num_threads()} threads"
                in matrix.explain(8).reason
            )
            matrix.linear(inputs(8))
        finally:
            back()
        assert matrix.explain(8).reason == "measured by prepare() on this matrix"


def test_products_follow_the_settings(costs: Any) -> None:
    """Which of two forms multiplies is chosen anew under another number of threads."""
    costs({"bitmask": 1.0, "panels": 2.0}, at_3_threads={"bitmask": 2.0, "panels": 1.0})
    matrix = SparseMatrix(Packed.pack(weights()), ["bitmask", "panels"])
    for threads, kernel in ((1, "bitmask"), (3, "panels"), (1, "bitmask")):
        sparsam.set_num_threads(threads)
        try:
            assert matrix._state.choices.kernel(4) == matrix.explain(4).kernel == kernel
            assert np.allclose(matrix.linear(inputs(4)), inputs(4) @ weights().T, atol=1e-4)
        finally:
            sparsam.set_num_threads(None)


def test_what_the_user_told_does_not_expire() -> None:
    matrix = SparseMatrix.from_dense(weights())
    matrix.prepare(8, kernel="panels")
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            matrix.linear(inputs(8))
            assert matrix.explain(8).reason == "as requested with prepare()"


# Fork


def _in_child(matrix_: SparseMatrix, x: Any, y: Any) -> None:
    with np.errstate(all="ignore"):
        good = np.allclose(matrix_.linear(x), y, atol=1e-4)
        matrix_.prepare(len(x), kernel="panels")
        SparseMatrix.from_dense(matrix_.to_dense()).linear(x)
    os._exit(0 if good else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="this machine cannot fork safely")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_holds_the_lock() -> None:
    matrix_, x = SparseMatrix.from_dense(weights()), inputs(3)
    y = x @ weights().T
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with module._publishing:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(matrix_, x, y))
    child.start()
    child.join(30)
    done.set()
    thread.join()
    if child.is_alive():
        child.kill()
    child.join()
    assert child.exitcode == 0
    assert np.allclose(matrix_.linear(x), y, atol=1e-4)


def test_the_cost_model_has_no_lock() -> None:
    assert not [name for name, value in vars(cost_model).items() if "lock" in type(value).__name__.lower()]
