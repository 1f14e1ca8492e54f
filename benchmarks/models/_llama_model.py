"""A whole model through llama.cpp: files in Q4_0, and tokens one by one, by ctypes on what xllamacpp has."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["LlamaModel", "write_q4_0"]

_Q4_0, _Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class _Opaque(ctypes.Structure):
    """A structure that is handed on as it came, at least as large as any of the library."""

    _fields_ = [("words", ctypes.c_uint64 * 256)]


def write_q4_0(source: Path, target: Path, *, output: bool) -> None:
    """Writes the model with all matrices in Q4_0.

    Args:
        source: A file of another type.
        target: The file to write.
        output: Whether the embedding, which is the output layer too, is in Q4_0 as well and not in Q8_0.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in {"general.architecture", "general.file_type"}:
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
            continue
        form = _Q8_0 if tensor.name == "token_embd.weight" and not output else _Q4_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaModel:
    """A model with a cache of keys and values."""

    def __init__(self, file: Path, threads: int) -> None:
        """Raises SystemExit where xllamacpp is not installed."""
        package = find_spec("xllamacpp")
        if package is None or package.origin is None:
            raise SystemExit("expected the package xllamacpp: pip install xllamacpp gguf")  # noqa: EM101
        (library,) = Path(package.origin).parent.glob("xllamacpp*.so")
        self._library = ctypes.CDLL(str(library))
        quiet = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
        self._log = quiet(lambda *_: None)
        self._call("llama_log_set", None, (quiet, self._log), (_POINTER, None))
        self._call("llama_backend_init", None)
        params = (_Opaque, self._call("llama_model_default_params", _Opaque))
        path = (ctypes.c_char_p, str(file).encode())
        self._model = self._call("llama_model_load_from_file", _POINTER, path, params)
        assert self._model
        params = (_Opaque, self._call("llama_context_default_params", _Opaque))
        self._context = self._call("llama_init_from_model", _POINTER, (_POINTER, self._model), params)
        assert self._context
        count = (_INT, threads)
        self._call("llama_set_n_threads", None, (_POINTER, self._context), count, count)
        pool = self._call("ggml_threadpool_params_default", _Opaque, count)
        made = self._call("ggml_threadpool_new", _POINTER, (_POINTER, ctypes.addressof(pool)))
        pools = ((_POINTER, made), (_POINTER, made))
        self._call("llama_attach_threadpool", None, (_POINTER, self._context), *pools)
        vocabulary = self._call("llama_model_get_vocab", _POINTER, (_POINTER, self._model))
        self._tokens = self._call("llama_vocab_n_tokens", _INT, (_POINTER, vocabulary))

    def _call(self, name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))

    def forget(self) -> None:
        """Empties the cache."""
        memory = self._call("llama_get_memory", _POINTER, (_POINTER, self._context))
        self._call("llama_memory_clear", None, (_POINTER, memory), (ctypes.c_bool, True))

    def step(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """The logits after some more tokens; they stay as they are until the next call."""
        place = ((_POINTER, tokens.ctypes.data), (_INT, len(tokens)))
        batch = self._call("llama_batch_get_one", _Opaque, *place)
        assert self._call("llama_decode", _INT, (_POINTER, self._context), (_Opaque, batch)) == 0
        found = self._call(
            "llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (_POINTER, self._context), (_INT, -1)
        )
        return np.ctypeslib.as_array(found, (self._tokens,))
