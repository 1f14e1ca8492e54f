"""Torch tensors as arrays on the same memory and back, without importing torch."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def is_tensor(value: object) -> bool:
    """Returns whether it is a torch tensor."""
    kind = getattr(sys.modules.get("torch"), "Tensor", None)
    return kind is not None and isinstance(value, kind)


def is_model(value: object) -> bool:
    """Returns whether it is a torch module."""
    kind = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", None)
    return kind is not None and isinstance(value, kind)


def to_numpy(what: str, tensor: Any) -> NDArray[Any]:
    """Returns a tensor as an array on the same memory; bfloat16 becomes that of ml_dtypes.

    Raises:
        TypeError: It is not dense, not on the CPU, requires a gradient, or has a dtype that NumPy lacks; the
            message starts with `what`.
    """
    torch = sys.modules["torch"]
    if str(tensor.layout) != "torch.strided":
        msg = f"{what}: expected a dense tensor; got layout {tensor.layout}; convert it with .to_dense()"
        raise TypeError(msg)
    if tensor.device.type != "cpu":
        msg = f"{what}: expected a tensor on the CPU; got device {tensor.device}; move it with .cpu()"
        raise TypeError(msg)
    if tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
        wanted = "a Parameter or a tensor without gradient"
        msg = f"{what}: expected {wanted}; got requires_grad=True; call .detach()"
        raise TypeError(msg)
    try:
        bits = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return np.asarray(bits.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.asarray(bits.numpy())
    except (TypeError, RuntimeError) as error:
        msg = (
            f"{what}: expected a tensor that NumPy can read; got {type(tensor).__name__} of {tensor.dtype}; "
            f"convert it with .to() ({error})"
        )
        raise TypeError(msg) from error


def to_torch(array: NDArray[Any]) -> Any:
    """Returns a writeable array as a tensor on the same memory."""
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
