"""UnpackedTensor: the dense values of a packed weight; changes of either show in the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

import torch
from sparsam.torch.layers.packed_content import Content
from sparsam.torch.layers.tensor_views import written
from torch import Tensor, nn

__all__ = ["UnpackedTensor", "is_foreign"]


def is_foreign(tensor: Tensor) -> bool:
    """Whether it is a tensor of another library's class, such as torchao's, and so without dense memory."""
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not isinstance(tensor, UnpackedTensor) and not hasattr(tensor, "_content")


class _Whole:
    """All numbers of a packed weight, unpacked."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._seen = content.data  # the bytes that were unpacked
        self.dense = content.unpack()

    def refresh(self) -> None:
        """Unpacks the weight again if it was changed since."""
        if self._content.data is not self._seen:
            self._seen = self._content.data
            self.dense.copy_(self._content.unpack())

    def store(self) -> None:
        """Packs the numbers, which were changed here."""
        self._content.pack(self.dense)
        self._seen = self._content.data


class UnpackedTensor(Tensor):
    """The dense numbers of a packed weight, or a view of them, as a state dict has them.

    In-place changes change the packed weight. Saved, pickled or copied, it is a plain tensor; results
    computed from it are plain tensors too.
    """

    _plain: Tensor
    _whole: _Whole | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: Tensor, whole: _Whole | None) -> UnpackedTensor:  # noqa: PYI034
        """For this package; use `of`."""
        made: UnpackedTensor = Tensor._make_subclass(cls, plain)  # the same memory
        made._plain, made._whole = plain, whole
        return made

    def __init__(self, *_: Any) -> None:
        """Everything is done in `__new__`."""

    @classmethod
    def of(cls, content: Content) -> UnpackedTensor:
        """The numbers of a packed weight."""
        with torch.inference_mode(False), torch.no_grad():
            whole = _Whole(content)
            return cls(whole.dense, whole)

    @property
    def data(self) -> Tensor:
        """The same numbers without gradients."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        with torch.no_grad():
            self.copy_(new)

    def numpy(self, *, force: bool = False) -> Any:
        """The values as a read-only array, since writing to it would not change the weight."""
        array = self._current().numpy(force=force)
        array.setflags(write=False)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For NumPy: as `numpy`; writeable if a copy is requested."""
        array = self.numpy()
        return array.astype(dtype or array.dtype, copy=bool(copy))

    def tolist(self) -> Any:
        """The numbers."""
        return self._current().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self._current())

    def __dlpack__(self, **options: Any) -> Any:
        """For other libraries: a copy."""
        return self._current().clone().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            plain = self._current().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(plain, self.requires_grad) if is_parameter else plain
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self._current()
        as_it_is = nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain
        return as_it_is.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _current(self) -> Tensor:
        """The plain tensor on the same memory, with the present values of the weight."""
        if self._whole is not None:
            self._whole.refresh()
        return self._plain

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, __: Any, ___: Any) -> UnpackedTensor:
        return UnpackedTensor(inner["_plain"], None)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {id(t._plain): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, cls)}
        plain = pytree.tree_map_only(cls, cls._current, (args, kwargs))
        found = func(*plain[0], **plain[1])
        for whole in {t._whole for t in written(cls, func, args, kwargs) if t._whole is not None}:
            whole.store()
        if func.is_view and isinstance(args[0], cls):
            whole = args[0]._whole
            return pytree.tree_map_only(Tensor, lambda one: cls(one, whole), found)
        return pytree.tree_map_only(Tensor, lambda one: given.get(id(one), one), found)
