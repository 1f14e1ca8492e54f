"""PackedTensor: behaves as the dense weight, and holds packed bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

import torch
from sparsam.sparse.arguments import numbers
from sparsam.sparse.dispatch import Explanation
from sparsam.torch.layers import attention, convolutions, products, recurrent
from sparsam.torch.layers.packed_content import Content, Layout, pack_dense
from sparsam.torch.layers.packed_weight import DTYPES, VALUES, PackedWeight
from sparsam.torch.layers.phases import Phases
from sparsam.torch.layers.tensor_views import change, follow, give_memory, meta, view, without_memory
from sparsam.torch.layers.unpacked_tensor import is_foreign
from torch import Tensor, nn

__all__ = ["PackedTensor"]

_HANDLERS = {**products.HANDLERS, **convolutions.HANDLERS, **attention.HANDLERS, **recurrent.HANDLERS}
_aten = torch.ops.aten
_NO_MEMORY = (
    "weight: expected a dense tensor, whose memory can be read; got a packed one; use weight.to_dense(), or "
    "call sparsam.torch.restore(model) first"
)
_SAME = frozenset((_aten.detach.default, _aten.alias.default))


class PackedTensor(Tensor):
    """A packed weight of a layer on the CPU, with the shape, dtype and other properties of the dense tensor.

    It replaces a layer's weight (`sparsam.torch.pack(layer)` does that), and the layer runs unchanged: linear
    layers and convolutions multiply with the packed weight; all other operations get the dense numbers,
    unpacked each time. In-place changes of it, of its `data` and of its views are packed again. `to` another
    floating dtype packs it in that dtype; another device is an error. A backward pass through a product with
    it raises. Exported and traced programs own the packed bytes; import `sparsam.torch` before loading one.
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
        strides = None if like is None else like.stride()
        with torch.inference_mode(False):  # a view must not be an inference tensor if its base is not
            made: PackedTensor = without_memory(
                cls, shape, strides, content.layout.dtype, content.data.device
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
        looked_up: bool = False,
        phases: Phases | None = None,
    ) -> PackedTensor:
        """Packs a tensor (out, in / groups, ...); weights that are exactly 0 are pruned.

        Args:
            weight: float32, bfloat16 or float16, dense, on the CPU. A Parameter gives a Parameter, and is
                remembered: `sparsam.torch.restore` puts it back.
            dtype: The dtype of the stored values: one of these, `torch.int8` or `torch.int4`; by default that
                of the weight. Integers, with a scale for each output or for each 64 or 128 inputs of one,
                round the values, and products round their inputs too.
            groups: The number of groups of output channels, each a matrix of its own.
            transposed: `weight` is (in, out), as in the Conv1D of Hugging Face's GPT-2.
            looked_up: Rows of `weight` are looked up, as those of an embedding; values are int8 then.
            phases: The geometry of a transposed convolution, whose weight is (in, out / groups, ...).

        Raises:
            TypeError: Another dtype or layout; a tensor that is packed already.
            ValueError: The tensor is not on the CPU.
        """
        if isinstance(weight, PackedTensor):
            msg = "weight: expected a dense tensor; got a PackedTensor; use its to_dense()"
            raise TypeError(msg)
        values = dtype or weight.dtype
        for what, got, known in (("weight", weight.dtype, DTYPES), ("dtype", values, VALUES)):
            if got not in known:
                wanted = ", ".join(map(str, known))
                msg = f"{what}: expected one of {wanted}; got {got}; convert the model first"
                raise TypeError(msg)
        if weight.device.type != "cpu":
            msg = f"weight: expected a tensor on the CPU; got one on {weight.device}; use .cpu() first"
            raise ValueError(msg)
        if weight.layout is not torch.strided:
            msg = f"weight: expected a dense tensor; got {weight.layout}; use weight.to_dense()"
            raise TypeError(msg)
        if is_foreign(weight):
            kind = type(weight).__name__
            msg = f"weight: expected a dense tensor; got one of class {kind}; leave it as it is"
            raise TypeError(msg)
        if looked_up and values is not torch.int8:
            msg = f"dtype: expected torch.int8 for an embedding; got {values}; pass that, or leave it dense"
            raise TypeError(msg)
        layout = Layout(tuple(weight.shape), weight.dtype, groups, transposed, looked_up, phases)
        is_parameter = isinstance(weight, nn.Parameter)
        if is_parameter and (content := Content.find(weight, layout, values)) is not None:
            found = _in_place_of(content)
            return cls.of_content(content) if found is None else found
        data = pack_dense(weight.detach(), layout, values, ("rows",) if looked_up else ("panels",))
        if is_parameter:
            return cls.of_content(Content(data, layout, weight))  # type: ignore[arg-type]
        return cls(Content(data, layout))

    @classmethod
    def of_content(cls, content: Content) -> PackedTensor:
        """A Parameter with that content."""
        return _as_parameter(cls(content))

    @property
    def packed(self) -> PackedWeight:
        """The matrices that are multiplied with."""
        return self._content.weight

    @property
    def original(self) -> nn.Parameter | None:
        """The Parameter that was packed, whose memory may be released; None if there was none."""
        return self._content.original

    @property
    def packed_data(self) -> Tensor:
        """The bytes of the packed weight (uint8), which graphs own."""
        return self._content.data

    def prepare(self, batches: int | Sequence[int]) -> None:
        """Packs the weight in the forms that these numbers of rows of x need, according to the cost model.

        Costs are defaults of this package, or those that `sparsam calibrate` measured on this machine; this
        call measures nothing. One form is held, or two if some batch would be more than a quarter slower with
        one and both together take far less memory than a dense weight, as with narrow values. Before this
        call, and always in convolutions and other weights in groups, it is "panels", which suits all batches.

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
        """Which kernel multiplies `batch` rows of x; the expected times of all kernels and the dense layer.

        Costs as for `prepare`. Convolutions have one kernel and no costs to compare; `accelerate` measures
        them.

        Raises:
            ValueError: `batch` is below 0.
        """
        (batch,) = numbers("batch", [batch], at_least=0)
        if self._content.layout.looked_up:
            return Explanation(repr(self), batch, "rows", "which are looked up", ())
        if not self._content.layout.is_matrix:
            (kernel, *_), values = self.packed.forms, self.packed.dtype
            why = "the kernel of int8 values" if values is torch.int8 else "the kernel of convolutions"
            return Explanation(repr(self), batch, kernel, why, ())
        choice = self.packed.choices.choice(batch)
        return Explanation(repr(self), batch, choice.kernel, choice.reason, choice.candidates)

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The dense tensor, unpacked; a pruned -0.0 comes back as 0.0, narrower values as they are."""
        dense = self._content.unpack()
        return follow(dense, self._views) if self._views else dense

    @property
    def data(self) -> PackedTensor:
        """This weight without gradients; changes of it change this weight."""
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
        """Freezes the weight: it no longer makes a backward pass through its products raise.

        Raises:
            RuntimeError: `requires_grad` is True, which a packed weight cannot have.
        """
        if requires_grad:
            msg = (
                "weight: expected requires_grad=False; got True, but a packed weight has no gradient; call "
                "sparsam.torch.restore(model) first"
            )
            raise RuntimeError(msg)
        if isinstance(self, nn.Parameter):  # and not an alias that becomes one
            self._content.trainable = False
        return self

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """The dense weight as a read-only array, since writing to it would not change this tensor."""
        array = self.detach().to_dense().numpy(force=force)
        array.setflags(write=False)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For NumPy: as `numpy`; writeable if a copy is requested."""
        array = self.numpy()
        return array.astype(dtype or array.dtype, copy=bool(copy))

    def __dlpack__(self, **options: Any) -> Any:
        """For other libraries: a copy of the dense numbers."""
        return self.to_dense().__dlpack__(**options)

    def hold_dense(self) -> None:
        """Gives the tensor real memory with its present dense values, for code that reads memory directly.

        That is TorchScript, which saves the Parameters of what it traced.
        """
        with torch.no_grad():
            give_memory(self, self.to_dense())

    def tolist(self) -> Any:
        """The dense numbers."""
        return self.to_dense().tolist()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed weight."""
        return self._content.data.nbytes

    def data_ptr(self) -> int:
        """Raises: the memory of a packed weight is not that of a dense tensor, which readers expect."""
        raise RuntimeError(_NO_MEMORY)

    def apply_(self, function: Any) -> PackedTensor:
        """Changes each number; PyTorch's own would read memory."""
        with torch.no_grad():
            return self.copy_(self.to_dense().apply_(function))  # type: ignore[return-value]

    def share_memory_(self) -> PackedTensor:
        """Moves the bytes into memory that processes can share."""
        self._content.data = self._content.data.clone().share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Whether the bytes are in shared memory."""
        return self._content.data.is_shared()  # type: ignore[no-any-return, no-untyped-call]

    def _alias(self) -> PackedTensor:
        return PackedTensor(self._content, self._views, meta(self) if self._views else None, self._start)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        content = copy.deepcopy(self._content, memo)
        like = meta(self) if self._views else None
        made = PackedTensor(content, self._views, like, self._start)
        memo[id(self)] = _as_parameter(made) if isinstance(self, nn.Parameter) else made
        return made

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        if self._views:
            return self.to_dense().__reduce_ex__(_)  # type: ignore[no-any-return, no-untyped-call]
        return _rebuild, (self._content, isinstance(self, nn.Parameter))

    def __format__(self, spec: str) -> str:
        return format(self.to_dense() if self.ndim == 0 else repr(self), spec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        plain = type(self._content.data) is Tensor
        if plain and self._views:  # somebody looks at some of the numbers
            return repr(self.to_dense())
        if not plain:
            return f"PackedTensor({tuple(self.shape)}, dtype={self.dtype})"
        weight, layout = self._content.weight, self._content.layout
        values = "" if weight.dtype == layout.dtype else f", values={weight.dtype}"
        density = weight.nnz / self.numel() if self.numel() else 1.0
        shape = "x".join(map(str, layout.shape))
        return f"PackedTensor({shape}, density={density:.4g}, dtype={layout.dtype}{values})"

    @property
    def _inner(self) -> Tensor:
        return self._content.data

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_inner"], (self._content.layout, self._views, self._start)

    def _stable_hash_for_caching(self) -> str:
        """The key of a compiled graph in PyTorch's cache: everything but the bytes, which are its input."""
        known = (self._content.layout, self._views, self._start, self.shape, self._inner.shape)
        return f"{type(self).__name__} {known} {self.dtype} {self.requires_grad}"

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
            return view(func, args, kwargs)
        if func._schema.is_mutable:
            return change(PackedTensor, func, args, kwargs)
        args, kwargs = pytree.tree_map_only(PackedTensor, PackedTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)


def _rebuild(content: Content, parameter: bool) -> PackedTensor:
    return _as_parameter(PackedTensor(content)) if parameter else PackedTensor(content)


def _as_parameter(made: PackedTensor) -> PackedTensor:
    """Marks the tensor as a Parameter for isinstance, and returns it."""
    made._is_param = True
    return made


def _in_place_of(content: Content) -> PackedTensor | None:
    """Returns the tensor with that content that a module still has, if there is one."""
    if content.place is None:
        return None
    owner, name = content.place[0](), content.place[1]
    found = None if owner is None else owner._parameters.get(name)
    return found if isinstance(found, PackedTensor) and found._content is content else None


def _to_copy(tensor: PackedTensor, *, dtype: Any = None, device: Any = None, **others: Any) -> Any:
    wanted, place = dtype or tensor.dtype, torch.device(device or "cpu")
    if tensor._views:
        return _aten._to_copy.default(tensor.to_dense(), dtype=dtype, device=device, **others)
    if place.type != "cpu" or wanted not in DTYPES:
        msg = (
            f"packed weight: expected the CPU and {', '.join(map(str, DTYPES))}; got {place} and {wanted}; "
            "call sparsam.torch.restore(model) first, or use weight.to_dense()"
        )
        raise RuntimeError(msg)
    return PackedTensor(tensor._content.cast(wanted))
