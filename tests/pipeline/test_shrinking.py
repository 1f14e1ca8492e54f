from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsam.config import PruningConfig, Scope
from sparsam.masks import Mask
from sparsam.patterns import Slices, Tied
from sparsam.pruner import prune
from sparsam.shrinking import shrink
from sparsam.training.iterative import IterativePruner

Arrays = Mapping[str, NDArray[Any]]

MLP = (
    Tied({"fc1.weight": Slices(0), "fc1.bias": Slices(0), "fc2.weight": Slices(1)}),
    Tied({"fc2.weight": Slices(0, 2), "fc2.bias": Slices(0, 2), "fc3.weight": Slices(-1, 2)}),
)


def mlp(*, integers: bool = True) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {"fc1": (16, 6), "fc2": (12, 16), "fc3": (3, 12)}
    weights = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": rng.standard_normal(rows) for name, (rows, _) in shapes.items()}
    return {name: np.rint(4 * w) for name, w in weights.items()} if integers else weights


def relu(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.maximum(x, 0))


def run_mlp(w: Arrays, x: NDArray[Any]) -> NDArray[Any]:
    for layer in ("fc1", "fc2"):
        x = relu(x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    return np.asarray(x @ w["fc3.weight"].T + w["fc3.bias"])


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0])
def test_mlp(scope: Scope, sparsity: float) -> None:
    """Sums of integers are exact in any order, so the outputs are equal and not only close."""
    weights = mlp()
    x = np.random.default_rng(1).integers(-9, 10, (7, 6)).astype(np.float64)
    result = prune(weights, target_sparsity=sparsity, scope=scope, ties=MLP)
    small = shrink(result.weights, result.masks, MLP)
    assert np.array_equal(run_mlp(small, x), run_mlp(result.weights, x))
    assert list(small) == list(weights)
    if scope == "layer":
        first, second = 16 - round(sparsity * 16), 12 - 2 * round(sparsity * 6)
        shapes = [small[f"fc{i}.weight"].shape for i in (1, 2, 3)]
        assert shapes == [(first, 6), (second, first), (3, second)]
        assert [small[f"fc{i}.bias"].shape for i in (1, 2, 3)] == [(first,), (second,), (3,)]
    else:
        pruned = (16 - small["fc1.bias"].size) + (12 - small["fc2.bias"].size) // 2
        assert pruned == round(sparsity * 22)
    assert small["fc3.bias"] is weights["fc3.bias"]


def test_weights_are_masked_first() -> None:
    weights = mlp(integers=False)
    before = {name: array.copy() for name, array in weights.items()}
    result = prune(weights, target_sparsity=0.5, ties=MLP)
    from_dense, from_pruned = (shrink(w, result.masks, MLP) for w in (weights, result.weights))
    for name, array in from_dense.items():
        assert np.array_equal(array, from_pruned[name])
        assert np.array_equal(weights[name], before[name])
    assert not any(np.shares_memory(from_pruned[name], result.weights[name]) for name in result.masks)
    by_value = shrink(result.weights, {}, MLP[0])
    assert by_value["fc1.weight"].shape == (8, 6)
    assert by_value["fc2.weight"].shape == (12, 8)
    assert by_value["fc3.weight"].shape == (3, 12)


def test_without_ties_nothing_goes() -> None:
    weights = mlp()
    result = prune(weights, target_sparsity=0.5, pattern=Slices(0))
    same = shrink(weights, result.masks)
    assert all(np.array_equal(same[name], result.weights[name]) for name in weights)
    assert same["fc1.bias"] is weights["fc1.bias"]


def test_what_is_not_zero_everywhere_stays() -> None:
    """Single weights pruned first, and rows that only happen to be zero."""
    weights = mlp(integers=False)
    weights["fc1.weight"][5] = 0
    weights["fc1.weight"][3] = weights["fc1.bias"][3] = 0
    sparse = prune(weights, target_sparsity=0.5)
    result = prune(sparse.weights, target_sparsity=0.25, ties=MLP[0])
    small = shrink(result.weights, result.masks, MLP[0])
    x = np.random.default_rng(2).standard_normal((5, 6))
    assert small["fc1.weight"].shape == (12, 6)
    assert (small["fc1.weight"] == 0).any()
    np.testing.assert_allclose(run_mlp(small, x), run_mlp(result.weights, x), rtol=0, atol=1e-13)
    assert shrink(weights, {}, MLP[0])["fc1.weight"].shape == (16, 6)
    weights["fc2.weight"][:, 3] = 0
    assert shrink(weights, {}, MLP[0])["fc1.weight"].shape == (15, 6)


def test_the_end_of_an_iterative_run() -> None:
    weights = mlp(integers=False)

    def recover(arrays: dict[str, NDArray[Any]], masks: dict[str, Mask], iteration: int) -> Arrays:
        del masks, iteration
        return {name: array + 0.01 for name, array in arrays.items()}

    pruner = IterativePruner(schedule=[0.25, 0.5, 0.75], config=PruningConfig(ties=MLP))
    result = pruner.run(weights, lambda _: 0.0, recover)
    small = shrink(result.weights, result.masks, MLP)
    x = np.random.default_rng(3).standard_normal((5, 6))
    assert small["fc2.weight"].shape == (4, 4)
    np.testing.assert_allclose(run_mlp(small, x), run_mlp(result.weights, x), rtol=0, atol=1e-13)


def test_a_tensor_that_goes_as_a_whole() -> None:
    """The second layer loses all rows, so that its mask says nothing about the neurons before it."""
    weights = mlp()
    masks = prune({name: weights[name] for name in MLP[1].members}, target_sparsity=1.0, ties=MLP[1:]).masks
    small = shrink(weights, masks, MLP)
    assert (small["fc1.weight"].shape, small["fc2.weight"].shape) == ((16, 6), (0, 16))
    assert run_mlp(small, np.ones((2, 6))).tolist() == [weights["fc3.bias"].tolist()] * 2
    with pytest.raises(
        ValueError,
        match=r"group 0: expected zeros .* the mask of 'fc2.weight' removes it; got others in 'fc1.weight'",
    ):
        shrink(weights, {"fc2.weight": masks["fc2.weight"]}, MLP[0])


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attention(w: Arrays, x: NDArray[Any], head: int, queries: int) -> NDArray[Any]:
    """Self-attention over x (positions, width): each key and value serves so many queries."""
    heads = {
        name: (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).reshape(len(x), -1, head).swapaxes(0, 1)
        for name in ("q", "k", "v")
    }
    k, v = (np.repeat(heads[name], queries, axis=0) for name in ("k", "v"))
    mixed = softmax(heads["q"] @ k.swapaxes(1, 2) / np.sqrt(head)) @ v
    return np.asarray(mixed.swapaxes(0, 1).reshape(len(x), -1) @ w["o.weight"].T + w["o.bias"])


@pytest.mark.parametrize(("heads", "queries"), [(6, 1), (4, 3)])
def test_attention_heads(heads: int, queries: int) -> None:
    head, width = 4, 10
    rng = np.random.default_rng(4)
    rows = {"q": heads * queries * head, "k": heads * head, "v": heads * head}
    weights = {f"{name}.weight": rng.standard_normal((n, width)) for name, n in rows.items()}
    weights |= {f"{name}.bias": rng.standard_normal(n) for name, n in rows.items()}
    weights |= {"o.weight": rng.standard_normal((width, rows["q"])), "o.bias": rng.standard_normal(width)}
    sizes = {"q": queries * head, "k": head, "v": head}
    members = {
        f"{name}.{part}": Slices(0, size) for name, size in sizes.items() for part in ("weight", "bias")
    }
    ties = Tied({**members, "o.weight": Slices(1, queries * head)})

    result = prune(weights, target_sparsity=0.5, ties=[ties])
    small = shrink(result.weights, result.masks, ties)
    left = heads // 2
    assert small["q.weight"].shape == (left * queries * head, width)
    assert small["k.weight"].shape == small["v.weight"].shape == (left * head, width)
    assert small["v.bias"].shape == (left * head,)
    assert small["o.weight"].shape == (width, left * queries * head)
    x = rng.standard_normal((5, width))
    got, expected = (attention(w, x, head, queries) for w in (small, result.weights))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
    assert np.abs(expected - attention(weights, x, head, queries)).max() > 0.1


def convolve(x: NDArray[Any], w: NDArray[Any]) -> NDArray[Any]:
    """The direct convolution of x (channels, height, width) without padding, plain sums."""
    out, _, tall, wide = w.shape
    high, long = x.shape[1] - tall + 1, x.shape[2] - wide + 1
    y = np.zeros((out, high, long))
    for i in range(high):
        for j in range(long):
            y[:, i, j] = np.einsum("ochw,chw->o", w, x[:, i : i + tall, j : j + wide])
    return y


def convnet(w: Arrays, x: NDArray[Any]) -> NDArray[Any]:
    """Convolution, batch norm, ReLU, depthwise and full convolution, ReLU, flatten, linear."""
    x = convolve(x, w["conv1.weight"])
    mean, scale = w["bn.mean"], w["bn.weight"] / np.sqrt(w["bn.var"] + 1e-5)
    x = relu((x - mean[:, None, None]) * scale[:, None, None] + w["bn.bias"][:, None, None])
    x = np.concatenate([convolve(x[c : c + 1], w["depth.weight"][c : c + 1]) for c in range(len(x))])
    x = relu(convolve(x, w["conv2.weight"]) + w["conv2.bias"][:, None, None])
    return np.asarray(w["fc.weight"] @ x.reshape(-1))


def test_convolutions_norms_and_a_flatten() -> None:
    rng = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (8, 2, 3, 3),
        "depth.weight": (8, 1, 2, 2),
        "conv2.weight": (6, 8, 2, 3),
        "conv2.bias": (6,),
        "fc.weight": (3, 6 * 3 * 2),
    }
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {f"bn.{name}": rng.random(8) + 0.5 for name in ("weight", "bias", "mean", "var")}
    channels = {name: Slices(0) for name in weights if name.startswith(("conv1", "bn", "depth"))}
    ties = (
        Tied({**channels, "conv2.weight": Slices(1)}),
        Tied({"conv2.weight": Slices(0), "conv2.bias": Slices(0), "fc.weight": Slices(1, size=3 * 2)}),
    )
    result = prune(weights, target_sparsity=0.5, ties=ties)
    small = shrink(result.weights, result.masks, ties)
    assert small["conv1.weight"].shape == (4, 2, 3, 3)
    assert small["depth.weight"].shape == (4, 1, 2, 2)
    assert small["bn.var"].shape == (4,)
    assert small["conv2.weight"].shape == (3, 4, 2, 3)
    assert small["fc.weight"].shape == (3, 3 * 3 * 2)
    x = rng.standard_normal((2, 7, 7))
    # 7 - 2 - 1 - 1 = 3 rows and 7 - 2 - 1 - 2 = 2 columns reach the flatten.
    np.testing.assert_allclose(convnet(small, x), convnet(result.weights, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, ">f4"])
def test_any_dtype_comes_out_as_it_came(dtype: Any) -> None:
    a = np.array([[1, 1], [0, 0], [1, 0]]).astype(dtype)
    b = np.array([[1, 0, 1]]).astype(dtype)
    tied = Tied({"a": Slices(0), "b": Slices(1)})
    small = shrink({"a": a, "b": b}, {}, tied)
    assert (small["a"].dtype, small["a"].tolist()) == (a.dtype, a[[0, 2]].tolist())
    assert small["b"].tolist() == [[1, 1]]
    masks = {
        "a": Mask.from_array(np.array([[0, 0], [0, 0], [1, 1]], bool)),
        "b": Mask.from_array(np.array([[0, 1, 1]], bool)),
    }
    small = shrink({"a": a, "b": b}, masks, [tied])
    assert (small["a"].dtype, small["a"].tolist()) == (a.dtype, a[[2]].tolist())
    assert (small["b"].dtype, small["b"].tolist()) == (a.dtype, [[1]])


def test_nan_and_infinity_are_not_zero() -> None:
    weights = {"a": np.array([[np.nan], [0.0], [np.inf], [-0.0]]), "b": np.zeros(4)}
    tied = Tied({"a": Slices(0), "b": Slices(0)})
    assert shrink(weights, {}, tied)["b"].shape == (2,)
    masks = {"a": Mask.from_array(np.array([[False], [True], [True], [True]]))}
    assert shrink(weights, masks, tied)["a"].tolist() == [[np.inf]]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), sparsity=st.floats(0, 1), scope=st.sampled_from(["layer", "global"]))
def test_putting_the_slices_back_gives_the_masked_weights(
    data: st.DataObject, sparsity: float, scope: Scope
) -> None:
    groups = data.draw(st.integers(1, 6))
    weights, members = {}, {}
    for m in range(data.draw(st.integers(1, 4))):
        rank, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
        shape = [data.draw(st.integers(1, 3)) for _ in range(rank)]
        axis = data.draw(st.integers(-rank, rank - 1))
        shape[axis] = groups * size
        weights[f"m{m}"] = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape)
        members[f"m{m}"] = Slices(axis, size)
    ties = (Tied(members),)
    result = prune(weights, target_sparsity=sparsity, scope=scope, ties=ties)
    small = shrink(result.weights, result.masks, ties)
    left = groups - round(sparsity * groups)
    for name, slices in members.items():
        assert small[name].shape[slices.axis] == left * slices.size
        keep = np.moveaxis(result.masks[name].to_array(), slices.axis, 0).reshape(groups * slices.size, -1)
        back = np.zeros_like(weights[name])
        np.moveaxis(back, slices.axis, 0)[keep[:, 0]] = np.moveaxis(small[name], slices.axis, 0)
        assert np.array_equal(back, result.weights[name])


def test_slices_that_are_gone_in_one_member_only() -> None:
    weights = mlp(integers=False)
    rows = prune(weights, target_sparsity=0.5, pattern=Slices(0)).masks
    gone = int(np.argmin(rows["fc1.weight"].to_array()[:, 0]))
    with pytest.raises(
        ValueError,
        match=rf"group {gone}: expected zeros .* of 'fc1.weight' removes it; got others in 'fc1.bias' "
        rf"\(index {gone} of axis 0\), and without the weights before it a bias is still a constant .*; "
        r"prune the members together with PruningConfig\(ties=...\), or leave the tie out",
    ):
        shrink(weights, {"fc1.weight": rows["fc1.weight"]}, MLP)
    weights["fc1.bias"][:] = 0
    with pytest.raises(
        ValueError, match=rf"others in 'fc2.weight' \(index {gone} of axis 1\), and removing it"
    ):
        shrink(weights, {"fc1.weight": rows["fc1.weight"]}, MLP)
    pairs = prune({"fc3.weight": weights["fc3.weight"]}, target_sparsity=0.5, pattern=Slices(1, 2)).masks
    gone = int(np.argmin(pairs["fc3.weight"].to_array()[0, ::2]))
    with pytest.raises(
        ValueError,
        match=rf"group {gone}: .* in 'fc2.weight' \(indices {2 * gone} to {2 * gone + 1} of axis 0\)",
    ):
        shrink(weights, pairs, MLP)


@pytest.mark.parametrize(
    ("masks", "ties", "error", "message"),
    [
        ({"fc4": Mask.ones((2,))}, (), ValueError, "masks: expected masks of .*; got one of 'fc4'"),
        (
            {"fc1.bias": Mask.ones((8,))},
            (),
            ValueError,
            r"'fc1.bias': expected .*; got shape \(16,\) and a mask of \(8,\)",
        ),
        (
            {"fc1.bias": np.ones(16, bool)},
            (),
            TypeError,
            "masks: expected a Mask for 'fc1.bias'; got ndarray",
        ),
        (Mask.ones((2,)), (), TypeError, "masks: expected a mapping from names to masks; got Mask"),
        (
            {},
            Tied({"fc9": Slices(0)}),
            ValueError,
            "ties: expected names of tensors as members; got 'fc9'; the closest names are",
        ),
        (
            {},
            Tied({"fc1.bias": Slices(1)}),
            ValueError,
            r"tensor 'fc1.bias': expected an axis for .* shape \(16,\)",
        ),
        ({}, Tied({"fc1.bias": Slices(0, 3)}), ValueError, "'fc1.bias': expected an axis of a multiple of 3"),
        (
            {},
            Tied({"fc1.weight": Slices(0), "fc2.weight": Slices(0)}),
            ValueError,
            r"same number of groups; got 'fc1.weight' of shape \(16, 6\) has 16 .*'fc2.weight' .* has 12",
        ),
        ({}, (MLP[0], MLP[0]), ValueError, "'fc1.weight': expected one tie across axis 0"),
        ({}, [{"fc1.bias": Slices(0)}], ValueError, "ties: expected Tied objects"),
    ],
)
def test_masks_and_ties_that_do_not_fit(masks: Any, ties: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shrink(mlp(), masks, ties)


def test_weights_are_a_mapping() -> None:
    with pytest.raises(TypeError, match="weights: expected a mapping from names to arrays; got ndarray"):
        shrink(np.ones((2, 2)), {})  # type: ignore[arg-type]
    assert shrink({}, {}) == {}
    assert shrink({"a": [[0.0, 1.0]]}, {}, Tied({"a": Slices(1)}))["a"].tolist() == [[1.0]]
