from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import network
from sparsam.analysis import executor as task_runner
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import EvaluationError, SensitivityPoint, SensitivityReport, sensitivity
from sparsam.config import PruningConfig
from sparsam.patterns import NM, Slices, Tied, Unstructured
from sparsam.pruner import prune
from sparsam.scores import Random
from sparsam.training.callbacks import Arrays

MATRICES = ("in.weight", "mid.weight", "out.weight")
GRID = (0.25, 0.5, 0.75, 0.9)


def by_hand(tensors: Arrays, name: str, sparsity: float) -> Arrays:
    """The weights with one tensor's round(s * n) smallest magnitudes zeroed, of equals the later ones."""
    flat = tensors[name].ravel().copy()
    ranked = sorted(range(flat.size), key=lambda i: (abs(float(flat[i])), -i))
    flat[ranked[: round(sparsity * flat.size)]] = 0
    return {**tensors, name: flat.reshape(tensors[name].shape)}


class Counting:
    """An eval_fn that remembers how often it was called, and spoils what it was given."""

    def __init__(self, eval_fn: Callable[[Arrays], float] = network.accuracy) -> None:
        self.eval_fn = eval_fn
        self.calls = 0
        self.dense = 0

    def __call__(self, tensors: Arrays) -> float:
        self.calls += 1
        self.dense += all(np.count_nonzero(tensors[name]) == tensors[name].size for name in MATRICES)
        score = self.eval_fn(tensors)
        for array in tensors.values():
            array[...] = 7
        return score


def test_each_tensor_alone_against_a_slow_reference() -> None:
    weights = network.weights()
    eval_fn = Counting()
    report = sensitivity(weights, eval_fn, GRID)
    assert report.dense_score == 1.0
    assert tuple(curve.name for curve in report.curves) == MATRICES
    for curve in report.curves:
        size = weights[curve.name].size
        assert curve.tensors == ((curve.name, size),)
        assert curve.points == tuple(
            SensitivityPoint(
                curve.name, s, round(s * size), network.accuracy(by_hand(weights, curve.name, s))
            )
            for s in GRID
        )
    assert eval_fn.calls == report.evaluations == 1 + 3 * len(GRID)
    assert eval_fn.dense == 1
    assert all(np.array_equal(array, network.weights()[name]) for name, array in weights.items())


def test_sparsities_are_sorted_and_zero_is_the_dense_score() -> None:
    eval_fn = Counting()
    report = sensitivity(network.weights(), eval_fn, (0.5, 0, 0.25, 0.5))
    assert report.sparsities == (0.25, 0.5)
    assert (eval_fn.calls, eval_fn.dense) == (7, 1)


def test_the_configuration_says_which_tensors_and_how() -> None:
    weights = network.weights()
    config = PruningConfig(
        0.9,
        pattern=Slices(0),
        exclude=("out.*",),
        overrides={"in.bias": 0.1, "mid.weight": (0.3, Slices(1))},
        schedule=[0.5, 0.9],
    )
    report = sensitivity(weights, network.accuracy, (0.25, 0.5), config=config)
    assert [curve.name for curve in report.curves] == ["in.weight", "in.bias", "mid.weight"]
    rows, bias, columns = report.curves
    order = np.argsort(np.abs(weights["mid.weight"]).sum(axis=0), kind="stable")
    pruned = weights["mid.weight"].copy()
    pruned[:, order[:8]] = 0
    assert columns.points[1] == ("mid.weight", 0.5, 64, network.accuracy({**weights, "mid.weight": pruned}))
    assert [point.pruned for point in rows.points] == [48, 96]
    assert [point.pruned for point in bias.points] == [4, 8]


def test_rows() -> None:
    weights = network.weights()
    config = PruningConfig(scope="row", allocation="erk", exclude=("version",))
    report = sensitivity(weights, network.accuracy, (0.5,), config=config)
    assert [curve.points[0].pruned for curve in report.curves] == [16 * 6, 8 * 8, 5 * 4]
    rows = prune({"mid.weight": weights["mid.weight"]}, scope="row").weights
    assert report.curves[1].points[0].score == network.accuracy({**weights, **rows})


def test_nm_has_one_sparsity() -> None:
    weights = {name: array for name, array in network.weights().items() if name != "version"}
    config = PruningConfig(pattern=NM(2, 4), overrides={"mid.weight": NM(1, 4)})
    report = sensitivity(weights, network.accuracy, GRID, config=config)
    grids = {curve.name: [point.sparsity for point in curve.points] for curve in report.curves}
    assert grids == {"in.weight": [0.5], "mid.weight": [0.75], "out.weight": [0.5]}
    assert all(curve.all_or_nothing for curve in report.curves)
    # 192 * 0.5 is needed: in.weight has exactly that, and nothing can be given back.
    steps = report.allocate(96 / 360)
    assert set(steps.values()) <= {0.0, 0.5, 0.75}
    assert sum(s * weights[name].size for name, s in steps.items()) >= 96
    with pytest.raises(ValueError, match=r"groups\['all'\]: expected one N:M pattern for all tensors"):
        sensitivity(weights, network.accuracy, GRID, config=config, groups={"all": "*.weight"})


def test_groups_are_pruned_together() -> None:
    weights = network.weights()
    groups = {"ends": ["out.weight", "in.*"], "middle": "mid*"}
    report = sensitivity(weights, network.accuracy, (0.5,), groups=groups)
    ends, middle = report.curves
    assert ends.tensors == (("in.weight", 192), ("out.weight", 40))
    both = by_hand(by_hand(weights, "in.weight", 0.5), "out.weight", 0.5)
    assert ends.points == (("ends", 0.5, 116, network.accuracy(both)),)
    assert middle.params == 128
    pooled = sensitivity(
        weights, network.accuracy, (0.5,), groups=groups, config=PruningConfig(scope="global")
    )
    assert pooled.curves[0].points[0].pruned == 116
    assert pooled.curves[0] != ends
    allocated = report.allocate(0.4)
    assert list(allocated) == ["in.weight", "out.weight", "mid.weight"]
    assert sum(s * weights[name].size for name, s in allocated.items()) == pytest.approx(144, abs=1e-9)
    assert abs(allocated["in.weight"] - allocated["out.weight"]) <= 1 / 40


HEADS = (
    Tied({"q": Slices(0, 2), "o": Slices(1, 2)}),
    Tied({"fc1": Slices(0), "bias": Slices(0), "fc2": Slices(1)}),
)


def tied_network() -> Arrays:
    rng = np.random.default_rng(4)
    shapes = {"q": (8, 6), "o": (6, 8), "fc1": (10, 6), "bias": (10,), "fc2": (6, 10), "head": (4, 6)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 3)])
def test_ties_are_pruned_together(pattern: Any) -> None:
    weights = tied_network()
    config = PruningConfig(pattern=pattern, ties=HEADS)
    seen: list[Arrays] = []

    def remember(tensors: Arrays) -> float:
        seen.append({name: array.copy() for name, array in tensors.items()})
        return float(sum(np.count_nonzero(array) for array in tensors.values()))

    report = sensitivity(weights, remember, (0.5,), config=config)
    assert [curve.name for curve in report.curves] == ["head", "q + o", "fc1 + bias + fc2"]
    # One evaluation after another: the dense one, head, the heads, the neurons.
    _, head, heads, neurons = seen
    expected = prune(weights, target_sparsity=0.5, exclude=("head",), ties=HEADS).weights
    for name in weights:
        assert np.array_equal(heads[name], (expected if name in HEADS[0].members else weights)[name])
        assert np.array_equal(neurons[name], (expected if name in HEADS[1].members else weights)[name])
        assert (name == "head") == (not np.array_equal(head[name], weights[name]))
    assert [curve.points[0].pruned for curve in report.curves] == [
        8 if pattern != Unstructured() else 12,
        48,
        65,
    ]
    together = sensitivity(weights, remember, (0.5,), config=config, groups={"block": ["q", "o"]})
    assert together.curves[0].points[0].score == report.curves[1].points[0].score
    with pytest.raises(
        ValueError, match=r"groups\['a'\]: expected all or none of the tied \['q', 'o'\]; got \['q'\]"
    ):
        sensitivity(weights, remember, (0.5,), config=config, groups={"a": "q"})


def test_allocated_ties_are_pruned_as_allocated() -> None:
    weights = tied_network()
    config = PruningConfig(ties=HEADS)
    report = sensitivity(weights, _kept, config=config)
    shares = report.allocate(0.6)
    result = prune(weights, target_sparsity=0.0, ties=HEADS, overrides=shares)
    for curve, groups in zip(report.curves, (24, 4, 10), strict=True):
        pruned = sum(shares[name] * size for name, size in curve.tensors)
        name, size = curve.tensors[0]
        assert result.masks[name].count == size - round(pruned / curve.params * groups) * size // groups
    found = find_smallest(weights, _kept, 0.4, config=config, allocation=report)
    assert found.score >= 0.4
    assert 0.4 < found.sparsity < 0.7
    assert not found.weights["fc1"][found.weights["bias"] == 0].any()


def _kept(weights: Arrays) -> float:
    sizes = [(np.count_nonzero(array), array.size) for array in weights.values()]
    return float(sum(kept for kept, _ in sizes) / sum(size for _, size in sizes))


def test_a_tensor_in_two_ties_has_no_sparsity_of_its_own() -> None:
    weights = {"a": np.ones((4, 3)), "b": np.ones((4, 4)), "c": np.ones((2, 4))}
    ties = (Tied({"a": Slices(0), "b": Slices(1)}), Tied({"b": Slices(0), "c": Slices(1)}))
    report = sensitivity(weights, lambda _: 1.0, (0.5,), config=PruningConfig(ties=ties))
    assert [curve.points[0].pruned for curve in report.curves] == [14, 12]
    with pytest.raises(ValueError, match="curves: expected each tensor in one; got 'b' in two"):
        report.allocate(0.2)


# A budget


def _steps(weights: Arrays) -> float:
    """Falls steeply at 0.6 of mid.weight, gently along in.weight, and not at all with out.weight."""
    gone = {name: 1 - np.count_nonzero(weights[name]) / weights[name].size for name in MATRICES}
    return float(10 - 8 * (gone["mid.weight"] > 0.6) - gone["in.weight"])


TENTHS = tuple(i / 10 for i in range(1, 10))


def test_a_budget_goes_where_curves_bend() -> None:
    report = sensitivity(network.weights(), Counting(_steps), TENTHS, max_evaluations=10)
    assert report.evaluations == 10
    at = {curve.name: [point.sparsity for point in curve.points] for curve in report.curves}
    assert all(points[-1] == 0.9 for points in at.values())
    assert {0.6, 0.7} <= set(at["mid.weight"])
    assert at["out.weight"] == [0.9]


@pytest.mark.parametrize("budget", range(4, 30))
def test_a_budget_is_spent_exactly(budget: int) -> None:
    eval_fn = Counting()
    seen: list[tuple[int, int]] = []
    report = sensitivity(
        network.weights(),
        eval_fn,
        TENTHS,
        max_evaluations=budget,
        callback=lambda done, total, _: seen.append((done, total)),
    )
    assert eval_fn.calls == report.evaluations == min(budget, 28)
    assert seen == [(i, min(budget, 28)) for i in range(1, min(budget, 28) + 1)]
    full = sensitivity(network.weights(), network.accuracy, TENTHS)
    for curve, whole in zip(report.curves, full.curves, strict=True):
        assert set(curve.points) <= set(whole.points)


def test_too_small_a_budget() -> None:
    with pytest.raises(ValueError, match="max_evaluations: expected at least 4, the dense weights and each"):
        sensitivity(network.weights(), network.accuracy, max_evaluations=3)


# Executors


class Watched(Executor):
    """Another executor, and how often a job travelled with a task."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.submitted = 0
        self.with_job = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        self.with_job += args[-1] is not None
        return self.inner.submit(fn, *args, **kwargs)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    else:
        yield request.getfixturevalue(request.param)


CONFIG = PruningConfig(method=Random(3), overrides={"in.bias": (0.5, Slices(0))}, exclude=("out.weight",))


@pytest.mark.parametrize(("budget", "config"), [(None, None), (15, None), (20, CONFIG)])
def test_executors_change_nothing(
    executor: Executor, budget: int | None, config: PruningConfig | None, tmp_path: Path
) -> None:
    watched = Watched(executor)
    arguments: dict[str, Any] = {"sparsities": TENTHS, "max_evaluations": budget, "config": config}
    report = sensitivity(
        network.weights(), network.accuracy, executor=watched, state=tmp_path / "sweep", **arguments
    )
    assert report == sensitivity(network.weights(), network.accuracy, **arguments)
    if isinstance(executor, ThreadPoolExecutor):
        assert watched.with_job == 0
        assert watched.submitted == report.evaluations
    else:
        # Each of two processes is sent the weights, not each of up to 28 tasks.
        assert 1 <= watched.with_job <= 14


class Simulated(Executor):
    """Workers with memories of their own, in turn; what they have done is ready when asked for."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memories: list[dict[str, Any]] = [{} for _ in range(count)]
        self.jobs = [0 for _ in range(count)]
        self.submitted = 0
        self.monkeypatch = monkeypatch

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        place = self.submitted % len(self.memories)
        self.submitted += 1
        self.jobs[place] += args[-1] is not None
        future: Future[Any] = Future()
        with self.monkeypatch.context() as patch:
            patch.setattr(task_runner, "_own", {})
            patch.setattr(task_runner, "_sent", self.memories[place])
            patch.setattr(task_runner, "getpid", lambda: place)
            future.set_result(fn(*pickle.loads(pickle.dumps(args))))
        return future


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_weights_travel_about_once_to_each_worker(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Simulated(workers, monkeypatch)
    report = sensitivity(network.weights(), network.accuracy, TENTHS, executor=executor)
    assert report == sensitivity(network.weights(), network.accuracy, TENTHS)
    assert 1 <= sum(executor.jobs) <= 2 * workers + 2
    assert all(len(memory) <= 1 for memory in executor.memories)


class Unreliable(Executor):
    """It never tells of a future that was cancelled, as Dask's."""

    def __init__(self) -> None:
        self.pending: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.pending.append(future)
        if len(self.pending) in {1, 3}:
            future.set_result(fn(*args))
        return future


def test_what_is_cancelled_is_not_waited_for() -> None:
    def fails(weights: Arrays) -> float:
        good = all(np.count_nonzero(weights[name]) == weights[name].size for name in MATRICES)
        return 1.0 if good else 1 / 0

    executor = Unreliable()
    with pytest.raises(EvaluationError, match=r"'in.weight' at sparsity 0.2: ZeroDivisionError") as caught:
        sensitivity(network.weights(), fails, TENTHS, executor=executor)
    assert caught.value.report is not None
    assert caught.value.report.evaluations == 1
    assert sum(future.cancelled() for future in executor.pending) == len(executor.pending) - 2


def test_a_failure_in_a_worker_loses_nothing(executor: Executor, tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"
    with pytest.raises(
        EvaluationError, match=r"'mid.weight' at sparsity 0.5: .*mid.weight fell below 0.5"
    ) as caught:
        sensitivity(network.weights(), network.fragile, (0.3, 0.5), executor=executor, state=state)
    error = caught.value
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.report) == (str(error), error.report)
    assert (error.name, error.sparsity) == ("mid.weight", 0.5)
    assert error.__cause__ is not None
    if not isinstance(executor, ThreadPoolExecutor):
        assert "in fragile" in str(error.__cause__.__cause__)
    assert error.report is not None
    assert error.report.dense_score == 1.0
    kept = {tuple(point[:2]) for point in json.loads(state.read_text())["points"]}
    assert ("", 0.0) in kept
    assert ("mid.weight", 0.5) not in kept
    assert len(kept) == error.report.evaluations
    # Mended, the sweep goes on from there.
    eval_fn = Counting()
    report = sensitivity(network.weights(), eval_fn, (0.3, 0.5), state=state)
    assert report == sensitivity(network.weights(), network.accuracy, (0.3, 0.5))
    assert eval_fn.calls == 7 - len(kept)


def test_what_does_not_pickle_is_said(processes: Executor) -> None:
    with pytest.raises(
        EvaluationError, match=r"the dense weights: the executor could not run it .*must pickle"
    ):
        sensitivity(network.weights(), lambda _: 1.0, (0.5,), executor=processes)
    # And the pool goes on.
    assert sensitivity(network.weights(), network.accuracy, (0.5,), executor=processes).evaluations == 4


def test_an_executor_that_is_shut_down() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(EvaluationError, match="cannot schedule new futures") as caught:
        sensitivity(network.weights(), network.accuracy, (0.5,), executor=pool)
    assert caught.value.report is None


def test_an_interrupt_cancels_what_has_not_begun() -> None:
    calls = 0
    held = threading.Event()

    def slow(weights: Arrays) -> float:
        nonlocal calls
        calls += 1
        if calls > 1:
            held.wait(10)
        return 1.0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            sensitivity(network.weights(), slow, TENTHS, executor=pool, callback=stop)
        held.set()
        time.sleep(0.01)
    assert calls <= 2


# State


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"

    def stop(done: int, total: int, point: SensitivityPoint) -> None:
        if done == 6:
            raise KeyboardInterrupt

    for budget in (None, 15):
        state.unlink(missing_ok=True)
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            sensitivity(
                network.weights(),
                network.accuracy,
                TENTHS,
                max_evaluations=budget,
                state=state,
                callback=stop,
            )
        eval_fn = Counting()
        report = sensitivity(
            network.weights(),
            eval_fn,
            TENTHS,
            max_evaluations=budget,
            state=state,
            callback=lambda done, *_, seen=seen: seen.append(done),
        )
        assert report == sensitivity(network.weights(), network.accuracy, TENTHS, max_evaluations=budget)
        assert eval_fn.calls == report.evaluations - 6
        assert seen == list(range(7, report.evaluations + 1))
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


def test_more_sparsities_reuse_what_is_there(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"
    sensitivity(network.weights(), network.accuracy, (0.5, 0.9), state=state)
    eval_fn = Counting()
    report = sensitivity(network.weights(), eval_fn, (0.5, 0.7), state=state)
    assert (eval_fn.calls, eval_fn.dense) == (3, 0)
    assert report == sensitivity(network.weights(), network.accuracy, (0.5, 0.7))


def test_states_of_other_sweeps_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"
    weights = network.weights()
    sensitivity(weights, network.accuracy, (0.5,), state=state)
    before = state.read_bytes()
    other = {**weights, "mid.weight": weights["mid.weight"] + 1}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (other, {}, "the dense weights differ in 'mid.weight'"),
        (weights, {"config": PruningConfig(method="random")}, "method was"),
        (weights, {"groups": {"all": "*.weight"}}, "groups was"),
    ]
    for tensors, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            sensitivity(tensors, network.accuracy, (0.5,), state=state, **changes)
    assert state.read_bytes() == before
    for text, message in [
        ("{}", "sweep.json: expected the state of a sensitivity sweep; got JSON without"),
        (
            '{"sparsam_sweep": 1, "identity": {}}',
            "sweep.json: expected version 2 of .*; got 1; .* another file",
        ),
        (
            before.decode().replace('"mid.weight",\n   0.5', '"mid.weight",\n   "x"'),
            r"sweep.json: field points\[\d\]\[1\]: expected float; got 'x'; delete it",
        ),
        (
            before.decode().replace('"mid.weight",\n   0.5', '"mid.weight",\n   -1e25'),
            r"sweep.json: field points\[\d\]\[1\]: expected float >= 0.0; got -1e\+25; delete it",
        ),
    ]:
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            sensitivity(weights, network.accuracy, (0.5,), state=state)


# Errors


def test_scores_that_are_no_numbers() -> None:
    nan = EvaluationError, "'in.weight' at sparsity 0.5: ValueError: .*expected a score from eval_fn; got NaN"

    def sometimes(tensors: Arrays) -> float:
        return float("nan") if (tensors["in.weight"] == 0).any() else 1.0

    with pytest.raises(nan[0], match=nan[1]) as caught:
        sensitivity(network.weights(), sometimes, (0.5,))
    assert caught.value.report is not None
    assert caught.value.report.evaluations == 1
    with pytest.raises(EvaluationError, match=r".*expected a number; got 'good'") as caught:
        sensitivity(network.weights(), lambda _: "good", (0.5,))  # type: ignore[arg-type, return-value]
    assert caught.value.report is None
    with pytest.raises(EvaluationError, match="expected a finite score"):
        sensitivity(network.weights(), lambda _: float("-inf"), (0.5,))


def test_arguments() -> None:
    weights = network.weights()
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (ValueError, {"sparsities": ()}, "sparsities: expected a sequence with at least one above 0"),
        (ValueError, {"sparsities": 0.5}, "sparsities: expected a sequence with .* got 0.5"),
        (ValueError, {"groups": {}}, "groups: expected a mapping from groups to the names"),
        (ValueError, {"groups": ["in.weight"]}, "groups: expected a mapping from groups to the names"),
        (ValueError, {"groups": {"a": 3}}, r"groups\['a'\]: expected a name or pattern, or several; got 3"),
        (ValueError, {"sparsities": (1.5,)}, "sparsities: expected a number"),
        (ValueError, {"max_evaluations": 0}, "max_evaluations: expected an integer of at least 1"),
        (
            ValueError,
            {"groups": {"a": "in.weihgt"}},
            r"groups\['a'\]: expected .*; got 'in.weihgt', .* 'in.weight'",
        ),
        (ValueError, {"groups": {"a": "in.bias"}}, "that the configuration prunes; got 'in.bias'"),
        (ValueError, {"groups": {"a": ()}}, "expected at least one name or pattern"),
        (
            ValueError,
            {"groups": {"a": "*.weight", "b": "in.weight"}},
            "'in.weight' in one; got it in 'a' and in 'b'",
        ),
        (ValueError, {"config": PruningConfig(exclude="*")}, "expected tensors to prune"),
        (TypeError, {"config": 0.5}, "config: expected a PruningConfig"),
        (TypeError, {"weights": weights["in.weight"]}, "weights: expected a mapping .* got ndarray"),
        (ValueError, {"weights": {"": weights["in.weight"]}}, "names that are not empty"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(kind, match=message):
            sensitivity(**{"weights": weights, "eval_fn": network.accuracy, **changes})
    with pytest.raises(EvaluationError, match=r"'a' at sparsity 0.3: ValueError: tensor 'a' is NaN at index"):
        sensitivity({"a": np.full((2, 2), np.nan)}, lambda _: 1.0)


# The report


REPORT = sensitivity(network.weights(), network.accuracy, GRID)


def test_json_round_trip(tmp_path: Path) -> None:
    awkward = sensitivity(
        network.weights(),
        lambda w: (
            -np.inf if (w["mid.weight"] == 0).all() else 0.1 + 0.2 * np.count_nonzero(w["in.weight"]) / 3
        ),
        (1 / 3, 1.0),
    )
    for report in (REPORT, awkward):
        assert SensitivityReport.from_json(report.to_json()) == report
        json.loads(report.to_json(), parse_constant=pytest.fail)
        report.save(tmp_path / "report.json")
        assert SensitivityReport.from_json((tmp_path / "report.json").read_bytes()) == report
    assert awkward.curves[1].points[-1].score == -np.inf
    text = REPORT.to_json()
    for bad, message in [
        ("", "sensitivity report: expected a sensitivity report; got no valid JSON"),
        ("[]", "expected a sensitivity report; got JSON without the field 'sparsam_sensitivity'"),
        (text.replace('"sparsam_sensitivity": 2', '"sparsam_sensitivity": 7'), "expected version 2 .* got 7"),
        (text.replace('"pruned"', '"gone"'), r"field curves\[0\].points\[0\].gone: expected no such field"),
        (
            text.replace('"sparsity": 0.25', '"sparsity": 0.5'),
            r"points\[1\].sparsity: expected rising .* 0.5",
        ),
        (text.replace('"pruned": 48', '"pruned": -1'), r"pruned: expected int >= 0; got -1"),
        (text.replace('"pruned": 48', f'"pruned": {2**63}'), rf"pruned: expected int <= {2**53 - 1}; got 9"),
        (text.replace('"pruned": 48', '"pruned": 1e300'), r"pruned: expected int; got 1e\+300"),
        (
            text.replace('"in.weight": ', '"in.weight": -'),
            r"curves\[0\].tensors\[...\]: expected int >= 0; got",
        ),
        (text.replace('"in.weight": ', f'"in.weight": {2**62}'), r"tensors\[...\]: expected int <= .*; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            SensitivityReport.from_json(bad)


def made(dense: float, curves: dict[str, tuple[int, dict[float, float]]]) -> SensitivityReport:
    """A report of scores that are made up: name -> size and sparsity -> score."""
    content = {
        "sparsam_sensitivity": 2,
        "dense_score": dense,
        "method": "m",
        "pattern": "p",
        "curves": [
            {
                "name": name,
                "tensors": {name: size},
                "all_or_nothing": False,
                "points": [
                    {"sparsity": s, "pruned": round(s * size), "score": score} for s, score in scores.items()
                ],
            }
            for name, (size, scores) in curves.items()
        ],
    }
    return SensitivityReport.from_json(json.dumps(content))


MADE = made(
    0.9,
    {
        "delicate": (100, {0.5: 0.6, 0.9: 0.1}),
        "lucky": (200, {0.5: 0.85, 0.9: 0.95}),
        "robust": (1000, {0.5: 0.9, 0.9: 0.895}),
    },
)


def test_ranking() -> None:
    assert MADE.ranking() == ("robust", "lucky", "delicate")
    assert MADE.mean_losses() == pytest.approx(
        {
            "delicate": (0.5 * 0.3 / 2 + 0.4 * (0.3 + 0.8) / 2) / 0.9,
            "lucky": (0.5 * 0.05 / 2 + 0.4 * 0.05) / 0.9,  # what recovers is not trusted
            "robust": 0.4 * 0.005 / 2 / 0.9,
        }
    )
    assert MADE.tolerated() == {"delicate": 0.0, "lucky": 0.0, "robust": 0.9}
    assert MADE.tolerated(0.05000001) == {"delicate": 0.0, "lucky": 0.9, "robust": 0.9}
    assert MADE.tolerated(0) == {"delicate": 0.0, "lucky": 0.0, "robust": 0.5}
    with pytest.raises(ValueError, match="max_drop: expected a drop of at least 0; got -1"):
        MADE.tolerated(-1)


def test_a_dense_score_of_minus_zero_is_zero() -> None:
    report = sensitivity(
        {"a": np.ones((2, 2))}, lambda weights: -float((weights["a"] - 1).sum() ** 2), (0.5,)
    )
    assert str(report).startswith("dense score 0;")


def test_text() -> None:
    assert str(MADE) == (
        "dense score 0.9; scores with one tensor or group pruned, all else dense\n"
        "tolerates: the highest sparsity measured that costs at most 0.009 of the score\n"
        "\n"
        "pruned alone  weights  50 %   90 %  mean loss  tolerates\n"
        "--------------------------------------------------------\n"
        "robust          1,000   0.9  0.895    0.00111       90 %\n"
        "lucky             200  0.85   0.95     0.0361    nothing\n"
        "delicate          100   0.6    0.1      0.328    nothing\n"
        "\n"
        "tolerate the middle sparsity or more: robust\n"
        "do not: delicate, lucky"
    )


# Allocation


def losses(report: SensitivityReport, name: str) -> list[tuple[int, float]]:
    """Pruned weights and loss, by the definition: the worst drop so far, never below 0."""
    (curve,) = (c for c in report.curves if c.name == name)
    worst, found = 0.0, [(0, 0.0)]
    for point in curve.points:
        worst = max(worst, report.dense_score - point.score)
        if point.pruned > found[-1][0]:
            found.append((point.pruned, worst))
    return found


def brute_force(report: SensitivityReport, needed: int) -> float:
    """The least loss over all combinations on the grid that prune enough, by trying them all."""
    levels = [losses(report, curve.name) for curve in report.curves]
    return min(
        sum(loss for _, loss in choice)
        for choice in itertools.product(*levels)
        if sum(pruned for pruned, _ in choice) >= needed
    )


@pytest.mark.parametrize("seed", range(60))
def test_allocation_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = seed % 4
    curves = {}
    for i in range(int(rng.integers(1, 6))):
        grid = sorted(set(rng.choice(np.arange(1, 21), int(rng.integers(1, 6))) / 20))
        scores = {
            0: rng.random(len(grid)),  # anything, also above the dense score
            1: 1 - np.array(grid) ** 3 * rng.random(),  # convex
            2: np.round(1 - rng.random(len(grid)) / 3, 1),  # plateaus and ties
            3: -(10.0 ** rng.integers(-8, 8, len(grid))),  # very different scales
        }[kind]
        curves[f"t{i}"] = (
            int(rng.integers(1, 400)),
            dict(zip(map(float, grid), map(float, scores), strict=True)),
        )
    report = made(0.9 if kind != 3 else 0.0, curves)
    sizes = {name: size for name, (size, _) in curves.items()}
    for target in (0.0, 0.1, 0.37, 0.5, 0.66, 0.8, report.max_sparsity):
        needed = round(target * report.params)
        if needed > round(report.max_sparsity * report.params):
            continue
        found = report.allocate(target)
        counts = {name: s * sizes[name] for name, s in found.items()}
        assert all(abs(count - round(count)) < 1e-9 for count in counts.values())
        assert sum(round(count) for count in counts.values()) == needed
        assert all(0 <= s <= 1 for s in found.values())
        best = brute_force(report, needed)
        # What is given back can only save.
        assert report.predicted_loss(found) <= best * (1 + 1e-11)
        # At most one curve is between two levels: all others, and its level above, are a choice on the grid.
        rounded = 0.0
        between = 0
        for name, count in counts.items():
            levels = losses(report, name)
            above = next(loss for pruned, loss in levels if pruned >= round(count))
            between += round(count) not in [pruned for pruned, _ in levels]
            rounded += above
        assert between <= 1
        assert rounded == pytest.approx(best, rel=1e-10)


def test_the_surplus_goes_back_where_it_saves_most() -> None:
    report = made(1.0, {"a": (100, {0.5: 0.9}), "b": (100, {0.5: 0.8}), "c": (100, {0.1: 0.1})})
    # 60 need both a and b: 40 too many go back to b, whose weights cost twice as much.
    assert report.allocate(0.2) == {"a": 0.5, "b": 0.1, "c": 0.0}
    assert report.predicted_loss(report.allocate(0.2)) == pytest.approx(0.1 + 0.2 / 5)


def test_a_plateau_is_shared_out() -> None:
    flat = dict.fromkeys((0.25, 0.5, 0.75, 1.0), 1.0)
    report = made(1.0, dict.fromkeys("abcd", (100, flat)))
    assert report.allocate(0.5) == dict.fromkeys("abcd", 0.5)
    assert report.allocate(0.25) == dict.fromkeys("abcd", 0.25)


def test_infinite_losses_are_never_chosen() -> None:
    report = made(1.0, {"a": (100, {0.5: 0.9, 0.9: float("-inf")}), "b": (100, {0.5: 0.5, 0.9: -100.0})})
    assert report.max_sparsity == 0.7
    assert report.allocate(0.7) == {"a": 0.5, "b": 0.9}
    with pytest.raises(ValueError, match=r"target: expected at most 0.7, .* got 0.8; measure higher"):
        report.allocate(0.8)
    with pytest.raises(ValueError, match="target: expected a number from 0"):
        report.allocate(1.5)
    with pytest.raises(ValueError, match="'a': expected at most 50 weights"):
        report.predicted_loss({"a": 0.9})


def test_many_tensors_are_no_obstacle() -> None:
    rng = np.random.default_rng(0)
    grid = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9]
    curves = {
        f"t{i}": (int(rng.integers(10**4, 10**8)), dict(zip(grid, np.sort(rng.random(6))[::-1], strict=True)))
        for i in range(150)
    }
    report = made(1.0, curves)
    found = report.allocate(0.65)
    pruned = sum(round(s * curves[name][0]) for name, s in found.items())
    assert pruned == round(0.65 * report.params)
    # No allocation that is uniform on the grid does better.
    assert report.predicted_loss(found) < report.predicted_loss(dict.fromkeys(curves, 0.7))


def test_extreme_scores_allocate() -> None:
    huge = made(1e308, {"a": (100, {0.5: 0.0, 0.9: -1e307}), "b": (100, {0.5: 9e307, 0.9: 8e307})})
    assert huge.allocate(0.45) == {"a": 0.0, "b": 0.9}
    with pytest.raises(ValueError, match="dense_score: expected a finite score to compare with; got inf"):
        SensitivityReport(float("inf"), ())
