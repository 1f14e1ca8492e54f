"""ONNX models: initializers are pruned in place, and everything else stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparsam.checkpoint import foreign
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.patterns import NM
from sparsam.pruner import prune

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper

RNG = np.random.default_rng(5)


def values(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def model() -> Any:
    """A network with each kind of weight: an embedding, products, and a convolution in a branch."""
    weights = {
        "table": values(10, 8),
        "first": values(8, 12),  # (in, out)
        "second": values(6, 12),  # (out, in), by transB
        "third": values(6, 4),  # (in, out), through a Cast
        "turned": values(4, 4),  # (out, in), through a Transpose
        "scale": values(1, 12),
        "bias": values(6),
        "shape": np.array([2, 4], np.int64),
    }
    node = helper.make_node
    kernel = numpy_helper.from_array(values(2, 3, 3, 3), "kernel")
    branch = helper.make_graph(
        [node("Conv", ["image", "kernel"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
        [kernel],
    )
    nodes = [
        node("Gather", ["table", "ids"], ["a"]),
        node("MatMul", ["a", "first"], ["b"]),
        node("Mul", ["b", "scale"], ["c"]),
        node("Gemm", ["c", "second", "bias"], ["d"], transB=1),
        node("Cast", ["third"], ["third_again"], to=TensorProto.FLOAT),
        node("MatMul", ["d", "third_again"], ["e"]),
        node("Transpose", ["turned"], ["around"], perm=[1, 0]),
        node("MatMul", ["e", "around"], ["f"]),
        node("Reshape", ["f", "shape"], ["y"]),
        node("If", ["choice"], ["z"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [2]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 3, 3]),
            helper.make_tensor_value_info("choice", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    graph.node[9].attribute[1].g.CopyFrom(
        helper.make_graph(
            [node("Conv", ["image", "other"], ["inner"])],
            "other",
            [],
            [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(values(2, 3, 3, 3), "other")],
        )
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="test")
    made.metadata_props.add(key="license", value="ours")
    return made


MODEL = model()
WEIGHTS = {name: numpy_helper.to_array(t) for t in MODEL.graph.initializer for name in [t.name]}


def weights_of(path: Path) -> dict[str, Any]:
    return foreign.read(path).weights


def run_model(path: Path) -> list[Any]:
    inputs = {"ids": np.array([3, 7]), "image": np.ones((1, 3, 3, 3), np.float32), "choice": np.array(True)}
    outputs: list[Any] = reference.ReferenceEvaluator(onnx.load(path)).run(None, inputs)
    return outputs


def test_what_the_graph_tells_of_its_weights(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "in.onnx")
    read = foreign.read(tmp_path / "in.onnx")
    assert read.weights.keys() == {*WEIGHTS, "kernel", "other"}
    assert set(read.transposed) == {"first", "third"}
    assert read.tables == ("table",)
    assert read.constants == ("scale",)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_are_pruned_in_place(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(MODEL, file)
    arguments = ["--pattern", pattern, "--scope", "row", "--indivisible", "skip"]
    assert main(["prune", str(file), "-o", str(out), *arguments]) == 0
    assert "embeddings left dense: table;" in capsys.readouterr().err
    before, after = weights_of(file), weights_of(out)
    config = PruningConfig(
        pattern=NM(2, 4) if pattern == "2:4" else PruningConfig().pattern,
        scope="row",
        transposed=["first", "third"],
        exclude=["table", "scale", *(["kernel", "other", "third"] if pattern == "2:4" else [])],
    )
    for name, array in prune(before, config).weights.items():
        assert after[name].tobytes() == array.tobytes(), name
    kept = onnx.load(out)
    assert kept.producer_name == "test"
    assert kept.metadata_props == MODEL.metadata_props
    assert kept.graph.node[:9] == MODEL.graph.node[:9]
    y, z = run_model(out)
    assert y.shape == (2, 4)
    assert np.isfinite(z).all()


def test_a_fraction_of_the_columns_of_a_transposed_weight_is_pruned(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "in.onnx")
    assert main(["prune", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx"), "--scope", "row"]) == 0
    first = weights_of(tmp_path / "out.onnx")["first"]
    assert ((first == 0).sum(0) == 4).all()  # each output keeps half of its inputs


def test_external_data_stays_outside(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file, out = tmp_path / "a" / "in.onnx", tmp_path / "b" / "out.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(MODEL)
    onnx.save(copy, file, save_as_external_data=True, location="weights", size_threshold=200)
    same = tmp_path / "same.onnx"
    onnx.save(MODEL, same)
    assert main(["prune", str(file), "-o", str(out)]) == 0
    assert main(["prune", str(same), "-o", str(same), "--force"]) == 0
    assert {path.name for path in out.parent.iterdir()} == {"out.onnx", "out.onnx.data"}
    for one, other in zip(run_model(out), run_model(same), strict=True):
        assert one.tobytes() == other.tobytes()
    assert weights_of(out)["first"].tobytes() == weights_of(same)["first"].tobytes()


def test_into_other_kinds(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "in.onnx")
    assert main(["prune", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.npz")]) == 0
    assert (np.load(tmp_path / "out.npz")["first"] == 0).sum() == 48


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weight = values(4, 6).astype(kind)
    info = helper.make_tensor_value_info
    element = helper.np_dtype_to_tensor_dtype(kind)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [info("x", element, [1, 4])],
        [info("y", element, [1, 6])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "in.onnx")
    assert main(["prune", str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx")]) == 0
    after = weights_of(tmp_path / "out.onnx")["w"]
    assert after.dtype == kind
    assert after.tobytes() == prune({"w": weight}, PruningConfig(0.5)).weights["w"].tobytes()


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.onnx"
    good = MODEL.SerializeToString()
    for content in (b"", b"no model", good[: len(good) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"in\.onnx: expected an ONNX model; got"):
            foreign.read(file)
    with pytest.raises(ValueError, match="expected weights of an ONNX model, whose graph is kept"):
        foreign.write(tmp_path / "out.onnx", WEIGHTS)
    for location, message in (
        ("../weights", "expected values in files beside it; got '../weights'"),
        ("/etc/passwd", "expected values in files beside it"),
        ("C:\\x", "expected values in files beside it"),
        ("folder", "expected values in regular files"),
    ):
        (tmp_path / "folder").mkdir(exist_ok=True)
        hostile = onnx.ModelProto()
        hostile.CopyFrom(MODEL)
        tensor = hostile.graph.initializer[1]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        file.write_bytes(hostile.SerializeToString())
        with pytest.raises(ValueError, match=message):
            foreign.read(file)


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "in.onnx").touch()
    with pytest.raises(ValueError, match=r"install it with: pip install 'sparsam\[onnx\]'"):
        foreign.read(tmp_path / "in.onnx")
