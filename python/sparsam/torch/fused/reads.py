"""Which attributes of a module, and of those in it, its forward reads."""

from __future__ import annotations

import functools
import types
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ABSENT", "FUSED", "HOOKS", "Dependencies", "Read", "Reads"]

FUSED = "_sparsam_fused"  # an attribute of the forward of fused modules
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What modules keep these in; what is in them is looked up by name, or watched apart.
_TABLES = ("_parameters", "_buffers", "_modules")
_LATE = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_UNWATCHED = {*_TABLES, *HOOKS, *_LATE, "_non_persistent_buffers_set"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_FIXED = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    type,
    nn.Module,
    Tensor,
)


class _Absent:
    """What an attribute is that an object does not have itself."""


ABSENT = _Absent  # a class, so that copies and pickles are the same object


@dataclass(frozen=True)
class Read:
    """An attribute that was read.

    Attributes:
        owner: The module, or an object that a module has, such as its configuration.
        table: "" for its own attribute, else the table of the module that has it, such as "_parameters".
        name: The name.
        value: What it was; `ABSENT` where only the class has it.
    """

    owner: Any
    table: str
    name: str
    value: Any

    def where(self) -> dict[str, Any]:
        """The dictionary that has it."""
        own = vars(self.owner)
        found: dict[str, Any] = own[self.table] if self.table else own
        return found

    def now(self) -> Any:
        """What it is now."""
        return self.where().get(self.name, ABSENT)

    def holds(self) -> bool:
        """Whether it is what it was."""
        now = self.now()
        inside = self.name == "forward" and hasattr(getattr(now, "func", None), FUSED)
        return inside or _alike(now, self.value)  # a module inside that is fused itself computes the same


@dataclass(frozen=True)
class Dependencies:
    """What the result of a forward depends on, beside its arguments and the numbers of tensors.

    Attributes:
        reads: Attributes.
        modules: The module itself, then those in it, whose hooks would run.
        kinds: Their classes.
        children: How many modules each has.
        forwards: Each class, with the function that computes.
    """

    reads: tuple[Read, ...]
    modules: tuple[nn.Module, ...]
    kinds: tuple[type[nn.Module], ...]
    children: tuple[int, ...]
    forwards: tuple[tuple[type[nn.Module], Any], ...]


class Reads(AbstractContextManager["Reads"]):
    """Notes which attributes of a module, of those in it and of objects of these are read in the block."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules = tuple(module.modules())
        objects = {
            id(value): value for one in self._modules for value in vars(one).values() if _has_state(value)
        }
        self._kinds = {id(one): (one, type(one)) for one in (*self._modules, *objects.values())}
        self._names: dict[tuple[int, str], None] = {}
        self._before: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Reads:  # noqa: PYI034 - Self is younger than Python 3.10
        self._before = {key: dict(vars(one)) for key, (one, _) in self._kinds.items()}
        for key, (one, kind) in list(self._kinds.items()):
            try:
                object.__setattr__(one, "__class__", _noting(kind, self._names))
            except TypeError:  # a class of another kind
                del self._kinds[key]
        return self

    def __exit__(self, *_: object) -> None:
        for one, kind in self._kinds.values():
            object.__setattr__(one, "__class__", kind)

    def dependencies(self) -> Dependencies | None:
        """What was read; None if the block changed a module, or read what may change unseen."""
        for key, (one, _) in self._kinds.items():
            now, before = vars(one), self._before[key]
            if now.keys() != before.keys() or any(now[name] is not before[name] for name in now):
                return None
        reads = [
            _read(self._kinds[key][0], name)
            for key, name in self._names
            if name not in _UNWATCHED and not name.startswith("__")
        ]
        # The module's own forward is what is replaced.
        reads = [read for read in reads if read.owner is not self._module or read.name != "forward"]
        reads += [
            Read(one, "_modules", name, value)
            for one in self._modules
            for name, value in one._modules.items()
        ]
        if not all(self._is_watched(read.value) for read in reads):
            return None
        kinds: tuple[type[nn.Module], ...] = tuple(map(type, self._modules))
        children = tuple(len(one._modules) for one in self._modules)
        forwards = tuple((kind, kind.forward) for kind in dict.fromkeys(kinds))
        return Dependencies(tuple(reads), self._modules, kinds, children, forwards)

    def _is_watched(self, value: Any) -> bool:
        """Whether a change of a value, or in it, would be seen."""
        if isinstance(value, tuple):
            return all(map(self._is_watched, value))
        return value is ABSENT or is_plain(value) or isinstance(value, _FIXED) or id(value) in self._kinds


def is_plain(value: Any) -> bool:
    """Whether equal values are the same, and cannot change."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are the same object, or equal and without anything that can change."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, functools.partial):  # packed layers get a new one whenever they are installed
        return (
            a.func is b.func
            and _alike(a.args, b.args)
            and a.keywords.keys() == b.keywords.keys()
            and all(_alike(value, b.keywords[name]) for name, value in a.keywords.items())
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return is_plain(a) and bool(a == b)


def _has_state(value: Any) -> bool:
    """Whether it is an object with attributes, of a class written in Python."""
    return hasattr(value, "__dict__") and not isinstance(value, (*_FIXED, dict, list, set))


def _read(owner: Any, name: str) -> Read:
    own = vars(owner)
    if not isinstance(owner, nn.Module):  # configurations of transformers have some under other names
        name = getattr(type(owner), "attribute_map", {}).get(name, name)
        return Read(owner, "", name, own.get(name, ABSENT))
    if name in own:
        return Read(owner, "", name, own[name])
    table = next((table for table in _TABLES if name in own[table]), "")
    return Read(owner, table, name, own[table][name] if table else ABSENT)


def _noting(kind: type[Any], names: dict[tuple[int, str], None]) -> type[Any]:
    """A class that notes what is read of its objects."""

    def read(self: Any, name: str) -> Any:
        names[id(self), name] = None
        return kind.__getattribute__(self, name)  # type: ignore[call-arg]

    class Noting(_Empty):
        __getattribute__ = read

    Noting.__bases__ = (kind,)  # afterwards, without what the class does for a new subclass
    Noting.__name__, Noting.__qualname__, Noting.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return Noting


class _Empty:
    """Replaced by another class."""
