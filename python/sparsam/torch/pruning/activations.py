"""How much memory the activations of a forward pass take, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch import Tensor

__all__ = ["ActivationMeter", "Activations"]


@dataclass
class Activations:
    """The bytes of the activations of one batch in one part, without those in files.

    Attributes:
        held: The most that are in memory while the pass waits.
        most: The most that are in memory.
        made: All that are computed, as a backward pass needs them.
        moved: The most that the inputs of weights with the same inputs have, and three times their outputs.
    """

    held: int = 0
    most: int = 0
    made: int = 0
    moved: int = 0

    def times(self, share: float) -> Activations:
        """Those of a batch that is larger by a factor."""
        return Activations(*(int(share * size) for size in (self.held, self.most, self.made, self.moved)))


class ActivationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors that are computed while it is entered, as long as something refers to them.

    Attributes:
        found: Part -> its activations; a part is whatever `begin` gets.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[object, Activations] = {}
        self._live = 0
        self._known: dict[int, ref[Any]] = {}
        self._now = Activations()  # before the first part; what is between parts belongs to the one before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:  # not a view, of a weight say
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or storage.filename is not None or not size:
            return

        def gone(_: object) -> None:
            self._live -= size
            self._known.pop(key, None)

        self._known[key] = ref(storage, gone)
        self._live += size
        self._now.made += size
        self._now.most = max(self._now.most, self._live)

    def begin(self, part: object) -> None:
        """A part begins."""
        self._now = self.found.setdefault(part, Activations())
        self._now.most = max(self._now.most, self._live)
        self.wait()

    def wait(self) -> None:
        """A pass may wait here."""
        self._now.held = max(self._now.held, self._live)

    def move(self, size: int) -> None:
        """The inputs of a weight, and three times its outputs, are copied."""
        self._now.moved = max(self._now.moved, size)


def _storages(values: Any) -> list[Any]:
    """The memory of all tensors."""
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
