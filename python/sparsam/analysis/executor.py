"""One job, many small tasks, over any `concurrent.futures.Executor`.

A job holds what all tasks share (the weights, the functions), and may be large; a task is small. Tasks are
therefore sent without the job. A worker that does not have the job says so, and the task is sent again
together with it, so that the job is sent about once to each worker and not with each task. Threads, and
processes forked after the start, share the memory of the caller and are sent nothing.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from os import getpid
from typing import Any, Generic, TypeVar

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

_HEADROOM = 4
"""How many tasks are submitted beyond two for each known worker, so that they reach workers not yet known."""

_own: dict[str, Callable[[Any], Any]] = {}
"""The jobs that this process started, by token."""

_sent: dict[str, Callable[[Any], Any]] = {}
"""The job that another process sent here last."""


class TaskError(Exception):
    """A task failed: `task` says which, `__cause__` why. Results of other tasks were yielded before."""

    def __init__(self, task: Any, reason: str) -> None:
        super().__init__(reason)
        self.task = task


@dataclass(frozen=True)
class _Answer(Generic[ResultT]):
    """The answer of a worker: a result, an error, or the message that the job is missing."""

    worker: tuple[str, int, int]
    result: ResultT | None = None
    error: Exception | None = None
    trace: str = ""
    missing: bool = False


class TaskRunner(Generic[TaskT, ResultT]):
    """Runs the tasks of a job on an executor. A context manager: the job is released at the end."""

    def __init__(self, job: Callable[[TaskT], ResultT], executor: Executor | None) -> None:
        """Takes the job, called with each task, and the executor; None: here, one task after the other."""
        self._job = job
        self._executor = executor
        self._token = secrets.token_hex(16)
        self._workers: set[tuple[str, int, int]] = set()
        self._without_job: set[tuple[str, int, int]] = set()
        self._attempts = 0

    def __enter__(self) -> TaskRunner[TaskT, ResultT]:
        _own[self._token] = self._job
        return self

    def __exit__(self, *_: object) -> None:
        del _own[self._token]

    def run(self, tasks: Iterable[TaskT]) -> Generator[tuple[TaskT, ResultT], None, None]:
        """Yields each task with its result: in order without an executor, else as they are finished.

        If it is closed early, it cancels the tasks that have not begun.

        Raises:
            TaskError: The job raised, or the executor could not run it. No further task is begun, and those
                that are running are waited for and yielded first. Of several failures the earliest task's is
                reported.
        """
        if self._executor is None:
            for task in tasks:
                try:
                    result = self._job(task)
                except Exception as error:
                    raise TaskError(task, _described(error)) from error
                yield task, result
        else:
            yield from _Submissions(self, self._executor, tasks).results()

    def submit(self, executor: Executor, task: TaskT, *, with_job: bool) -> Future[_Answer[ResultT]]:
        """Submits a task to the executor."""
        # The count makes each attempt a different call: Dask answers an equal call with the result it has.
        self._attempts += 1
        job = self._job if with_job else None
        with warnings.catch_warnings():
            # Dask warns about large data sent with every task; this is sent about once to each worker.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            return executor.submit(_work, self._token, self._attempts, task, job)

    def seen(self, worker: tuple[str, int, int], *, missing: bool) -> None:
        """Records a worker that answered, and whether it has the job."""
        self._workers.add(worker)
        (self._without_job.add if missing else self._without_job.discard)(worker)

    @property
    def without_job(self) -> int:
        """How many workers said that they do not have the job."""
        return len(self._without_job)

    @property
    def room(self) -> int:
        """How many tasks may be submitted at the same time."""
        return 2 * len(self._workers) + _HEADROOM


class _Submissions(Generic[TaskT, ResultT]):
    """The tasks of one run, and the futures of those submitted."""

    def __init__(
        self, runner: TaskRunner[TaskT, ResultT], executor: Executor, tasks: Iterable[TaskT]
    ) -> None:
        self._runner = runner
        self._executor = executor
        self._waiting = deque(enumerate(tasks))
        self._submitted: dict[Future[_Answer[ResultT]], tuple[int, TaskT, bool]] = {}
        self._postponed: list[tuple[int, TaskT]] = []
        self._failures: list[tuple[int, TaskT, Exception, str]] = []

    def results(self) -> Iterator[tuple[TaskT, ResultT]]:
        try:
            while True:
                while self._waiting and len(self._submitted) < self._runner.room:
                    self._submit(*self._waiting.popleft(), with_job=False)
                if not self._submitted:
                    break
                done, _ = wait(self._submitted, return_when=FIRST_COMPLETED)
                for future in [future for future in self._submitted if future in done]:
                    yield from self._receive(future)
                if not self._submitted_with_job():
                    self._waiting.extendleft(reversed(self._postponed))
                    self._postponed.clear()
        finally:
            for future in self._submitted:
                future.cancel()
        if self._failures:
            _, task, error, reason = min(self._failures, key=lambda failure: failure[0])
            raise TaskError(task, reason) from error

    def _submit(self, place: int, task: TaskT, *, with_job: bool) -> None:
        try:
            future = self._runner.submit(self._executor, task, with_job=with_job)
        except Exception as error:
            self._fail(place, task, error, _undelivered(error))
        else:
            self._submitted[future] = place, task, with_job

    def _submitted_with_job(self) -> int:
        """How many submitted tasks carry the job."""
        return sum(with_job for *_, with_job in self._submitted.values())

    def _receive(self, future: Future[_Answer[ResultT]]) -> Iterator[tuple[TaskT, ResultT]]:
        place, task, _ = self._submitted.pop(future)
        if future.cancelled():
            return
        if (broken := future.exception()) is not None:
            if not isinstance(broken, Exception):
                raise broken
            self._fail(place, task, broken, _undelivered(broken))
            return
        answer = future.result()
        self._runner.seen(answer.worker, missing=answer.missing)
        if answer.missing and self._failures:
            return
        if answer.missing and self._submitted_with_job() < self._runner.without_job:
            self._submit(place, task, with_job=True)
        elif answer.missing:
            # There is a task with the job under way for each worker without it.
            self._postponed.append((place, task))
        elif answer.error is not None:
            if answer.error.__traceback__ is None:
                answer.error.__cause__ = RuntimeError(f"in the worker:\n{answer.trace}")
            self._fail(place, task, answer.error, _described(answer.error))
        else:
            yield task, answer.result  # type: ignore[misc]

    def _fail(self, place: int, task: TaskT, error: Exception, reason: str) -> None:
        self._failures.append((place, task, error, reason))
        self._waiting.clear()
        self._postponed.clear()
        # Cancelled tasks are not waited for: not every executor reports them as done.
        for future in [future for future in self._submitted if future.cancel()]:
            del self._submitted[future]


def _work(token: str, attempt: int, task: TaskT, job: Callable[[TaskT], ResultT] | None) -> _Answer[ResultT]:
    """Runs in the worker."""
    del attempt
    here = (socket.gethostname(), getpid(), threading.get_ident())
    if job is not None:
        _sent.clear()
        _sent[token] = job
    found = job or _own.get(token) or _sent.get(token)
    if found is None:
        return _Answer(here, missing=True)
    try:
        return _Answer(here, result=found(task))
    except Exception as error:
        return _Answer(here, error=_portable(error), trace=traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """The error, or one with the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of the user's may raise
        return RuntimeError(_described(error))
    return error


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _undelivered(error: BaseException) -> str:
    return (
        f"the executor could not run it ({_described(error)}); for processes, eval_fn, the weights and the "
        "configuration must pickle: use functions of a module, or a ThreadPoolExecutor"
    )
