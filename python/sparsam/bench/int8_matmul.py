"""The measurements of `sparsam bench matmul --values int8|int4`, against int8 of PyTorch and ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.bench.matmul import COLD_COPIES, Problem, milliseconds
from sparsam.runtime import num_threads
from sparsam.sparse.matrix import SparseMatrix

__all__ = ["Int8Row", "multiply_int8"]

_TOLERANCE = 0.05  # relative to the largest output, for rounding inputs and dense weights to int8


@dataclass(frozen=True)
class Int8Row:
    """One measurement of x W^T for x (batch, cols) in float32 and W (rows, cols) in integers; milliseconds.

    All of them quantise x at run time, and the times include that.

    Attributes:
        name: "random", or the file that the pattern comes from.
        rows: Of W, the outputs.
        cols: Of W, the inputs.
        batch: Rows of x.
        sparsity: The share of zeros in W.
        bits: Memory per weight, zeros counted, in bits.
        linear_ms: `SparseMatrix.linear`.
        torch_ms: Dense, PyTorch's dynamically quantised linear layer; None where torch is not installed.
        onnx_ms: Dense, ONNX Runtime's MatMulInteger with dynamically quantised x; None without `onnx` and
            `onnxruntime`.
    """

    name: str
    rows: int
    cols: int
    batch: int
    sparsity: float
    bits: float
    linear_ms: float
    torch_ms: float | None
    onnx_ms: float | None

    @property
    def dense_ms(self) -> float | None:
        """The faster of the dense products."""
        return min((ms for ms in (self.torch_ms, self.onnx_ms) if ms is not None), default=None)

    @property
    def speedup(self) -> float | None:
        """dense_ms / linear_ms."""
        return None if self.dense_ms is None else self.dense_ms / self.linear_ms


def multiply_int8(
    problems: Iterable[Problem], batches: Sequence[int], *, cold: bool = False, values: str = "int8"
) -> Iterator[Int8Row]:
    """Measures every problem with every batch; all results are checked, sparsam's with its rounded weights.

    Arguments as for `multiply`; `values`, "int8" or "int4", is the dtype of sparsam's values.

    Raises:
        RuntimeError: A result is not the product.
    """
    for problem in problems:
        weights = problem.make()
        copies = COLD_COPIES if cold else 1
        makers: tuple[tuple[str, Callable[..., Any]], ...] = (("torch", _torch), ("onnxruntime", _onnx))
        ours = [SparseMatrix.from_dense(weights, dtype=values) for _ in range(copies)]
        rounded = ours[0].to_dense()
        peers = {
            name: [make(weights) for _ in range(copies)]
            for name, make in makers
            if find_spec(name) and (name == "torch" or find_spec("onnx"))
        }
        for batch in batches:
            x = np.random.default_rng(1).standard_normal((batch, problem.shape[1]), dtype=np.float32)
            reference = x @ weights.T
            found: dict[str, float] = {}
            for name, products in {"sparsam": [one.linear for one in ours], **peers}.items():
                same = x @ rounded.T if name == "sparsam" else reference
                _check(name, values if name == "sparsam" else "int8", products[0](x), same)
                found[name] = milliseconds(products, x)
            bits = 8 * ours[0].nbytes / max(weights.size, 1)
            yield Int8Row(
                problem.name,
                *problem.shape,
                batch,
                problem.sparsity,
                bits,
                found["sparsam"],
                found.get("torch"),
                found.get("onnxruntime"),
            )


def _torch(weights: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import torch  # noqa: PLC0415 - only here, and only where it is installed

    scale = max(float(np.abs(weights).max(initial=0)) / 127, 1e-30)
    quantised: Any = torch.ops.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = quantised.linear_prepack(
            torch.quantize_per_tensor(torch.from_numpy(weights), scale, 0, torch.qint8), None
        )

    def product(x: NDArray[np.float32]) -> NDArray[np.float32]:
        y: NDArray[np.float32] = quantised.linear_dynamic(torch.from_numpy(x), packed, True).numpy()
        return y

    return product


def _onnx(weights: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import onnx  # noqa: PLC0415 - as above
    import onnxruntime  # noqa: PLC0415

    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    scale = np.float32(max(float(np.abs(weights).max(initial=0)) / 127, 1e-30))
    w = np.clip(np.rint(weights.T / scale), -127, 127).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "x_scale", "zero"]),
        helper.make_node("MatMulInteger", ["bytes", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=floats),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["floats", "scale"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", floats, ["n", weights.shape[1]])],
        [helper.make_tensor_value_info("y", floats, ["n", weights.shape[0]])],
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(np.asarray(scale), "w_scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if num_threads() == 1 else "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return partial(_run, session)


def _run(session: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    y: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return y


def _check(name: str, values: str, y: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
    apart = float(np.abs(y - reference).max(initial=0)) / max(float(np.abs(reference).max(initial=0)), 1e-30)
    if not apart <= _TOLERANCE:
        msg = (
            f"{name}'s {values} and NumPy's product differ by {apart:.3g} of the largest; please report this"
        )
        raise RuntimeError(msg)
