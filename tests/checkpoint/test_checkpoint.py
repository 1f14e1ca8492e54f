from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from sparsam import checkpoint

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64"]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

GOLDEN_HEADER = (
    b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[8,16]}}'
)
GOLDEN_DATA = bytes.fromhex("0000803f 000000c0 803f 00c0 0000 003f")
GOLDEN = len(GOLDEN_HEADER).to_bytes(8, "little") + GOLDEN_HEADER + GOLDEN_DATA


def golden_weights() -> dict[str, NDArray[Any]]:
    return {
        "a": np.array([[1, -2], [0, 0.5]], BFLOAT16),
        "b": np.array([1, -2], np.float32),
    }


def assert_same(left: dict[str, NDArray[Any]], right: dict[str, NDArray[Any]]) -> None:
    assert list(left) == sorted(right)
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_raw(file: Path, header: bytes, data: int = 0) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return file


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards as the transformers library writes them, with a metadata of their own."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"x.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / first, {"format": "pt"})
    save_file({"a.weight": np.ones((4, 1), BFLOAT16), "z": np.arange(3)}, folder / second, {"part": "2"})
    index = {
        "metadata": {"total_size": 56, "note": "kept"},
        "weight_map": {"x.weight": first, "a.weight": second, "z": second},
    }
    (folder / checkpoint.INDEX_NAME).write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, **changes: Any) -> None:
    file = folder / checkpoint.INDEX_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# One file


def test_golden_bytes(tmp_path: Path) -> None:
    file = tmp_path / "golden.safetensors"
    checkpoint.save(file, golden_weights(), {"format": "pt"})
    header_size = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.read_bytes()[8 : 8 + header_size].rstrip() == GOLDEN_HEADER
    assert file.read_bytes()[8 + header_size :] == GOLDEN_DATA

    file.write_bytes(GOLDEN)
    assert_same(checkpoint.load(file).weights, golden_weights())
    assert checkpoint.load(file).metadata == {"format": "pt"}
    assert checkpoint.load(file).shards is None


@pytest.mark.parametrize("dtype", [*DTYPES, BFLOAT16])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (3, 4), (2, 3, 2, 1)])
def test_round_trip(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    weights = {"w": np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)}
    checkpoint.save(tmp_path / "w", weights)
    read = checkpoint.load(tmp_path / "w")
    assert_same(read.weights, weights)
    assert read.metadata == {}
    assert read.weights["w"].flags.writeable


@pytest.mark.parametrize(
    "layout", ["transposed", "strided", "reversed", "big endian", "read-only", "memory map"]
)
def test_any_layout_is_saved_by_value(tmp_path: Path, layout: str) -> None:
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    array = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "big endian": base.astype(">f4"),
        "read-only": base[:],
        "memory map": np.memmap(tmp_path / "map", np.float32, "w+", shape=(6, 8)),
    }[layout]
    if layout == "read-only":
        array.flags.writeable = False
    checkpoint.save(tmp_path / "w", {"w": array})
    assert np.array_equal(checkpoint.load(tmp_path / "w").weights["w"], array)


def test_special_values_survive_bit_for_bit(tmp_path: Path) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    weights = {"bf16": patterns.view(BFLOAT16), "f16": patterns.view(np.float16)}
    checkpoint.save(tmp_path / "w", weights)
    assert_same(checkpoint.load(tmp_path / "w").weights, weights)


def test_order_is_by_name(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path / "w", {"b": np.zeros(1), "c": np.zeros(9, np.int8), "a": np.zeros(2, np.float32)}
    )
    assert list(checkpoint.load(tmp_path / "w").weights) == ["a", "b", "c"]
    assert [name for name, _ in checkpoint.stream(tmp_path / "w")] == ["a", "b", "c"]


def test_an_empty_checkpoint_and_odd_names(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "none", {})
    assert checkpoint.load(tmp_path / "none").weights == {}
    weights = {name: np.zeros(1) for name in ("", "Gewicht ä", 'q"uote', "a/b", "雪")}
    checkpoint.save(tmp_path / "odd", weights, {"ключ": "значение"})
    assert_same(checkpoint.load(tmp_path / "odd").weights, weights)
    assert checkpoint.load(tmp_path / "odd").metadata == {"ключ": "значение"}


def test_a_directory_stands_for_the_model_in_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": np.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.FILE_NAME]
    assert_same(checkpoint.load(tmp_path).weights, {"w": np.ones(2)})


def test_like_hands_metadata_on(tmp_path: Path) -> None:
    old = checkpoint.Checkpoint({}, {"format": "pt"})
    checkpoint.save(tmp_path / "kept", {"w": np.ones(2)}, like=old)
    checkpoint.save(tmp_path / "given", {"w": np.ones(2)}, {"by": "us"}, like=old)
    assert checkpoint.load(tmp_path / "kept").metadata == {"format": "pt"}
    assert checkpoint.load(tmp_path / "given").metadata == {"by": "us"}


# Interoperability


def test_the_library_reads_what_is_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "w", golden_weights(), {"format": "np"})
    with safe_open(tmp_path / "w", framework="np") as handle:
        assert handle.metadata() == {"format": "np"}
        assert_same({name: handle.get_tensor(name) for name in sorted(handle.keys())}, golden_weights())


def test_what_the_library_saves_is_read(tmp_path: Path) -> None:
    save_file(golden_weights(), tmp_path / "w", {"format": "np"})
    assert_same(checkpoint.load(tmp_path / "w").weights, golden_weights())


def test_torch_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file  # noqa: PLC0415
    from safetensors.torch import save_file as torch_save_file  # noqa: PLC0415

    values = torch.tensor([[1.5, -2.25], [0.0, 3e38]])
    tensors = {"h": values.clamp(-9, 9).half(), "b": values.bfloat16(), "f": values, "n": torch.arange(3)}
    torch_save_file(tensors, tmp_path / "torch", {"format": "pt"})
    read = checkpoint.load(tmp_path / "torch")
    assert read.weights["b"].dtype == BFLOAT16
    for name, tensor in tensors.items():
        assert np.array_equal(read.weights[name].astype(np.float64), tensor.double().numpy()), name

    checkpoint.save(tmp_path / "ours", read.weights, read.metadata)
    back = load_file(tmp_path / "ours")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


# Foreign, truncated and hostile files


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    for length in range(len(GOLDEN)):
        file.write_bytes(GOLDEN[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors: expected a safetensors file; got"):
            checkpoint.load(file)
    file.write_bytes(GOLDEN + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        checkpoint.load(file)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(tmp_path: Path, position: int, value: int) -> None:
    file = tmp_path / "flipped"
    file.write_bytes(GOLDEN[:position] + bytes([value]) + GOLDEN[position + 1 :])
    with suppress(ValueError):
        weights = checkpoint.load(file).weights
        assert sum(array.nbytes for array in weights.values()) == len(GOLDEN_DATA)


HOSTILE = {
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "header past the end": (1 << 20).to_bytes(8, "little") + b"{}",
}
HOSTILE_HEADERS = {
    "overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "hole": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "wrong size": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
    "short size": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,12]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-3],"data_offsets":[0,12]}}',
    "unknown dtype": b'{"a":{"dtype":"F99","shape":[3],"data_offsets":[0,12]}}',
    "no mapping": b"[1, 2, 3]",
    "no text": b'{"\xff":1}',
    "numbers as metadata": b'{"__metadata__":{"a":1}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lengths(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad: expected a safetensors file; got .*; get it again"):
        checkpoint.load(tmp_path / "bad")


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    size = 13 if b"[0,12]" in header else 12
    file = write_raw(tmp_path / "bad", header, size)
    for read in (checkpoint.load, lambda path: list(checkpoint.stream(path))):
        with pytest.raises(ValueError, match=r"bad: expected a safetensors file; got"):
            read(file)


@pytest.mark.parametrize("shape", ["[0,9223372036854775808]", f"[{','.join(['1'] * 100)}]"])
def test_shapes_that_numpy_cannot_hold(tmp_path: Path, shape: str) -> None:
    size = 0 if shape.startswith("[0") else 4
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{size}]}}}}'
    file = write_raw(tmp_path / "bad", header.encode(), size)
    for read in (checkpoint.load, lambda path: list(checkpoint.stream(path))):
        with pytest.raises(
            ValueError, match=r"bad: tensor 'a': expected a shape that NumPy can hold; got \["
        ):
            read(file)


def test_a_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "f8", b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}', 2)
    with pytest.raises(ValueError, match=r"f8: tensor 'a': expected one of .*BF16.*; got F8_E4M3; convert"):
        checkpoint.load(file)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model"
    foreign = {
        "a Python pickle": pickle.dumps({"w": [1.0, 2.0]}),
        "a NumPy file": b"\x93NUMPY\x01\x00" + bytes(90),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(90),
        "a GGUF file": b"GGUF" + bytes(90),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "an empty file": b"",
        "28 bytes, truncated or damaged": b"just a text, not a model at all"[:28],
    }
    for kind, content in foreign.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"model: expected a safetensors file; got {kind}.*; [a-z]"):
            checkpoint.load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(ValueError, match=r"a zip archive, as torch\.save writes it; convert it with"):
        checkpoint.load(file)


def test_paths_without_a_checkpoint(tmp_path: Path, sharded: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.index.json")
    with pytest.raises(
        ValueError, match=r"expected a directory with model\.safetensors or .*; got one with neither; name"
    ):
        checkpoint.load(tmp_path)
    checkpoint.save(sharded / checkpoint.FILE_NAME, {"w": np.ones(1)})
    with pytest.raises(ValueError, match="got one with both; name the file"):
        checkpoint.load(sharded)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a safetensors file; got a folder, pipe or device"):
        checkpoint.load(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "model.safetensors").mkdir()
    for name in ("pipe", "link", "."):
        with pytest.raises(
            ValueError, match="expected a regular file to replace; got a folder, pipe or device"
        ):
            checkpoint.save(tmp_path / name, {"a": np.ones(3)})
    assert (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "model.safetensors"}


# What cannot be saved


@pytest.mark.parametrize(
    "dtype", [object, "U3", "M8[s]", np.complex64, np.longdouble, ml_dtypes.float8_e4m3fn]
)
def test_dtypes_that_cannot_be_saved(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=r"tensor 'w': expected one of .*bfloat16.*; got .*; convert it with \.astype"
    ):
        checkpoint.save(tmp_path / "w", {"w": np.zeros(2, dtype)})
    assert not list(tmp_path.iterdir())


def test_names_and_metadata_must_be_text(tmp_path: Path) -> None:
    bad: list[Any] = [
        ({1: np.ones(1)}, {}),
        ({"w": np.ones(1)}, {"step": 3}),
        ({"w": np.ones(1)}, {3: "step"}),
    ]
    for weights, metadata in bad:
        with pytest.raises(TypeError, match="names, metadata: expected text only; got"):
            checkpoint.save(tmp_path / "w", weights, metadata)
    with pytest.raises(ValueError, match="__metadata__"):
        checkpoint.save(tmp_path / "w", {"__metadata__": np.ones(1)})
    assert not list(tmp_path.iterdir())


# Replacing


@pytest.mark.parametrize("step", ["chmod", "replace"])
@pytest.mark.parametrize("old", [GOLDEN, None])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    if old is not None:
        (tmp_path / "w").write_bytes(old)
    before = listing(tmp_path)

    def fail(*_: Any) -> None:
        msg = "no"
        raise OSError(msg)

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(OSError, match=r"^no$"):
        checkpoint.save(tmp_path / "w", {"w": np.ones(5)})
    assert listing(tmp_path) == before


FULL_DISK = """
import resource, signal, sys
import numpy as np
from sparsam import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
like = checkpoint.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
large = {name: np.ones(size) for name, size in zip(like.weights, (100, 100, 10_000))}
try:
    checkpoint.save(sys.argv[2], large, like=like)
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_leaves_no_trace(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(GOLDEN)
    before = listing(sharded)
    for source, target in [
        (sharded, sharded),
        (sharded, tmp_path / "new"),
        (tmp_path / "one", tmp_path / "one"),
    ]:
        script = (
            FULL_DISK.replace("(100, 100, 10_000)", "(100, 10_000)") if source.name == "one" else FULL_DISK
        )
        command = [sys.executable, "-c", script, str(source), str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "File too large" in run.stderr
        assert "Traceback" not in run.stderr
    assert listing(sharded) == before
    assert (tmp_path / "one").read_bytes() == GOLDEN
    assert {file.name for file in tmp_path.iterdir()} == {"sharded", "one"}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*nowhere'"):
        checkpoint.save(tmp_path / "nowhere" / "w", {"w": np.ones(1)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs modes and links")
def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "new", {"w": np.ones(1)})
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640

    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    checkpoint.save(tmp_path / "link", {"w": np.zeros(2)})
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "new").weights["w"].shape == (2,)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(GOLDEN)
    read = checkpoint.load(tmp_path / "w")
    checkpoint.save(tmp_path / "w", read.weights, like=read)
    assert_same(checkpoint.load(tmp_path / "w").weights, golden_weights())
    assert_same(read.weights, golden_weights())


# Shards


def test_sharded_round_trip(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    assert list(read.weights) == ["a.weight", "x.weight", "z"]
    assert read.metadata == {"format": "pt", "part": "2"}
    assert_same(checkpoint.load(sharded / checkpoint.INDEX_NAME).weights, read.weights)
    assert dict(checkpoint.stream(sharded)).keys() == read.weights.keys()

    pruned = {**read.weights, "x.weight": np.zeros((2, 3), np.float16)}
    checkpoint.save(tmp_path / "new", pruned, like=read)
    again = checkpoint.load(tmp_path / "new")
    assert_same(again.weights, pruned)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {file.name for file in sharded.iterdir()}
    assert again.shards is not None
    assert read.shards is not None
    assert again.shards.weight_map == read.shards.weight_map
    assert again.shards.metadata == read.shards.metadata
    assert again.shards.index_metadata == {"note": "kept", "total_size": 8 + 12 + 24}


def test_sharded_save_to_an_index_of_another_name(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    checkpoint.save(tmp_path / "unet.index.json", read.weights, {"by": "us"}, like=read)
    again = checkpoint.load(tmp_path / "unet.index.json")
    assert_same(again.weights, read.weights)
    assert again.shards is not None
    assert again.shards.index_name == "unet.index.json"
    assert set(map(str, again.shards.metadata.values())) == {"{'by': 'us'}"}


def test_torch_reads_saved_shards(sharded: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file  # noqa: PLC0415

    read = checkpoint.load(sharded)
    checkpoint.save(tmp_path / "new", read.weights, like=read)
    index = json.loads((tmp_path / "new" / checkpoint.INDEX_NAME).read_text())
    for name, shard in index["weight_map"].items():
        tensor = load_file(tmp_path / "new" / shard)[name]
        assert np.array_equal(tensor.double().numpy(), read.weights[name].astype(np.float64))


def test_sharded_save_needs_the_same_tensors(sharded: Path, tmp_path: Path) -> None:
    read = checkpoint.load(sharded)
    for weights in ({**read.weights, "new": np.ones(1)}, {"z": read.weights["z"]}):
        with pytest.raises(ValueError, match=r"exactly the tensors of `like`; got others: '"):
            checkpoint.save(tmp_path / "new", weights, like=read)
    assert not (tmp_path / "new").exists()


def test_a_failed_sharded_save_leaves_no_folder(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint.load(sharded)
    before = listing(sharded)

    def fail(*_: Any, **__: Any) -> None:
        msg = "no"
        raise OSError(msg)

    monkeypatch.setattr(Path, "write_text", fail)
    for target in (sharded, tmp_path / "new"):
        with pytest.raises(OSError, match=r"^no$"):
            checkpoint.save(target, read.weights, like=read)
    assert listing(sharded) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "shard",
    [
        "../evil.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x",
        "C:x",
        "",
        ".",
        "..",
        "a\0b",
        "x" * 5000,
        3,
        None,
        ["x"],
    ],
)
def test_shards_outside_the_folder_are_refused(sharded: Path, shard: Any) -> None:
    save_file({"x.weight": np.ones(1)}, sharded.parent / "evil.safetensors")
    edit_index(sharded, weight_map={"x.weight": shard})
    with pytest.raises(
        ValueError,
        match=r"index\.json: (expected (shards to be names of files|the shard '.*') beside"
        r"|field weight_map\[\.\.\.\]: expected str; got )",
    ):
        checkpoint.load(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    places = {"x.weight": first, "a.weight": second, "z": second}
    cases = [
        (places | {"ghost": first}, f"{first}: .* got a shard without 'ghost'"),
        (places | {"x.weight": second}, f"{second}: .* got a shard without 'x.weight'"),
        ({"x.weight": first, "z": second}, f"{second}: .* got one that also holds 'a.weight'"),
        (
            places | {"more": "model-3.safetensors"},
            "expected the shard 'model-3.safetensors' beside it; got no such",
        ),
        (places | {"more": checkpoint.INDEX_NAME}, r"index\.json: expected a safetensors file"),
    ]
    for weight_map, message in cases:
        edit_index(sharded, weight_map=weight_map)
        for read in (checkpoint.load, lambda path: next(checkpoint.stream(path))):
            with pytest.raises(ValueError, match=message):
                read(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first = sharded / "model-00001-of-00002.safetensors"
    save_file({"x.weight": np.ones(2), "z": np.ones(3)}, first)
    with pytest.raises(
        ValueError, match="got one that also holds 'z'; get the index and its shards from one"
    ):
        checkpoint.load(sharded)


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002\.safetensors: expected .* truncated or damaged"
    ):
        checkpoint.load(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}, "metadata": 3}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": ' + "[" * 100_000,
        "\udcff",
    ],
)
def test_a_broken_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / checkpoint.INDEX_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json: .*expected .*; got .*; get it again"):
        checkpoint.load(sharded)


# Overwriting


def test_overwrites_sees_through_paths_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / checkpoint.FILE_NAME
    file.write_bytes(GOLDEN)
    (tmp_path / "other").write_bytes(GOLDEN)
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    for same in (
        file,
        checkpoint.FILE_NAME,
        "soft",
        "hard",
        tmp_path,
        f"folder/{checkpoint.FILE_NAME}",
        "./folder",
    ):
        assert checkpoint.overwrites(same, file), same
        assert checkpoint.overwrites(file, same), same
    for different in ("other", "missing"):
        assert not checkpoint.overwrites(different, file)


def test_overwrites_compares_every_shard(sharded: Path, tmp_path: Path) -> None:
    assert checkpoint.overwrites(sharded, sharded / checkpoint.INDEX_NAME)
    assert checkpoint.overwrites(sharded / "another.index.json", sharded)
    assert not checkpoint.overwrites(tmp_path / "new", sharded)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model-00002-of-00002.safetensors").symlink_to(
        sharded / "model-00002-of-00002.safetensors"
    )
    assert checkpoint.overwrites(tmp_path / "linked", sharded)
