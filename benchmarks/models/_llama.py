"""Products of llama.cpp's kernels: a graph of ggml with weights in Q4_0, by ctypes on what xllamacpp has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["Ggml"]

_Q4_0, _F32 = 2, 0  # of enum ggml_type
_POINTER, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_FEATURES = ("avx2", "avx_vnni", "avx512", "avx512_vnni")


class _InitParams(ctypes.Structure):
    _fields_: ClassVar = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The library.

    Attributes:
        features: The instruction sets that it was built for and uses here.
    """

    def __init__(self) -> None:
        """Raises SystemExit where xllamacpp is not installed."""
        package = find_spec("xllamacpp")
        if package is None or package.origin is None:
            raise SystemExit("expected the package xllamacpp: pip install xllamacpp gguf")  # noqa: EM101
        (file,) = Path(package.origin).parent.glob("xllamacpp*.so")
        self._library = ctypes.CDLL(str(file))
        self.features = [name for name in _FEATURES if self._call(f"ggml_cpu_has_{name}", ctypes.c_int)]

    def _call(self, name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))

    def _tensor(self, context: Any, kind: int, cols: int, rows: int) -> Any:
        sizes = ((_INT64, cols), (_INT64, rows))
        return self._call("ggml_new_tensor_2d", _POINTER, (_POINTER, context), (ctypes.c_int, kind), *sizes)

    def _allocate(self, context: Any, buffer_type: str) -> None:
        kind = self._call(buffer_type, _POINTER)
        allocate = "ggml_backend_alloc_ctx_tensors_from_buft"
        assert self._call(allocate, _POINTER, (_POINTER, context), (_POINTER, kind))

    def _set(self, tensor: Any, data: NDArray[Any]) -> None:
        address = (_POINTER, data.ctypes.data)
        size = (_SIZE, data.nbytes)
        self._call("ggml_backend_tensor_set", None, (_POINTER, tensor), address, (_SIZE, 0), size)

    def products(
        self, weights: Sequence[NDArray[np.float32]], x: Mapping[int, NDArray[np.float32]], threads: int
    ) -> Callable[[], object]:
        """What multiplies all weights, rounded to Q4_0 and repacked, with the x that has their columns.

        Raises:
            AssertionError: A product is not that of the rounded weight.
        """
        params = (_InitParams, _InitParams(64 << 20, None, True))
        held, context = (self._call("ggml_init", _POINTER, params) for _ in range(2))
        tensors = [self._tensor(held, _Q4_0, w.shape[1], w.shape[0]) for w in weights]
        inputs = {cols: self._tensor(context, _F32, cols, 1) for cols in x}
        graph = self._call(
            "ggml_new_graph_custom", _POINTER, (_POINTER, context), (_SIZE, 4096), (ctypes.c_bool, False)
        )
        outputs = []
        for tensor, w in zip(tensors, weights, strict=True):
            pair = ((_POINTER, tensor), (_POINTER, inputs[w.shape[1]]))
            outputs.append(self._call("ggml_mul_mat", _POINTER, (_POINTER, context), *pair))
            self._call("ggml_build_forward_expand", None, (_POINTER, graph), (_POINTER, outputs[-1]))
        self._allocate(held, "_Z35ggml_backend_cpu_repack_buffer_typev")
        self._allocate(context, "ggml_backend_cpu_buffer_type")
        kind = gguf.GGMLQuantizationType.Q4_0
        for tensor, w in zip(tensors, weights, strict=True):
            self._set(tensor, np.ascontiguousarray(gguf.quants.quantize(w, kind)))
        for cols, row in x.items():
            self._set(inputs[cols], row)
        backend = self._call("ggml_backend_cpu_init", _POINTER)
        count = (ctypes.c_int, threads)
        self._call("ggml_backend_cpu_set_n_threads", None, (_POINTER, backend), count)
        compute = self._library.ggml_backend_graph_compute
        compute.restype, compute.argtypes = ctypes.c_int, [_POINTER, _POINTER]
        assert compute(backend, graph) == 0
        for output, w in zip(outputs[:7], weights, strict=False):
            y = np.empty(len(w), np.float32)
            place = ((_POINTER, y.ctypes.data), (_SIZE, 0), (_SIZE, y.nbytes))
            self._call("ggml_backend_tensor_get", None, (_POINTER, output), *place)
            right = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind) @ x[w.shape[1]]
            assert np.abs(y - right).max() < 0.03 * np.abs(right).max()
        return lambda: compute(backend, graph)
