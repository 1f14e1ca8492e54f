"""ONNX models: the initializers of a graph as weights, replaced in place.

The nodes that read an initializer tell what it is: the weights of a MatMul are stored as (in, out), those of
a Gather are an embedding, and a tensor that only element-wise arithmetic reads is a constant.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.foreign_content import Foreign

__all__ = ["read", "write"]

_LARGEST = (1 << 31) - (1 << 20)
"""The most bytes of weights in a protocol buffer; larger models keep theirs in a file beside it."""

_ALIGNED = 4096

# Operator -> which of its inputs are weights of a layer, and whether those are stored as (in, out).
_LAYERS: dict[str, tuple[set[int], bool]] = {
    "MatMul": ({0, 1}, True),
    "FusedMatMul": ({1}, True),
    "Gemm": ({0, 1}, True),
    "Conv": ({1}, False),
    "ConvTranspose": ({1}, False),
    "Einsum": ({0, 1}, False),
    "LSTM": ({1, 2}, False),
    "GRU": ({1, 2}, False),
    "RNN": ({1, 2}, False),
}
_UNCHANGED = {"Identity", "Cast"}


class _Use(NamedTuple):
    """A use of a value: the operator, the position among its inputs, and whether it arrives transposed."""

    operator: str
    place: int
    transposed: bool


def read(path: Path) -> Foreign:
    """Reads the floating-point and integer initializers of a model, those of its subgraphs too.

    Raises:
        ValueError: It is not an ONNX model, or damaged; its data file is missing; `onnx` is not installed.
        OSError: It cannot be read.
    """
    onnx = _onnx(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf raises many kinds
        msg = f"{path}: expected an ONNX model; got another file ({error}); get it again"
        raise ValueError(msg) from error
    if not model.graph.node and not model.graph.initializer:
        msg = f"{path}: expected an ONNX model; got one without a graph; get it again"
        raise ValueError(msg)
    weights: dict[str, NDArray[Any]] = {}
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            _check_place(path, tensor)
            if tensor.name in weights:
                msg = f"{path}: expected a name for each tensor; got {tensor.name!r} twice; rename one"
                raise ValueError(msg)
            try:
                array = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
            except OSError:
                raise
            except Exception as error:  # the sizes do not fit, or NumPy has no such dtype
                msg = f"{path}: tensor {tensor.name!r}: expected its values; got {error}; get it again"
                raise ValueError(msg) from error
            if array.dtype.kind in "fbiu" or array.dtype.name == "bfloat16":
                weights[tensor.name] = array
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        for tensor in _constants(graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _check_place(path, tensor)
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    transposed, tables, constants = [], [], []
    for name, uses in _all_uses(model.graph).items():
        if name not in weights or weights[name].ndim < 2:
            continue
        layers = [use for use in uses if use.place in _LAYERS.get(use.operator, (set(), False))[0]]
        if any(use.operator == "Gather" and use.place == 0 for use in uses):
            tables.append(name)
        elif not layers:
            constants.append(name)
        elif _LAYERS[layers[0].operator][1] != layers[0].transposed:
            transposed.append(name)
    return Foreign(weights, model, None, tuple(transposed), tuple(tables), tuple(constants))


def write(path: Path, weights: Mapping[str, NDArray[Any]], like: Foreign | None) -> None:
    """Writes the model that was read with the values of its initializers replaced.

    Values that lay outside the file, and those of a model of 2 GiB or more, go into `NAME.data` beside it.

    Raises:
        ValueError: `like` is not the content of an ONNX model.
        OSError: It cannot be written.
    """
    onnx = _onnx(path)
    if like is None or not isinstance(like.whole, onnx.ModelProto):
        msg = (
            f"{path}: expected weights of an ONNX model, whose graph is kept; got those of another file; "
            "write .safetensors"
        )
        raise ValueError(msg)
    model = onnx.ModelProto()
    model.CopyFrom(like.whole)
    tensors = [t for graph in _graphs(model.graph) for t in graph.initializer if t.name in weights]
    outside = sum(weights[t.name].nbytes for t in tensors) > _LARGEST
    external = [t for t in tensors if outside or t.data_location == onnx.TensorProto.EXTERNAL]
    place = path.with_name(f"{path.name}.data")
    at = 0
    for tensor in tensors:
        array = weights[tensor.name]
        new = onnx.numpy_helper.from_array(array, tensor.name)
        new.doc_string = tensor.doc_string
        if tensor in external:
            new.ClearField("raw_data")
            new.data_location = onnx.TensorProto.EXTERNAL
            at = -(-at // _ALIGNED) * _ALIGNED
            for key, value in (("location", place.name), ("offset", at), ("length", array.nbytes)):
                new.external_data.add(key=key, value=str(value))
            at += array.nbytes
        tensor.CopyFrom(new)
    writers: dict[Path, Callable[[Path], Any]] = {
        path: lambda file: file.write_bytes(model.SerializeToString())
    }
    if external:
        arrays = [weights[tensor.name] for tensor in external]
        writers = {place: partial(_write_data, arrays=arrays), **writers}
    publish(writers)


def _write_data(file: Path, arrays: list[NDArray[Any]]) -> None:
    with file.open("wb") as handle:
        for array in arrays:
            handle.write(bytes(-handle.tell() % _ALIGNED))
            handle.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph, and those inside its nodes: the bodies of If, Loop and Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _graphs(inner)


def _constants(graph: Any) -> Iterator[Any]:
    """The tensors in the attributes of a graph's nodes."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _all_uses(graph: Any) -> dict[str, list[_Use]]:
    """Value -> its uses, looking through nodes that pass it on unchanged or transposed."""
    nodes = [node for inner in _graphs(graph) for node in inner.node]
    readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in nodes:
        for place, name in enumerate(node.input):
            readers[name].append((node, place))

    def uses(name: str, *, transposed: bool, depth: int) -> Iterator[_Use]:
        for node, place in readers[name] if depth < 8 else ():
            if node.op_type in _UNCHANGED:
                yield from uses(node.output[0], transposed=transposed, depth=depth + 1)
            elif node.op_type == "Transpose":
                yield from uses(node.output[0], transposed=not transposed, depth=depth + 1)
            else:
                key = "transB" if place else "transA"
                flipped = node.op_type == "Gemm" and any(a.name == key and a.i for a in node.attribute)
                # On the left of a product, W x: the inputs are the last axis already.
                left = place == 0 and node.op_type in ("MatMul", "Gemm")
                yield _Use(node.op_type, place, transposed ^ flipped ^ left)

    names = {tensor.name for inner in _graphs(graph) for tensor in inner.initializer}
    return {name: list(uses(name, transposed=False, depth=0)) for name in sorted(names)}


def _check_place(path: Path, tensor: Any) -> None:
    """Raises ValueError for values that are not in a regular file in the model's directory or below it."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
    if location is None:
        return
    steps = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    if ".." in steps or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        msg = f"{path}: expected values in files beside it; got {location!r}; do not trust it"
        raise ValueError(msg)
    file = path.parent / location
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file of values of the ONNX model", str(file))
    if not file.is_file():
        msg = f"{path}: expected values in regular files; got {location!r}, which is none; get the file"
        raise ValueError(msg)


def _onnx(path: Path) -> Any:
    try:
        import onnx  # noqa: PLC0415 - an extra
        import onnx.external_data_helper  # noqa: PLC0415
        import onnx.numpy_helper  # noqa: PLC0415
    except ImportError as error:
        msg = f"{path}: expected onnx for this file; got none; install it with: pip install 'sparsam[onnx]'"
        raise ValueError(msg) from error
    return onnx
