"""SparseLinear and SparseConv2d: layers whose weights are packed, for inference on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import functional

import torch
from sparsam.torch.layers.operators import ACTIVATIONS, conv2d, is_plain, linear, refuse
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight
from torch import Tensor, nn

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear", "is_transposed"]

with torch.inference_mode(False):
    _LEARNS = torch.empty(0, requires_grad=True, device="cpu")
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.6


class SparseLayer(nn.Module):
    """What packed layers share: the weight, the bias, the activation after them, and the way back.

    The weight is no Parameter: a packed layer computes, and does not train. Going backward through one is an
    error that says so; in training mode also where its input needs no gradient, unless the weights were
    frozen before they were packed. `state_dict` has the dense `weight` and `bias` under their usual names,
    and `load_state_dict` packs what it finds there. `to`, `half` and the like change the dtype; another
    device is an error. Copies of a layer share the packed weight.

    Attributes:
        packed: The weight.
        bias: The bias, a buffer, or None.
        original: The module that was replaced. It is no submodule.
    """

    bias: Tensor | None

    def __init__(self, original: nn.Module, packed: PackedWeight, activation: str | None = None) -> None:
        super().__init__()
        self._hidden = (original,)  # in a tuple, so that it is not registered as a submodule
        self._released = False
        self._learns = any(parameter.requires_grad for parameter in original.parameters())
        self.packed = packed
        self.activation = activation
        bias: Any = original.bias  # a plain tensor where torch.nn.utils.prune or parametrize compute it
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.training = original.training

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):  # would not be trained; by tie_weights() of Hugging Face, say
            msg = f"a packed layer takes no Parameter {name!r}: call sparsam.torch.restore(model) first"
            raise TypeError(msg)
        super().__setattr__(name, value)

    @property
    def original(self) -> nn.Module:
        """The module that was replaced."""
        return self._hidden[0]

    @property
    def activation(self) -> str | None:
        """The activation that is applied to the sums: None, "relu", "gelu", "gelu_tanh" or "silu"."""
        return self._activation or None

    @activation.setter
    def activation(self, name: str | None) -> None:
        if name is not None and name not in ACTIVATIONS:
            known = ", ".join(repr(known) for known in ACTIVATIONS if known)
            msg = f"activation={name!r}: expected None or one of {known}"
            raise ValueError(msg)
        self._activation = name or ""

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked on each call."""
        return self.packed.unpack()

    def release(self) -> bool:
        """Frees the weight of `original` if it can be unpacked again exactly; returns whether it is free."""
        parameter = self.original._parameters.get("weight")
        if parameter is None or self._released:
            return self._released
        if not parameter.numel():  # by a layer whose weight is tied to this one
            self._released = self.packed.nbytes > 0
            return self._released
        if not torch.equal(parameter.detach(), self.weight):
            return False
        self._released = True  # first: an interrupt in between must not lose the weight
        parameter.data = parameter.data.new_empty(0)
        return True

    def restored(self) -> nn.Module:
        """`original`, with its weight back in place and the state that this layer is in now."""
        original = self.original
        bias = original._parameters.get("bias")
        if bias is not None and self.bias is not None and not torch.equal(bias.detach(), self.bias):
            with torch.no_grad():  # in a copy, or after to(), they do not share their memory
                bias.copy_(self.bias)
        if self._released:
            original.get_parameter("weight").data = self.weight
            self._released = False
        return original.train(self.training)

    def _trained(self) -> Tensor | None:
        """A tensor that requires a gradient, in place of the weights, where these would be trained."""
        if not (self.training and self._learns and torch.is_grad_enabled()):
            return None
        compiling = torch.compiler.is_compiling()
        traced = _is_exporting() if compiling else torch._C._get_tracing_state() is not None
        return None if traced else _LEARNS  # a trace is for inference, and holds no such constant

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        probe = fn(torch.empty(0, dtype=self.packed.dtype, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype not in DTYPES:
            msg = (
                f"a packed layer is for the CPU and {', '.join(map(str, DTYPES))}: it cannot go to "
                f"{probe.device} in {probe.dtype}; call sparsam.torch.restore(model) first"
            )
            raise RuntimeError(msg)
        self.packed = self.packed.astype(probe.dtype)
        self.original._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        new = own.pop(key := prefix + "weight", None)
        bias = prefix + "bias"
        if isinstance(own.get(bias), nn.Parameter):
            own[bias] = own[bias].detach()  # assign=True would make a Parameter of the buffer
        if new is None:
            if strict:
                missing_keys.append(key)
        elif tuple(new.shape) != self.packed.shape:
            error_msgs.append(f"{key}: expected shape {self.packed.shape}; got {tuple(new.shape)}")
        else:
            self._set_weight(new)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _set_weight(self, new: Tensor) -> None:
        old = self.packed
        if not self._released and "weight" in self.original._parameters:
            with torch.no_grad():
                self.original.weight.copy_(new)  # type: ignore[operator]
        self.packed = PackedWeight.pack(
            new.detach().to("cpu", old.dtype),
            dtype=old.value_dtype,
            groups=old.groups,
            transposed=old.transposed,
        )

    def _described(self) -> str:
        after = f", activation={self.activation}" if self.activation else ""
        return f"bias={self.bias is not None}, density={self.packed.density:.3f}{after}"


class SparseLinear(SparseLayer):
    """A `torch.nn.Linear` (or the Conv1D of Hugging Face's GPT-2) whose weight is packed.

    Args:
        linear: The layer, on the CPU, float32, bfloat16 or float16. Its zeros are what is skipped.
        dtype: What to store the values as, `torch.bfloat16` say; by default as they are. Sums are float32.
        activation: Applied to the result: None, "relu", "gelu", "gelu_tanh" or "silu".

    Raises:
        TypeError: Another kind of layer or of numbers.
        ValueError: The layer is not on the CPU; an unknown activation.
    """

    def __init__(
        self, linear: nn.Module, *, dtype: torch.dtype | None = None, activation: str | None = None
    ) -> None:
        transposed = is_transposed(linear)
        if not (isinstance(linear, nn.Linear) or transposed):
            msg = f"SparseLinear: expected a torch.nn.Linear; got {type(linear).__name__}"
            raise TypeError(msg)
        packed = PackedWeight.pack(linear.weight, dtype=dtype, transposed=transposed)  # type: ignore[arg-type]
        super().__init__(linear, packed, activation)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.packed.cols

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.packed.rows

    def forward(self, input: Tensor) -> Tensor:
        """activation(x W^T + bias) for x (..., in), in the dtype of x, or of autocast where that is on."""
        x = _autocast(input)
        learns = self._trained()
        if learns is None and is_plain(x):
            return linear(x, self.packed, self.bias, self._activation)
        refuse(x)
        found: Tensor = torch.ops.sparsam.linear(x, self.packed.handle, self.bias, self._activation, learns)
        return found

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._described()}"


class SparseConv2d(SparseLayer):
    """A `torch.nn.Conv2d` or `Conv1d` whose weight is packed.

    Args:
        conv: The layer: any stride, padding, dilation and groups; on the CPU, float32, bfloat16 or float16.
        dtype: As for `SparseLinear`.
        activation: As for `SparseLinear`.

    Raises:
        TypeError: Another kind of layer or of numbers.
        ValueError: The layer is not on the CPU; an unknown activation.
    """

    def __init__(
        self, conv: nn.Module, *, dtype: torch.dtype | None = None, activation: str | None = None
    ) -> None:
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d)):
            msg = f"SparseConv2d: expected a torch.nn.Conv2d or Conv1d; got {type(conv).__name__}"
            raise TypeError(msg)
        weight = conv.weight
        packed = PackedWeight.pack(weight, dtype=dtype, groups=conv.groups)
        super().__init__(conv, packed, activation)
        flat = isinstance(conv, nn.Conv1d)
        self._flat = flat  # images of one row
        self._mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.stride, self.dilation = (_pair(value, 1, flat) for value in (conv.stride, conv.dilation))
        self.padding = (0, 0) if isinstance(conv.padding, str) else _pair(conv.padding, 0, flat)
        self._around: tuple[int, ...] = ()
        if conv.padding == "same" or self._mode != "constant":
            # (left, right, top, bottom), as functional.pad wants them: unequal, or not zeros.
            self._around = tuple(conv._reversed_padding_repeated_twice)
            self.padding = (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of x (n, in, height, width) or (in, height, width), and the activation."""
        x = input
        rank = 2 if self._flat else 3
        if x.ndim not in {rank, rank + 1}:
            msg = f"x has shape {tuple(x.shape)}: expected {rank} axes, or {rank + 1} with a batch"
            raise ValueError(msg)
        x = _autocast(x)
        if self._around:
            x = functional.pad(x, self._around, self._mode)
        images = x if x.ndim == rank + 1 else x[None]
        y = self._convolve(images[:, :, None] if self._flat else images)
        y = y[:, :, 0] if self._flat else y
        return y if x.ndim == rank + 1 else y[0]

    def _convolve(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation)
        learns = self._trained()
        if learns is None and is_plain(x):
            return conv2d(x, self.packed, self.bias, *geometry, self._activation)
        refuse(x)
        found: Tensor = torch.ops.sparsam.conv2d(
            x, self.packed.handle, self.bias, *geometry, self._activation, learns
        )
        return found

    def extra_repr(self) -> str:
        """What `repr` shows."""
        shape = self.packed.shape
        sizes = f"{shape[1] * self.packed.groups}, {shape[0]}, kernel_size={shape[2:]}, stride={self.stride}"
        padding = f"padding={self._around or self.padding}, groups={self.packed.groups}"
        return f"{sizes}, {padding}, {self._described()}"


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer with the weight (in, out)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _autocast(x: Tensor) -> Tensor:
    """X as autocast would hand it to a linear layer."""
    if torch.is_autocast_enabled("cpu") and x.dtype in DTYPES:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def _pair(values: tuple[int, ...], first: int, flat: bool) -> tuple[int, int]:
    return (first, values[0]) if flat else (values[0], values[1])
