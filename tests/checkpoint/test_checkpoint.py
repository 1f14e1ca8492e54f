from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints import (
    BFLOAT16,
    DTYPES,
    GOLDEN,
    GOLDEN_DATA,
    GOLDEN_HEADER,
    assert_same,
    golden_weights,
)
from sparsam import checkpoint


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
