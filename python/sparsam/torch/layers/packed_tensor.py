"""PackedTensor: a dense weight to all who ask, and packed bytes in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils import _pytree as pytree

import torch
from sparsam.sparse.arguments import numbers
from sparsam.sparse.dispatch import Explanation
from sparsam.torch.layers import products, recurrent
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight, pack_matrix, to_array
from torch import Tensor, nn

__all__ = ["PackedTensor"]

_HANDLERS = {**products.HANDLERS, **recurrent.HANDLERS}
_aten = torch.ops.aten
_SAME = frozenset((_aten.detach.default, _aten.alias.default))


@dataclass(frozen=True)
class Layout:
    """How a weight is packed.

    Attributes:
        shape: The shape of the dense tensor.
        dtype: Its dtype; the values may be stored as another.
        groups: The groups of its output channels.
        transposed: Whether it is (in, out), as in the Conv1D of Hugging Face's GPT-2.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int = 1
    transposed: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix whose rows belong to outputs."""
        outs, ins = self.shape[0], math.prod(self.shape[1:])
        return (ins, outs) if self.transposed else (outs, ins)

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer, and not of a convolution."""
        return len(self.shape) == 2 and self.groups == 1


class Content:
    """What a packed tensor, its aliases and its views have in common.

    Attributes:
        data: The bytes (uint8).
        layout: What they stand for.
        outs: The outputs of the matrix; 0 where it is no matrix but a convolution.
        original: The Parameter that was packed, or None.
        released: Whether that is empty for now, for its memory.
        changed: Whether the weight was changed after it was packed.
        learns: Whether it would be trained if it were dense: then going backward must not lose it silently.
    """

    def __init__(self, data: Tensor, layout: Layout, original: nn.Parameter | None = None) -> None:
        self.data = data
        self.layout = layout
        self.outs = layout.matrix[0] if len(layout.shape) == 2 else 0
        self.original = original
        self.released = False
        self.changed = False
        self.learns = original is not None and original.requires_grad
        self.read: PackedWeight | None = None  # what `data` holds, once it was asked for

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            self.read = None

    @property
    def weight(self) -> PackedWeight:
        """The matrices that the bytes hold."""
        read = self.read
        if read is None:
            self.read = read = PackedWeight.read(self.data)
        return read

    def unpack(self) -> Tensor:
        """The dense tensor."""
        layout = self.layout
        matrix: Tensor = torch.ops.sparsam.unpack(self.data, *layout.matrix, layout.dtype)
        return matrix.T.contiguous() if layout.transposed else matrix.reshape(layout.shape)

    def pack(self, dense: Tensor) -> None:
        """Takes new values, in the forms that the old ones had."""
        weight = self.weight
        self.data = _pack(dense, self.layout, weight.dtype, weight.forms)
        self.changed = True

    def cast(self, dtype: torch.dtype) -> Content:
        """The content for a layer that computes in another dtype."""
        weight, old = self.weight, self.layout
        layout = replace(old, dtype=dtype)
        values = dtype if weight.dtype == old.dtype else weight.dtype
        data = _pack(self.unpack().to(dtype), layout, values, weight.forms)
        cast = Content(data, layout, self.original)
        cast.released, cast.changed, cast.learns = self.released, True, self.learns
        return cast


class PackedTensor(Tensor):
    """A pruned weight of a layer on the CPU: shape, dtype and so on of the dense tensor, and packed bytes.

    Put in the place of a layer's weight (`sparsam.torch.pack(layer)` does that), it lets the layer run as it
    is: linear layers and convolutions multiply with the packed weight; what else is computed with it gets
    the dense numbers, unpacked again each time. In-place changes of it, of its `data` and of its views are
    packed again. `to` another floating dtype packs it in that; another device is an error. It has no
    gradient: going backward through a product with it raises. Exported and traced programs own the packed
    bytes; where one is loaded, `import sparsam.torch` comes first.
    """

    _content: Content
    _views: tuple[tuple[Any, ...], ...]
    _start: int  # of a view: the element of the dense tensor that it begins with

    @staticmethod
    def __new__(  # noqa: PYI034 - Self is younger than Python 3.10
        cls,
        content: Content,
        views: tuple[tuple[Any, ...], ...] = (),
        like: Tensor | None = None,
        start: int = 0,
    ) -> PackedTensor:
        """For this package; use `pack`."""
        shape = content.layout.shape if like is None else like.shape
        with torch.inference_mode(False):  # a view is none of inference if its base is not
            made: PackedTensor = Tensor._make_wrapper_subclass(
                cls,
                shape,
                strides=None if like is None else like.stride(),
                dtype=content.layout.dtype,
                device=content.data.device,
                requires_grad=False,
            )
        made._content = content
        made._views = views
        made._start = start
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Everything is done in `__new__`."""

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        groups: int = 1,
        transposed: bool = False,
    ) -> PackedTensor:
        """Packs a tensor (out, in / groups, ...); pruned is what is exactly 0.

        Args:
            weight: float32, bfloat16 or float16, dense, on the CPU. A Parameter gives a Parameter, and is
                remembered: `sparsam.torch.restore` puts it back.
            dtype: What to store the values as, one of these too; by default as they are.
            groups: Output channels split into so many groups, each a matrix of its own.
            transposed: `weight` is (in, out), as in the Conv1D of Hugging Face's GPT-2.

        Raises:
            TypeError: Another dtype or layout; a tensor that is packed already.
            ValueError: The tensor is not on the CPU.
        """
        if isinstance(weight, PackedTensor):
            msg = "weight: expected a dense tensor; got a PackedTensor; use its to_dense()"
            raise TypeError(msg)
        values = dtype or weight.dtype
        for what, got in (("weight", weight.dtype), ("dtype", values)):
            if got not in DTYPES:
                wanted = ", ".join(map(str, DTYPES))
                msg = f"{what}: expected one of {wanted}; got {got}; convert the model first"
                raise TypeError(msg)
        if weight.device.type != "cpu":
            msg = f"weight: expected a tensor on the CPU; got one on {weight.device}; use .cpu() first"
            raise ValueError(msg)
        if weight.layout is not torch.strided:
            msg = f"weight: expected a dense tensor; got {weight.layout}; use weight.to_dense()"
            raise TypeError(msg)
        layout = Layout(tuple(weight.shape), weight.dtype, groups, transposed)
        data = _pack(weight.detach(), layout, values, ("panels",))
        if isinstance(weight, nn.Parameter):
            return cls.of_content(Content(data, layout, weight))
        return cls(Content(data, layout))

    @classmethod
    def of_content(cls, content: Content) -> PackedTensor:
        """A Parameter with that content."""
        made = cls(content)
        made._is_param = True  # isinstance(made, nn.Parameter)
        return made

    @property
    def packed(self) -> PackedWeight:
        """The matrices that are multiplied with."""
        return self._content.weight

    @property
    def original(self) -> nn.Parameter | None:
        """The Parameter that was packed, which may be empty for now; None if there was none."""
        return self._content.original

    @property
    def packed_data(self) -> Tensor:
        """The bytes of the packed weight (uint8), which graphs own."""
        return self._content.data

    def prepare(self, batches: int | Sequence[int]) -> None:
        """Packs the weight in the forms that these numbers of rows of x need, by what products cost.

        Costs are defaults of this package, or what `sparsam calibrate` measured on this machine; nothing is
        measured now. It is one form, or two where one would be slower by more than a quarter for some of
        them and both take less memory than a dense weight by far, which narrow values do. Until then, and
        always in convolutions and other weights in groups, it is "panels", which suits all batches.

        Raises:
            ValueError: There are no batches, or one below 1.
        """
        wanted = numbers("batches", batches, at_least=1)
        if not wanted:
            msg = f"batches: expected numbers of at least 1; got {batches!r}; pass the rows that x will have"
            raise ValueError(msg)
        content = self._content
        if not content.layout.is_matrix:
            return
        if (forms := content.weight.needed_forms(wanted)) != content.weight.forms:
            content.data = content.weight.with_forms(forms)

    def explain(self, batch: int) -> Explanation:
        """Which kernel multiplies so many rows of x, and what the others and the dense layer would take.

        Costs as for `prepare`. Convolutions have one kernel, and no costs that could be compared: there
        `accelerate` measures.

        Raises:
            ValueError: `batch` is below 0.
        """
        (batch,) = numbers("batch", [batch], at_least=0)
        if not self._content.layout.is_matrix:
            return Explanation(repr(self), batch, "panels", "the kernel of convolutions", ())
        choice = self.packed.choices.choice(batch)
        return Explanation(repr(self), batch, choice.kernel, choice.reason, choice.candidates)

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The dense tensor, unpacked; a pruned -0.0 comes back as 0.0, narrower values as they are."""
        dense = self._content.unpack()
        return _follow(dense, self._views) if self._views else dense

    @property
    def data(self) -> PackedTensor:
        """This weight without gradients; what is changed in it is changed here."""
        return self._alias()

    @data.setter
    def data(self, new: Tensor) -> None:
        if new.shape != self.shape or (isinstance(new, PackedTensor) and self._views):
            msg = f"data: expected shape {tuple(self.shape)}; got {tuple(new.shape)}; replace the Parameter"
            raise ValueError(msg)
        if isinstance(new, PackedTensor) and not new._views and new._content.layout == self._content.layout:
            self._content.data, self._content.changed = new._content.data, True
        else:
            with torch.no_grad():
                self.copy_(new)

    def requires_grad_(self, requires_grad: bool = True) -> PackedTensor:
        """Freezes the weight: going backward through its products raises no more for its sake.

        Raises:
            RuntimeError: `requires_grad` is True, which a packed weight cannot have.
        """
        if requires_grad:
            msg = "weight: expected requires_grad=False; got True, and a packed weight has no gradient"
            msg += "; call sparsam.torch.restore(model) first"
            raise RuntimeError(msg)
        if isinstance(self, nn.Parameter):  # and not an alias that becomes one
            self._content.learns = False
        return self

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """The dense numbers as an array that cannot be written to, for this would change nothing here."""
        array = self.detach().to_dense().numpy(force=force)
        array.setflags(write=False)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For NumPy: as `numpy`, a copy anyway."""
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        """The dense numbers."""
        return self.to_dense().tolist()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed weight."""
        return self._content.data.nbytes

    def data_ptr(self) -> int:
        """The address of the packed bytes."""
        return self._content.data.data_ptr()

    def share_memory_(self) -> PackedTensor:
        """Moves the bytes into memory that processes can share."""
        self._content.data = self._content.data.clone().share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Whether they are there."""
        return self._content.data.is_shared()  # type: ignore[no-any-return, no-untyped-call]

    def _alias(self) -> PackedTensor:
        return PackedTensor(self._content, self._views, _meta(self) if self._views else None, self._start)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        old = self._content
        if (content := memo.get(id(old))) is None:
            content = memo[id(old)] = Content(old.data, old.layout)
            content.original = copy.deepcopy(old.original, memo)
            content.released, content.changed, content.learns = old.released, old.changed, old.learns
        like = _meta(self) if self._views else None
        made = PackedTensor(content, self._views, like, self._start)
        if isinstance(self, nn.Parameter):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        if self._views:
            return self.to_dense().__reduce_ex__(_)  # type: ignore[no-any-return, no-untyped-call]
        content = self._content
        # A copy: torch moves the memory of what is sent to another process.
        state = (content.data.clone(), content.layout, content.original)
        flags = (content.released, content.changed, content.learns, isinstance(self, nn.Parameter))
        return _rebuild, (*state, *flags)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if type(self._content.data) is not Tensor or self._views:
            return f"PackedTensor({tuple(self.shape)}, dtype={self.dtype})"
        weight, layout = self._content.weight, self._content.layout
        values = "" if weight.dtype == layout.dtype else f", values={weight.dtype}"
        return (
            f"PackedTensor({'x'.join(map(str, layout.shape))}, density={weight.density:.4g}, "
            f"dtype={layout.dtype}{values})"
        )

    @property
    def _inner(self) -> Tensor:
        return self._content.data

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_inner"], (self._content.layout, self._views, self._start)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> PackedTensor:
        layout, views, start = context
        like = torch.empty_strided(outer_size, outer_stride, device="meta") if views else None
        content = Content(inner["_inner"], layout)
        return PackedTensor(content, views, like, start)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = _HANDLERS.get(func)
        if product is not None:
            found = product(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        if torch._C._get_tracing_state() is not None:  # a trace must not hold a tensor without memory
            args, kwargs = pytree.tree_map_only(PackedTensor, PackedTensor.to_dense, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0]._alias()
        if func is _aten._to_copy.default:
            return _to_copy(*args, **kwargs)
        if func.is_view and isinstance(args[0], PackedTensor):
            return _view(func, args, kwargs)
        if func._schema.is_mutable:
            return _in_place(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(PackedTensor, PackedTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)


def _pack(dense: Tensor, layout: Layout, values: torch.dtype, forms: Sequence[str]) -> Tensor:
    matrix = dense.to(values)
    matrix = matrix.T if layout.transposed else matrix.reshape(layout.matrix)
    return pack_matrix(to_array(matrix), groups=layout.groups, forms=forms)


def _rebuild(
    data: Tensor,
    layout: Layout,
    original: nn.Parameter | None,
    released: bool,
    changed: bool,
    learns: bool,
    parameter: bool,
) -> PackedTensor:
    content = Content(data, layout, original)
    content.released, content.changed, content.learns = released, changed, learns
    made = PackedTensor(content)
    if parameter:
        made._is_param = True
    return made


def _meta(tensor: Tensor) -> Tensor:
    """A tensor of that shape, without numbers."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _follow(dense: Tensor, views: tuple[tuple[Any, ...], ...]) -> Tensor:
    """The view of a dense tensor."""
    found: Any = dense
    for func, args, kwargs, index in views:
        found = func(found, *args, **dict(kwargs))
        found = found if index is None else found[index]
    return found  # type: ignore[no-any-return]


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view that writes through; what it shows is unpacked when it is asked for."""
    base: PackedTensor = args[0]
    shown = func(_meta(base), *args[1:], **kwargs)
    step = (func, _frozen(args[1:]), tuple(kwargs.items()))

    def view(index: int | None, one: Tensor) -> PackedTensor:
        start = base._start + int(one.storage_offset())
        return PackedTensor(base._content, (*base._views, (*step, index)), one, start)

    return view(None, shown) if isinstance(shown, Tensor) else [view(*one) for one in enumerate(shown)]


def _frozen(value: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs what changes its arguments on dense ones, and packs those again that were packed."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        msg = f"{func}: expected no change of a packed weight in a graph; change it outside of it"
        raise RuntimeError(msg)
    bases: dict[int, tuple[Content, Tensor]] = {}
    shown: dict[int, PackedTensor] = {}

    def dense(tensor: PackedTensor) -> Tensor:
        content = tensor._content
        _, base = bases.setdefault(id(content), (content, content.unpack()))
        view = _follow(base, tensor._views)
        shown[id(view)] = tensor
        return view

    def written(name: str, position: int) -> bool:
        info = func._schema.arguments[position].alias_info if name == "" else named[name].alias_info
        return info is not None and info.is_write

    named = {argument.name: argument for argument in func._schema.arguments}
    changed: set[int] = set()
    for position, value in enumerate(args):
        if written("", position):
            changed |= {id(t._content) for t in pytree.tree_leaves(value) if isinstance(t, PackedTensor)}
    for name, value in kwargs.items():
        if written(name, 0):
            changed |= {id(t._content) for t in pytree.tree_leaves(value) if isinstance(t, PackedTensor)}
    plain_args, plain_kwargs = pytree.tree_map_only(PackedTensor, dense, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for key, (content, base) in bases.items():
        if key in changed:
            content.pack(base)
    return pytree.tree_map_only(Tensor, lambda t: shown.get(id(t), t), result)


def _to_copy(tensor: PackedTensor, *, dtype: Any = None, device: Any = None, **others: Any) -> Any:
    wanted, place = dtype or tensor.dtype, torch.device(device or "cpu")
    if tensor._views:
        return _aten._to_copy.default(tensor.to_dense(), dtype=dtype, device=device, **others)
    if place.type != "cpu" or wanted not in DTYPES:
        msg = (
            f"a packed layer is for the CPU and {', '.join(map(str, DTYPES))}: it cannot go to {place} in "
            f"{wanted}; call sparsam.torch.restore(model) first, or use weight.to_dense()"
        )
        raise RuntimeError(msg)
    return PackedTensor(tensor._content.cast(wanted))
