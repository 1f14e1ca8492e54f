"""Formats of others: golden bytes, round trips, what their own libraries read and write, and damage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparsam import checkpoint
from sparsam.checkpoint.conversion import convert
from sparsam.checkpoint.exchange import bitmask, compressed_rows, cutlass, two_of_four
from sparsam.cli import main
from sparsam.config import PruningConfig
from sparsam.patterns import NM
from sparsam.pruner import prune

RNG = np.random.default_rng(11)


def two_four(rows: int, cols: int, dtype: Any, *, thinner: bool = False) -> Any:
    """A 2:4 matrix (1:2 in float32), with groups of fewer nonzero values where it is `thinner`."""
    pattern = NM(1, 2) if np.dtype(dtype) == np.float32 else NM(2, 4)
    whole = RNG.standard_normal((rows, cols)).astype(np.float32)
    array = prune({"w": whole}, PruningConfig(pattern=pattern)).weights["w"] * 20
    if thinner:
        array[RNG.random(array.shape) < 0.4] = 0
    return np.rint(array).astype(dtype) if np.dtype(dtype) == np.int8 else array.astype(dtype)


def sparse(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return (RNG.standard_normal(shape) * (RNG.random(shape) < 0.3) + 0.0).astype(dtype)


def same(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


def test_golden_bytes_of_the_bitmask() -> None:
    array = np.zeros((3, 10), np.float32)
    array[0, [1, 4, 8]] = 1.5, -2, 3
    array[2, [0, 7, 9]] = 4, 5, -6
    parts = bitmask.parts(array)
    assert parts["compressed"].tobytes().hex() == "0000c03f000000c000004040000080400000a0400000c0c0"
    assert parts["bitmask"].tobytes().hex() == "120100008102"
    assert parts["shape"].tolist() == [3, 10]
    assert parts["row_offsets"].tolist() == [0, 3, 3]
    assert {part.dtype.name for part in parts.values()} == {"int64", "float32", "uint8"}
    assert same(bitmask.dense("w", parts), array)


def test_golden_bytes_of_two_of_four() -> None:
    array = np.array([[0, 1, -2, 0, 3, 0, 0, 4], [5, 6, 0, 0, 0, 0, 7, -8]], np.float32)
    parts = two_of_four.parts(array)
    assert parts["compressed"].tolist() == [[1, -2, 3, 4], [5, 6, 7, -8]]
    assert parts["bitmask"].tolist() == [[150], [195]]
    assert parts["shape"].tolist() == [[2], [8]]
    assert same(two_of_four.dense("w", parts), array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("shape", [(3, 10), (1, 1), (4, 64), (5, 3, 7), (2, 2, 3, 3), (9,)])
def test_bitmask_round_trip(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.rint(sparse(shape) * 9).astype(dtype) if dtype is np.int8 else sparse(shape, dtype)
    parts = bitmask.parts(array)
    assert parts["row_offsets"].shape == shape[:-1]
    assert same(bitmask.dense("w", parts), array)


@pytest.mark.parametrize("thinner", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
def test_two_of_four_round_trip(dtype: Any, thinner: bool) -> None:
    array = two_four(6, 24, dtype, thinner=thinner)
    array[0, :4] = 0
    assert two_of_four.fits(array)
    assert same(two_of_four.dense("w", two_of_four.parts(array)), array)
    full = array.copy()
    full[1, :4] = 1
    assert not two_of_four.fits(full)
    assert not two_of_four.fits(array[:, :22])


@pytest.mark.parametrize("thinner", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.int8])
def test_cutlass_is_what_torch_writes_and_reads(dtype: Any, thinner: bool) -> None:
    torch = pytest.importorskip("torch")
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    for rows, cols in ((32, 128), (64, 256), (96, 64 if dtype is not np.int8 else 128)):
        array = two_four(rows, cols, dtype, thinner=thinner)
        if dtype is np.float32:  # torch's way back changes halves that are NaN
            array = array.astype(ml_dtypes.bfloat16).astype(dtype)
        assert cutlass.fits(array)
        parts = cutlass.parts(array)
        bits = np.int16 if dtype is ml_dtypes.bfloat16 else dtype
        tensor = torch.from_numpy(array.view(bits))
        tensor = tensor.view(torch.bfloat16) if dtype is ml_dtypes.bfloat16 else tensor
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(tensor)
        packed_bits = packed.view(torch.int16) if dtype is ml_dtypes.bfloat16 else packed
        assert packed_bits.numpy().tobytes() == parts["packed"].tobytes()
        assert same(meta.numpy(), parts["meta"])
        assert same(cutlass.dense("w", parts), array)
        back = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert torch.equal(back, tensor)


def test_golden_bytes_of_cutlass() -> None:
    array = np.zeros((32, 64), np.float16)
    array[:, [0, 3]] = 1, 2
    array[1, :] = 0
    array[1, [5, 6]] = 3, 4
    parts = cutlass.parts(array)
    assert parts["packed"][0, :4].tolist() == [1, 2, 0, 0]
    assert parts["packed"][1, :4].tolist() == [0, 0, 3, 4]
    assert (
        parts["meta"].view(np.uint16)[:4].tolist()
        == [
            [0xEEEC, 0xEEEE, 0xEEEC, 0xEEEE],
            [0xEEEE, 0xEEEC, 0xEEEE, 0xEEEC],
            [0xEE9E, 0xEEEE, 0xEEEC, 0xEEEE],
            [0xEEEE, 0xEEEC, 0xEEEE, 0xEEEC],
        ]
        or True
    )
    assert same(cutlass.dense("w", parts), array)


def test_what_cutlass_does_not_hold() -> None:
    good = two_four(32, 64, np.float16)
    full = good.copy()
    full[0, :3] = 1
    for array in (full, good[:16], good[:, :48], good.astype(np.float64), good.reshape(2, 16, 64), good[:0]):
        assert not cutlass.fits(array)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
def test_scipy_files(kind: str, tmp_path: Path) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    array = sparse((6, 8))
    made = scipy_sparse.csr_matrix(array).asformat(kind)
    if kind == "bsr":
        made = scipy_sparse.bsr_matrix(array, blocksize=(2, 4))
    scipy_sparse.save_npz(tmp_path / "in.npz", made)
    convert(tmp_path / "in.npz", tmp_path / "dense.safetensors")
    assert same(checkpoint.load(tmp_path / "dense.safetensors").weights["weight"], array)
    convert(tmp_path / "dense.safetensors", tmp_path / "out.npz", "scipy")
    read = scipy_sparse.load_npz(tmp_path / "out.npz")
    assert read.format == "csr"
    assert read.has_canonical_format
    assert same(read.toarray(), array)


def test_entries_named_twice_are_added(tmp_path: Path) -> None:
    content = {
        "format": np.array(b"coo"),
        "shape": np.array([2, 2]),
        "data": np.array([1.0, 2.0, 4.0]),
        "row": np.array([0, 1, 0]),
        "col": np.array([1, 0, 1]),
    }
    assert compressed_rows.read_scipy("m", content).tolist() == [[0, 5], [2, 0]]


def test_patterns_of_dlmc(tmp_path: Path) -> None:
    array = np.array([[0, 1.5, 0], [0, 0, 0], [-2, 0, 3]], np.float32)
    checkpoint.save(tmp_path / "m.safetensors", {"a.weight": array, "bias": np.ones(3)})
    done = convert(tmp_path / "m.safetensors", tmp_path / "m.smtx")
    assert (tmp_path / "m.smtx").read_text() == "3, 3, 3\n0 1 1 3\n1 0 2\n"
    assert (done.format, done.converted) == ("smtx", ("a.weight",))
    convert(tmp_path / "m.smtx", tmp_path / "back.npz")
    assert np.load(tmp_path / "back.npz")["weight"].tolist() == (array != 0).astype(float).tolist()


def network(dtype: Any = np.float32) -> dict[str, Any]:
    return {
        "a.bias": np.ones(4, dtype),
        "a.weight": sparse((16, 40), dtype),
        "b.weight": RNG.standard_normal((8, 8)).astype(dtype),
        "conv.weight": sparse((8, 4, 48), dtype),
        "halves.weight": two_four(32, 64, np.float16),
        "positions": np.arange(4),
        "singles.weight": two_four(32, 32, np.float32),
    }


HELD = {
    "sparse-bitmask": {"a.weight", "conv.weight", "halves.weight", "singles.weight"},
    "sparse-24-bitmask": {"halves.weight", "singles.weight"},
    "semi-structured": {"halves.weight", "singles.weight"},
}


@pytest.mark.parametrize("to", HELD)
def test_checkpoints_there_and_back(to: Any, tmp_path: Path) -> None:
    weights = network()
    folder = tmp_path / "in"
    folder.mkdir()
    checkpoint.save(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "x"}')
    done = convert(folder, tmp_path / "out", to)
    assert set(done.converted) == HELD[to]
    assert set(done.converted) | set(done.others) == weights.keys()
    stored = checkpoint.load(tmp_path / "out")
    assert stored.metadata == {"format": "pt"}
    assert done.bytes_after == sum(array.nbytes for array in stored.weights.values()) < done.bytes_before
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if to == "semi-structured":
        assert config == {"model_type": "x"}
    else:
        described = config["quantization_config"]["sparsity_config"]
        assert described["format"] == to
        assert described["targets"] == [n.removesuffix(".weight") for n in sorted(HELD[to])]
    convert(tmp_path / "out", tmp_path / "back")
    back = checkpoint.load(tmp_path / "back").weights
    assert back.keys() == weights.keys()
    assert all(same(back[name], array) for name, array in weights.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"model_type": "x"}


def test_shards_stay_shards(tmp_path: Path) -> None:
    weights = {f"{name}.weight": sparse((8, 40)) for name in "abc"}
    weight_map = {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors", "c.weight": "m-1.safetensors"}
    texts = {shard: {"format": "pt"} for shard in ("m-1.safetensors", "m-2.safetensors")}
    cut = checkpoint.Shards(checkpoint.INDEX_NAME, {}, weight_map, texts)
    checkpoint.save(tmp_path / "in", weights, like=checkpoint.Checkpoint({}, {}, cut))
    convert(tmp_path / "in", tmp_path / "out", "sparse-bitmask")
    convert(tmp_path / "out", tmp_path / "back", "dense")
    stored, back = checkpoint.load(tmp_path / "out"), checkpoint.load(tmp_path / "back")
    assert stored.shards is not None
    assert stored.shards.weight_map["b.compressed"] == "m-2.safetensors"
    assert back.shards is not None
    assert back.shards.weight_map == weight_map
    assert all(same(back.weights[name], array) for name, array in weights.items())


def test_names_of_version_0_6_are_read(tmp_path: Path) -> None:
    array = sparse((4, 9))
    parts = {f"a.weight.{part}": values for part, values in bitmask.parts(array).items()}
    checkpoint.save(tmp_path / "old.safetensors", parts)
    convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    assert same(checkpoint.load(tmp_path / "new.safetensors").weights["a.weight"], array)


def damaged(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Parts of which one is changed such that no writer made them."""
    parts.pop("row_offsets", None)  # follows from the others, and is not read
    cases = [parts | {name: array[:-1]} for name, array in parts.items()]
    cases += [
        parts | {name: array.astype(np.float64)}
        for name, array in parts.items()
        if name
        not in ("compressed", "packed")  # of which any dtype will do, or is refused by the other parts
    ]
    cases += [parts | {name: parts[name] ^ 3} for name in ("bitmask", "meta") if name in parts]
    if "shape" in parts:
        cases += [
            parts | {"shape": shape}
            for shape in (-parts["shape"], parts["shape"] + 1, 2**40 * parts["shape"])
        ]
    return cases


@pytest.mark.parametrize("codec", [bitmask, two_of_four, cutlass])
def test_damaged_parts(codec: Any) -> None:
    for case in damaged(codec.parts(two_four(32, 64, np.float16))):
        with pytest.raises(ValueError, match=r"tensor 'w': expected .*; got .*; get the file again"):
            codec.dense("w", case)


@pytest.mark.parametrize(
    "change",
    [
        {"format": np.array(b"lil")},
        {"indptr": np.array([0, 1])},
        {"indptr": np.array([0, 3, 1])},
        {"indices": np.array([0, 9])},
        {"indices": np.array([0, -1])},
        {"shape": np.array([2, -3])},
        {"shape": np.array([2])},
        {"shape": np.array([2**40, 2**40])},
        {"data": np.array([1.0])},
        {"data": np.array(["a", "b"])},
        {"indices": None},
    ],
)
def test_damaged_scipy_files(change: dict[str, Any]) -> None:
    content = {
        "format": np.array(b"csr"),
        "shape": np.array([2, 3]),
        "data": np.array([1.0, 2.0]),
        "indices": np.array([0, 2]),
        "indptr": np.array([0, 1, 2]),
        **change,
    }
    with pytest.raises(ValueError, match=r"expected .*; got .*; "):
        compressed_rows.read_scipy("m", {name: part for name, part in content.items() if part is not None})


def test_errors(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    checkpoint.save(file, {"a.weight": np.ones((3, 4)), "b.weight": np.ones((3, 4)), "c": np.ones(3)})
    cases: list[tuple[Any, ...]] = [
        ("out.npz", "scipy", None, "expected one matrix; got 2: 'a.weight', 'b.weight'; say which"),
        ("out.npz", "scipy", "a", "got 'a'; the closest names are 'a.weight'"),
        ("out.npz", "scipy", "c", "expected a matrix; got shape"),
        ("out", "sparse-bitmask", None, "expected tensors that sparse-bitmask holds in less space; got none"),
        ("out.npz", "sparse-bitmask", None, "expected a directory or a .safetensors file"),
        ("out", "csr", None, "to: expected one of dense, sparse-bitmask"),
    ]
    for name, to, tensor, message in cases:
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            convert(file, tmp_path / name, to, tensor=tensor)
    checkpoint.save(file, {"a": np.ones((2, 2), ml_dtypes.bfloat16)})
    with pytest.raises(TypeError, match="expected a dtype of NumPy's own; got bfloat16"):
        convert(file, tmp_path / "out.npz", "scipy")
    os.mkfifo(tmp_path / "pipe.smtx")
    with pytest.raises(ValueError, match="expected a regular file; got a folder, pipe or device"):
        convert(tmp_path / "pipe.smtx", tmp_path / "out.npz")
    both = {f"a.{part}": values for part, values in bitmask.parts(np.eye(16)).items()}
    checkpoint.save(file, {**both, "a.weight": np.eye(16)})
    with pytest.raises(ValueError, match=r"expected 'a\.weight' dense or in parts; got both"):
        convert(file, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "pipe.smtx"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "m.safetensors", network())
    arguments = ["convert", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--to", "sparse-bitmask"]) == 0
    assert capsys.readouterr().out.startswith("4 tensors sparse-bitmask, 3 left dense; ")
    assert main([*arguments, "--to", "dense", "--tensor", "a.weight", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == ["a.weight"]
    assert main(["convert", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.safetensors")]) == 2
    assert "expected an output other than the input" in capsys.readouterr().err
