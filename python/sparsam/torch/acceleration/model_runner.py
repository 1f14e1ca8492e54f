"""Runs a model without changing it, and returns its outputs and times."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

import torch
from torch import Tensor, nn

__all__ = ["Example", "ModelRunner", "Seconds", "as_examples", "difference", "removed", "unfit"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PIECE = 1 << 22


Key = TypeVar("Key", bound=Hashable)


class Seconds(NamedTuple):
    """A measured time.

    Attributes:
        wall: By the clock.
        cpu: CPU time of the calling thread, which takes part in all parallel work; it excludes the time of
            other processes. (For other threads the kernel knows it only to some milliseconds.)
    """

    wall: float
    cpu: float


class Example(NamedTuple):
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> Example:
        """A copy for one run, which the model may change: tensors are cloned, other objects deep-copied."""
        args, kwargs = pytree.tree_map(_fresh, (self.args, self.kwargs))
        return Example(args, kwargs)


def as_examples(example_inputs: Any) -> list[Example]:
    """The calls that example inputs stand for: a tensor, a tuple, a mapping, or a list of these.

    Raises:
        TypeError: Something else.
        ValueError: An empty list.
    """
    several = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not several:
        msg = "example_inputs: expected at least one example; got an empty list; pass None for none"
        raise ValueError(msg)
    return [_as_example(value) for value in several]


def unfit(error: Exception, what: str, called: str) -> ValueError:
    """The error for inputs that a model cannot be called with.

    Args:
        error: What the model raised.
        what: The argument that holds the inputs.
        called: The model.
    """
    got = f"{type(error).__name__}: {' '.join(str(error).split())}"
    wanted = f"what {called} can be called with"
    return ValueError(f"{what}: expected {wanted}; got {got}; pass the arguments of its forward")


def _as_example(value: Any) -> Example:
    if isinstance(value, Tensor):
        return Example((value,), {})
    if isinstance(value, tuple):
        return Example(value, {})
    if isinstance(value, Mapping):
        return Example((), dict(value))
    msg = (
        "example_inputs: expected a tensor, a tuple of arguments, a mapping of keyword arguments, or a list "
        f"of such examples; got a {type(value).__name__}; wrap a single argument in a tuple"
    )
    raise TypeError(msg)


def _fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _PLAIN):
        return value
    try:
        return copy.deepcopy(value)
    except RuntimeError as error:
        msg = (
            f"example_inputs: expected values to copy for each run; got a {type(value).__name__} that "
            f"cannot ({error!s:.80}); make it under torch.no_grad()"
        )
        raise ValueError(msg) from error


class ModelRunner(AbstractContextManager["ModelRunner"]):
    """A model and examples, for runs without gradients and in eval mode, each from the same random state.

    A context manager: on leaving it, the modules have their training flags again. Buffers that a run changes
    in place or replaces are put back after each.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example]) -> None:
        self._model = model
        self._examples = examples
        self._flags = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> ModelRunner:  # noqa: PYI034 - Self is younger than Python 3.10
        for module, _ in self._flags:
            module.training = False
        return self

    def __exit__(self, *_: object) -> None:
        for module, training in self._flags:
            module.training = training

    def outputs(self) -> list[Any]:
        """The model's outputs for each example."""
        return [self._run(example)[0] for example in self._examples]

    def first_outputs(self) -> list[Any]:
        """The same for the unchanged model, whose errors are therefore due to the examples.

        Raises:
            ValueError: The model raised something, which is the cause of this error.
        """
        for example in self._examples:
            example.fresh()  # which has errors of its own
        try:
            return self.outputs()
        except Exception as error:
            raise unfit(error, "example_inputs", "the model") from error

    def seconds(self) -> Seconds:
        """The time of all examples."""
        wall, cpu = zip(*(self._run(example)[1] for example in self._examples), strict=True)
        return Seconds(sum(wall), sum(cpu))

    def module_seconds(self, modules: Mapping[Key, nn.Module]) -> list[dict[Key, Seconds]]:
        """The times of modules within the model: for each example, the sums over their calls.

        Their `forward` is replaced for that time, not hooked: hooks cost more, and keep transformer layers
        from their fast path.
        """
        found: list[dict[Key, Seconds]] = []
        total: dict[Key, Seconds] = {}
        # A weight that torch.nn.utils.parametrize computes is computed before the clock runs.
        computed = [layer for layer in modules.values() if parametrize.is_parametrized(layer, "weight")]
        with ExitStack() as stack:
            stack.enter_context(parametrize.cached())
            with torch.no_grad():
                for layer in computed:
                    _ = layer.weight
            for key, module in modules.items():
                stack.enter_context(_timed(module, key, total))
            for example in self._examples:
                self._run(example)
                found.append(dict(total))
                total.clear()
        return found

    def _run(self, example: Example) -> tuple[Any, Seconds]:
        """The model's outputs for an example, and the time."""
        args, kwargs = example.fresh()
        buffers = _Buffers(self._model)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                start = _clocks()
                output = self._model(*args, **kwargs)
                end = _clocks()
        finally:
            buffers.put_back()
        return output, Seconds(end.wall - start.wall, end.cpu - start.cpu)


def _clocks() -> Seconds:
    return Seconds(time.perf_counter(), time.thread_time())


@contextmanager
def _timed(module: nn.Module, key: Key, total: dict[Key, Seconds]) -> Iterator[None]:
    """Adds the times of a module's calls to the total, for the duration of the block."""
    own = vars(module)
    patched = own.get("forward")
    forward = module.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _clocks()
        output = forward(*args, **kwargs)
        end = _clocks()
        before = total.get(key, Seconds(0.0, 0.0))
        total[key] = Seconds(before.wall + end.wall - start.wall, before.cpu + end.cpu - start.cpu)
        return output

    own["forward"] = timed
    try:
        yield
    finally:
        if patched is None:
            del own["forward"]
        else:
            own["forward"] = patched


class _Buffers:
    """A copy of a model's buffers, to restore them."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (module, name, buffer, buffer.detach().clone(), _version(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        for module, name, buffer, content, version in self._before:
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(content)
            module._buffers[name] = buffer


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def removed(hooks: Iterator[Any]) -> Iterator[None]:
    """Registers hooks, for the time of the block."""
    registered: list[Any] = []
    try:
        registered.extend(hooks)
        yield
    finally:
        for hook in registered:
            hook.remove()


def difference(outputs: Any, reference: Any) -> float | None:
    """The largest difference of two runs' outputs, relative to the largest finite number of the reference.

    Infinite where shapes or infinities differ; None where there are no tensors of floats to compare.
    """
    ours, theirs = _floats(outputs), _floats(reference)
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    worst = largest = 0.0
    for ours_all, theirs_all in zip(ours, theirs, strict=True):
        for a, b in zip(_pieces(ours_all), _pieces(theirs_all), strict=True):
            same = (a == b) | (a.isnan() & b.isnan())
            apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
            worst = max(worst, float(apart.max()))
            largest = max(largest, float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    if not ours:
        return None
    if worst == 0:
        return 0.0
    return worst / largest if largest else math.inf


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The elements in pieces, so that a comparison takes little memory."""
    tensor = tensor.detach().reshape(-1)
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return list(torch.split(wide, _PIECE)) if wide.numel() else []


def _floats(outputs: Any) -> list[Tensor]:
    """The tensors of floats in outputs, in mappings and dataclasses too."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() and not leaf.is_nested:
                found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _floats(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _floats([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found
