from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from prunable_weights import model, untied, zeros
from sparsam.config import MethodName, PruningConfig, Scope
from sparsam.masks import Mask
from sparsam.patterns import NM, Slices, Tied
from sparsam.pruner import prune


def test_nested_lists() -> None:
    result = prune({"fc": [[0.1, -0.5], [0.9, 0.01]], "ints": [[1, -3], [2, 4]], "bias": [1.0, 2.0]})
    assert result.weights["fc"].tolist() == [[0, -0.5], [0.9, 0]]
    assert result.weights["ints"].tolist() == [[0, -3], [0, 4]]
    assert result.weights["ints"].dtype == np.float64
    assert result.weights["bias"] == [1.0, 2.0]
    assert prune([1, -2, 3, 4]).weights.tolist() == [0, 0, 3, 4]
    assert prune(3.0).weights.shape == ()


def test_one_array_is_pruned_whatever_its_shape() -> None:
    result = prune(np.array([1.0, -3.0, 2.0, 0.5]), target_sparsity=0.75)
    assert result.weights.tolist() == [0, -3, 0, 0]
    assert result.masks == Mask.from_array(np.array([False, True, False, False]))
    assert [layer.name for layer in result.report.layers] == ["weights"]
    assert prune(np.array(5.0), target_sparsity=1.0).weights == 0
    assert prune(np.empty((0, 3))).weights.shape == (0, 3)
    excluded = prune(kept := np.ones((2, 2)), exclude="weights")
    assert excluded.weights is kept
    assert excluded.masks == Mask.ones((2, 2))


def test_read_only_strided_and_mapped_arrays(tmp_path: Path) -> None:
    weights = untied(12, 10)
    expected = prune(weights).weights
    frozen = weights.copy()
    frozen.flags.writeable = False
    np.save(tmp_path / "w.npy", weights)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    strided = np.zeros((24, 20), np.float32)[::2, ::-2]
    strided[...] = weights
    for view in (frozen, mapped, strided, np.asfortranarray(weights)):
        result = prune(view).weights
        assert type(result) is np.ndarray
        assert (result == expected).all()
        assert (view == weights).all()


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_inplace(method: MethodName, scope: Scope, tmp_path: Path) -> None:
    config = PruningConfig(0.75, method, scope=scope)
    weights = model()
    mapped = np.memmap(tmp_path / "w.bin", np.float32, "w+", shape=(6, 8))
    mapped[...] = untied(6, 8)
    weights |= {"mapped": mapped, "strided": untied(8, 8)[::2, ::-1]}
    expected = prune(weights, config)
    result = prune(weights, config, inplace=True)
    assert result.masks == expected.masks
    for name, array in weights.items():
        assert result.weights[name] is array
        assert (array == expected.weights[name]).all()
    assert (np.fromfile(tmp_path / "w.bin", np.float32) == expected.weights["mapped"].ravel()).all()


def test_inplace_needs_writeable_arrays() -> None:
    frozen = untied(4, 4)
    frozen.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"tensor 'b': expected a writeable array with inplace=True; got one that is read"
    ):
        prune({"a": (a := untied(4, 4)), "b": frozen}, inplace=True)
    assert zeros(a) == 0
    with pytest.raises(
        ValueError, match=r"tensor 'weights': expected a writeable array .*; got one of type list"
    ):
        prune([[1.0, 2.0]], inplace=True)
    assert prune({"a": a, "bias": [1, 2]}, inplace=True).weights["bias"] == [1, 2]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_inplace_refuses_shared_memory(scope: Scope) -> None:
    x = untied(4, 8)
    tied: list[dict[str, NDArray[Any]]] = [
        {"a": x, "between": untied(2, 2), "b": x},
        {"a": x, "b": x.T},
        {"a": x[:3], "b": x[2:]},
        {"a": x, "vector": x[0]},
        {"vector": x[0], "a": x[:, ::-1]},
    ]
    for weights in tied:
        with pytest.raises(
            ValueError, match=r"tensors '\w+' and '\w+': expected separate memory.*pass copies"
        ):
            prune(weights, scope=scope, inplace=True)
        assert zeros(x) == 0
    heads = {f"head{i}": x[:, i::4] for i in range(4)}
    result = prune(heads, scope=scope, inplace=True)
    assert zeros(x) == result.report.total.pruned_params == 16


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_array_under_two_names_is_pruned_and_counted_once(scope: Scope) -> None:
    x, other = untied(4, 8), untied(4, 8) * 3
    alone = prune({"a": x, "other": other}, scope=scope)
    weights = {"a": x, "other": other, "b": x, "bias": x[0], "c": x[:]}
    result = prune(weights, scope=scope)
    assert result.weights["a"] is result.weights["b"] is result.weights["c"]
    assert list(result.weights) == list(weights)
    assert list(result.masks) == ["a", "other", "b", "c"]
    assert result.masks["a"] is result.masks["b"]
    for name in ("a", "other"):
        assert np.array_equal(result.weights[name], alone.weights[name])
    assert zeros(x) == 0
    rows = {row.name: row for row in result.report.layers}
    assert (rows["b"].pattern, rows["b"].total_params, rows["b"].dense_bytes) == ("shared with a", 0, 0)
    assert result.report.total.total_params == 64 + 8
    assert result.report.total.pruned_params == alone.report.total.pruned_params == 32
    assert prune(weights, scope=scope, exclude=("b", "c")).weights["b"] is x
    alike = prune(weights, scope=scope, overrides={"[abc]": 0.25})
    assert alike.masks["c"].sparsity == 0.25


def test_shared_memory_that_cannot_be_pruned_once_is_refused() -> None:
    x = untied(4, 8)
    for changes in (
        {"overrides": {"b": 0.25}},
        {"overrides": {"b": NM(2, 4)}},
        {"transposed": "b", "pattern": NM(2, 4)},
        {"ties": Tied({"a": Slices(0)})},
    ):
        with pytest.raises(ValueError, match="tensors 'a' and 'b' share memory: expected one sparsity"):
            prune({"a": x, "b": x}, **changes)
    for overlapping in ({"a": x, "b": x.T}, {"a": x[:3], "b": x[2:]}):
        with pytest.raises(ValueError, match=r"tensors '\w' and '\w': expected separate memory.*pass copies"):
            prune(overlapping)
        prune(overlapping, exclude="b")


def test_zeros_and_ones_are_hardly_weights() -> None:
    flags = np.tril(np.ones((4, 4)))
    with pytest.warns(
        UserWarning, match=r"tensor 'h.0.attn.bias': expected weights; got zeros and ones"
    ) as caught:
        prune({"h.0.attn.bias": flags, "fc": untied(4, 4)})
    assert [warning.filename for warning in caught] == [__file__]
    prune({"h.0.attn.bias": flags, "fc": untied(4, 4)}, exclude="*.attn.bias")
    prune({"ones": np.ones((4, 4)), "zeros": np.zeros((4, 4)), "mixed": flags * 2, "row": flags[0]})
    prune(flags)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.ones((2, 2), np.complex64),
            "tensor 'fc': expected one of the dtypes float16, bfloat16, float32, float64 .*; got complex64",
        ),
        (np.ones((2, 2), ">f4"), "tensor 'fc': expected .* in native byte order; got >f4"),
        ([["a", "b"]], "tensor 'fc': expected .*; got <U1"),
    ],
)
def test_dtypes_that_cannot_be_pruned(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        prune({"fc": value})
    assert prune({"fc": value}, exclude="fc").weights["fc"] is value


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_integers_are_no_weights(dtype: Any) -> None:
    buffer = np.ones((2, 2), dtype)
    result = prune({"position_ids": buffer, "fc": np.array([[1.0, 2.0]])})
    assert result.weights["position_ids"] is buffer
    assert list(result.masks) == ["fc"]
    changes: tuple[Any, ...] = (
        {"overrides": {"position_ids": 0.5}},
        {"ties": Tied({"position_ids": Slices(0)})},
    )
    for named in changes:
        with pytest.raises(TypeError, match=r"tensor 'position_ids': expected one of the dtypes"):
            prune({"position_ids": buffer}, **named)
    with pytest.raises(TypeError, match="tensor 'weights': expected one of the dtypes"):
        prune(buffer)


def test_sparse_matrices_say_what_to_do() -> None:
    for make in (sparse.csr_matrix, sparse.coo_array):
        with pytest.raises(
            TypeError, match=r"tensor 'fc': expected a dense array; got scipy.sparse's .*toarray"
        ):
            prune({"fc": make(np.eye(3))})


def test_what_is_no_array() -> None:
    with pytest.raises(ValueError, match="tensor 'fc': expected what NumPy can make an array of; got list"):
        prune({"fc": [[1.0, 2.0], [3.0]]})
    with pytest.raises(TypeError, match="weights: expected names as keys; got 1 of type int"):
        prune({1: np.ones((2, 2))})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"config: expected a PruningConfig; got 0.9; .* target_sparsity=0.9"):
        prune(np.ones((2, 2)), 0.9)  # type: ignore[call-overload]


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nan_is_refused_by_name(method: MethodName, scope: Scope) -> None:
    weights = model()
    weights["fc2.weight"][1, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"tensor 'fc2.weight': expected numbers to rank; got NaN at index \(1, 2\)"
    ):
        prune(weights, method=method, scope=scope)


def test_shapes_that_the_pattern_does_not_divide() -> None:
    with pytest.raises(
        ValueError, match=r"tensor 'fc': pattern 2:4: expected a multiple of 4 .*; got 6 in shape \(2, 6\)"
    ):
        prune({"fc": np.ones((2, 6))}, pattern=NM(2, 4))
