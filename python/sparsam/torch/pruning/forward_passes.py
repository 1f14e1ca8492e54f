"""Forward passes that pause where a layer is to be pruned, one thread for each batch.

Each batch goes through a network once. At a weight that is not pruned yet its thread waits, with its
activations on its own stack, until the weight has been fitted to the inputs from all batches. So no layer is
computed twice, whatever the model does between its layers, and only the current activations are in memory.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import torch
from sparsam.inputs.system import return_freed_memory
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.layer_inputs import Inputs
from sparsam.torch.pruning.tracked_outputs import Residual, Tracked, step_of
from torch import Tensor, nn

__all__ = ["Gate", "Pass", "Slots", "advance", "current_pass", "end"]

_SUMS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_RECTIFIERS = ("relu", "relu_")
_active = threading.local()


def current_pass() -> Pass | None:
    """The forward pass that runs in this thread."""
    found: Pass | None = getattr(_active, "current", None)
    return found


class Ended(BaseException):
    """Raised in a pass that is not needed any more."""


class Gate:
    """The entry of a part of a network, at which passes wait while the part is not in memory.

    Attributes:
        open: Whether it is in memory.
        head: Whether it is the output layer of a language model, of which nothing is pruned.
        inside: The passes that are in it.
    """

    def __init__(self, *, head: bool) -> None:
        self.open, self.head = False, head
        self.inside: set[Pass] = set()


class Slots:
    """Limits how many passes compute at the same time."""

    def __init__(self, passes: int, *, frugal: bool = False) -> None:
        """Slots for a number of passes; `frugal`: each returns freed memory to the system when it waits.

        The C library keeps what a thread has freed for the same thread, and each pass has one.
        """
        self._frugal = frugal
        threads = torch.get_num_threads()
        self.running = max(1, min(threads, passes))
        self.each = max(1, threads // self.running)
        self._free = threading.Semaphore(self.running)

    def __enter__(self) -> None:
        self._free.acquire()

    def __exit__(self, *_: object) -> None:
        if self._frugal:
            return_freed_memory()
        self._free.release()


class Pass:
    """One batch in its forward pass through a network. Subclasses decide where it waits.

    Attributes:
        batch: The batch.
        finished: Whether the pass has ended.
        gate: The gate at which it waits, if it waits at one.
    """

    def __init__(self, network: nn.Module, batch: Batch, index: int, slots: Slots) -> None:
        self.batch = batch
        self.finished = False
        self.gate: Gate | None = None
        self._network, self._index, self._slots = network, index, slots
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._tracked: dict[int, Tracked] = {}

    # Subclasses override these; see `layer_inputs.Visitor`.

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        """A weight is about to be used."""

    def after(self, name: str, output: Callable[[], Tensor | None]) -> None:
        """A weight was used."""

    def meets(self, residual: Residual) -> None:
        """A tracked output is about to be added to something."""

    def added(self, name: str, total: Tensor) -> None:
        """A tracked output was added to something."""

    def lost(self, tracked: Tracked) -> None:
        """A tracked output was used in another way."""

    def rectified(self, tracked: Tracked, result: Tensor) -> None:  # noqa: ARG002
        """A tracked output went into a ReLU, which returned `result`."""
        self.lost(tracked)

    def joined(self, tracked: Sequence[Tracked]) -> Tracked:
        """Chooses which of two tracked outputs, added to each other, is tracked further."""
        return tracked[-1]

    def measured(self) -> AbstractContextManager[object]:
        """What is entered in the thread of the pass while it runs."""
        return nullcontext()

    def track(self, name: str, output: Tensor) -> None:
        """Starts to track an output."""
        self._tracked[id(output)] = Tracked(name, output)

    def enter(self, gate: Gate) -> None:
        """Waits until a gate is open, and goes in."""
        if not gate.open:
            self.gate = gate
            self.wait()
            self.gate = None
        gate.inside.add(self)

    def leave(self, gate: Gate) -> None:
        """Comes out of a gate, if it is inside."""
        gate.inside.discard(self)

    def wait(self) -> None:
        """Waits in the thread of the pass until it is resumed."""
        _active.current = None
        self._slots.__exit__()
        self._stopped.release()
        self._go.acquire()
        self._slots.__enter__()
        if self._ended:
            raise Ended
        _active.current = self

    # The methods below are called by the thread that prunes.

    @property
    def begun(self) -> bool:
        """Whether the pass has been resumed once."""
        return self._thread is not None

    def resume(self) -> None:
        """Lets the pass continue."""
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=lambda: context.run(self._run), daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                msg = f"calibration: expected fewer batches, each has a thread; got {error}; use larger ones"
                raise ValueError(msg) from error
        else:
            self._go.release()

    def join(self) -> None:
        """Blocks until the pass waits or has finished; raises the error that ended it, if any."""
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Ends the pass wherever it is."""
        self._ended = True
        if self._thread is not None and not self.finished:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._slots, torch.no_grad():
                torch.set_num_threads(self._slots.each)
                _active.current = self
                with self.measured(), _Watch(self):
                    self._network(*self.batch.args, **self.batch.kwargs)
        except Ended:
            pass
        except ValueError as error:
            self._error = error
        except Exception as error:
            wanted = "inputs that the model runs with"
            msg = (
                f"calibration: batch {self._index}: expected {wanted}; got {_described(error)}; correct them"
            )
            self._error = ValueError(msg)
            self._error.__cause__ = error
        finally:
            _active.current = None
            self.finished = True
            self._tracked.clear()
            self._stopped.release()

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of PyTorch, and records what it does with tracked outputs."""
        if not self._tracked:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        hits = [self._tracked[id(value)] for value in args if id(value) in self._tracked]
        if hits and name in _SUMS and len(args) == 2 and not kwargs and _can_add(*args):
            own = hits[0] if len(hits) == 1 else self.joined(hits)
            for one in hits:
                self._forget(one)
            other = args[1] if args[0] is own.tensor else args[0]
            self.meets(Residual(own, other))
            result = func(*args)
            self.added(own.name, result)
            return result
        if (
            len(hits) == 1
            and id(args[0]) in self._tracked
            and (step := step_of(name, func, args, kwargs, hits[0]))
        ):
            self._forget(hits[0])
            result = func(*args, **kwargs)
            hits[0].through(step, result)
            self._tracked[id(result)] = hits[0]
            return result
        if name == "copy_" and len(hits) == 1 and args[1] is hits[0].tensor:
            self._forget(hits[0])
            result = func(*args, **kwargs)
            hits[0].through(lambda tensor: tensor, result)
            self._tracked[id(result)] = hits[0]
            return result
        result = func(*args, **kwargs)
        if name in _RECTIFIERS and len(hits) == 1:
            self._forget(hits[0])
            self.rectified(hits[0], result)
            return result
        if isinstance(result, (torch.Size, torch.dtype, torch.device, torch.layout, bool, int, str)):
            return result
        for value in pytree.tree_leaves((args, kwargs)):
            gone = self._tracked.get(id(value))
            if gone is not None and gone.tensor is value:
                self._forget(gone)
                self.lost(gone)
        return result

    def _forget(self, tracked: Tracked) -> None:
        self._tracked.pop(id(tracked.tensor), None)


class _Watch(TorchFunctionMode):
    def __init__(self, owner: Pass) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._owner.function(func, args, kwargs or {})


def _described(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _can_add(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and not isinstance(a, nn.Parameter)
        and not isinstance(b, nn.Parameter)
    )


def advance(passes: Iterable[Pass]) -> None:
    """Lets passes continue, until each waits again or has finished."""
    moving = [one for one in passes if not one.finished]
    for one in moving:
        one.resume()
    for one in moving:
        one.join()


def end(passes: Collection[Pass]) -> None:
    """Ends passes wherever they are."""
    for one in passes:
        one.end()
