"""Other runtimes for a torch model, from one ONNX file: ONNX Runtime, OpenVINO, DeepSparse."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch
from torch import Tensor, nn

__all__ = ["INT8_STATIC", "NARROW", "ORT", "Peer", "convolution_makers", "makers"]

ORT, INT8, OPENVINO, DEEPSPARSE = (
    "ONNX Runtime, dense float32",
    "ONNX Runtime, dynamic int8",
    "OpenVINO, its default precision",
    "DeepSparse 1.8",
)
NARROW = (INT8, OPENVINO)  # those that compute with less than float32
INT8_STATIC = "ONNX Runtime, static int8"  # scales of activations are known beforehand
WORKER = Path(__file__).with_name("_deepsparse.py")


class Peer:
    """A run of another runtime. Called, it returns the output."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run

    def __call__(self) -> Any:
        return self._run()

    def close(self) -> None:
        """Ends what it started."""
        del self._run


class Elsewhere(Peer):
    """DeepSparse in the process of another interpreter."""

    def __init__(self, python: str, model: Path, inputs: Mapping[str, Tensor], threads: int) -> None:
        super().__init__(lambda: self._output)
        folder = model.parent
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
        np.savez(folder / "inputs.npz", **arrays)
        command = [python, str(WORKER), str(model), str(folder), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()
        self._output = np.load(folder / "output.npy")

    def block_ms(self, seconds: float) -> list[float]:
        """The times of a block of calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate("")

    def _read(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("["):
                found: list[float] = json.loads(line)
                return found
        msg = f"the process ended with code {self._process.wait()}"
        raise RuntimeError(msg)


def makers(
    model: nn.Module, inputs: Mapping[str, Tensor], file: Path, threads: int, deepsparse: str | None
) -> dict[str, Callable[[], Peer]]:
    """{name: what starts the peer, or raises whatever keeps it from running}.

    Args:
        model: Takes the inputs by position, and returns one tensor.
        inputs: By name.
        file: Where to export to; other files go beside it.
        threads: For each.
        deepsparse: An interpreter that has DeepSparse.
    """
    export(model, inputs, file)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return {
        ORT: lambda: Peer(onnx_runtime(file, arrays, threads)),
        OPENVINO: lambda: Peer(openvino(file, arrays, threads)),
        INT8: lambda: Peer(onnx_runtime(quantised(file), arrays, threads)),
        DEEPSPARSE: lambda: deep_sparse(deepsparse, file, inputs, threads),
    }


def convolution_makers(
    model: nn.Module, x: Tensor, file: Path, threads: int
) -> dict[str, Callable[[], Peer]]:
    """The same of ONNX Runtime for a convolution, whose int8 weights are quantised with the scale of x."""
    export(model, {"x": x}, file)
    arrays = {"x": x.numpy()}
    return {
        ORT: lambda: Peer(onnx_runtime(file, arrays, threads)),
        INT8_STATIC: lambda: Peer(onnx_runtime(calibrated(file, arrays), arrays, threads)),
    }


def export(model: nn.Module, inputs: Mapping[str, Tensor], file: Path) -> None:
    """Writes an ONNX file for inputs of these very shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            input_names=list(inputs),
            output_names=["hidden"],
            opset_version=14,
        )


def onnx_runtime(file: Path, arrays: Mapping[str, NDArray[Any]], threads: int) -> Callable[[], Any]:
    import onnxruntime  # noqa: PLC0415 - not everyone has it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(arrays))[0]


def quantised(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    small = file.with_suffix(".int8.onnx")
    quantize_dynamic(str(file), str(small), weight_type=QuantType.QInt8)
    return small


def calibrated(file: Path, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """int8 weights with a scale for each output, and activations of 8 bits, calibrated with these inputs."""
    from onnxruntime.quantization import (  # noqa: PLC0415
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter((dict(arrays),))

        def get_next(self) -> Any:
            return next(self._rest, None)

    small = file.with_suffix(".static.onnx")
    quantize_static(
        str(file),
        str(small),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return small


def openvino(file: Path, arrays: Mapping[str, NDArray[Any]], threads: int) -> Callable[[], Any]:
    import openvino  # noqa: PLC0415

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads})
    request, values = compiled.create_infer_request(), dict(arrays)
    return lambda: request.infer(values)[compiled.output(0)]


def deep_sparse(python: str | None, file: Path, inputs: Mapping[str, Tensor], threads: int) -> Peer:
    if python is None:
        msg = "no interpreter given with --deepsparse"
        raise ValueError(msg)
    return Elsewhere(python, file, inputs, threads)
