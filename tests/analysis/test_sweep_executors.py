from __future__ import annotations

import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import network
from sparsam.analysis import executor as task_runner
from sparsam.analysis.sweep import EvaluationError, sensitivity
from sparsam.config import PruningConfig
from sparsam.patterns import Slices
from sparsam.scores import Random
from sparsam.training.callbacks import Arrays
from sweeps import MATRICES, TENTHS, Counting


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
