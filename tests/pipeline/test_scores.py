from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sparsam import Block, Slices, prune
from sparsam.config import METHODS, Scorer
from sparsam.scores import LAMP, RIA, Fisher, Magnitude, Movement, Random, Saliency, Wanda, resolve
from sparsam.statistics import InputStatistics

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def test_magnitude_hands_the_weights_through() -> None:
    weights = np.array([[1.0, -2.0]])
    assert Magnitude().score("w", weights) is weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_draws_lie_above_zero_and_zeros_score_zero(dtype: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((50, 40)).astype(dtype)
    weights[::3] = 0
    weights[1, 1] = -0.0
    scores = Random(7).score("w", weights)
    assert scores.shape == weights.shape
    assert scores.dtype == np.float32
    assert (scores[weights == 0] == 0).all()
    assert (scores[weights != 0] > 0).all()
    assert scores.max() <= 1


def test_random_draws_depend_on_seed_name_and_shape_only() -> None:
    weights = np.ones((20, 30))
    scores = Random(7).score("w", weights)
    assert (Random(7).score("w", weights) == scores).all()
    assert (Random(7).score("w", -3 * np.asfortranarray(weights).astype(np.float32)) == scores).all()
    assert (Random(8).score("w", weights) != scores).any()
    assert (Random(7).score("v", weights) != scores).any()
    assert (Random(7).score("\udcff", weights) != scores).any()  # what JSON can hold and UTF-8 cannot


def test_random_draws_are_uniform() -> None:
    scores = np.sort(Random().score("w", np.ones(100_000)))
    assert np.abs(scores - np.linspace(0, 1, 100_000)).max() < 0.01


def test_random_draws_are_the_same_on_every_machine() -> None:
    scores = Random(0).score("fc.weight", np.ones(3))
    assert scores.tolist() == [0.38700324296951294, 0.14549046754837036, 0.296048104763031]


def test_random_passes_nan_on() -> None:
    scores = Random().score("w", np.array([1.0, np.nan, 0.0, np.inf]))
    assert np.isnan(scores).tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_random_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert Random().score("w", np.ones(shape, np.float32)).shape == shape


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_random_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match="Random: expected an integer seed of at least 0"):
        Random(seed)


@pytest.mark.parametrize("norm", [0, 3, True, "1"])
def test_norms(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"Magnitude: norm: expected 1 .* or 2"):
        Magnitude(norm)


def test_names() -> None:
    assert resolve("magnitude") == Magnitude(norm=1)
    assert resolve("random") == Random(seed=0)
    mine = Random(np.int64(3))
    assert resolve(mine) is mine
    with pytest.raises(
        ValueError, match=r"method: expected one of 'magnitude', 'random', .*; got 'magnitud'"
    ):
        resolve("magnitud")
    assert resolve("lamp") == LAMP()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("saliency", r"pass scores\.Saliency\("),
        ("fisher", r"pass scores\.Fisher\("),
        ("movement", r"pass scores\.Movement\("),
        ("wanda", r"pass scores\.Wanda\("),
        ("ria", r"pass scores\.RIA\("),
    ],
)
def test_names_that_need_data_say_which(name: str, message: str) -> None:
    assert name in METHODS
    with pytest.raises(ValueError, match=rf"method: expected .* the name '{name}'; {message}"):
        prune(np.ones((2, 2)), method=name)


def draw(*shape: int, seed: int = 0, dtype: Any = np.float64) -> NDArray[Any]:
    x: NDArray[Any] = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return x


def seen(weights: NDArray[Any], seed: int = 5) -> InputStatistics:
    columns = weights.reshape(len(weights), -1).shape[1]
    return InputStatistics(columns, gram=False).update(draw(40, columns, seed=seed))


def scorers(weights: NDArray[Any]) -> dict[str, Scorer]:
    """Each scorer with data for a tensor called "w"."""
    data = {"w": draw(*weights.shape, seed=9)}
    return {
        "saliency": Saliency(data),
        "fisher": Fisher({"w": data["w"] ** 2}),
        "movement": Movement(data),
        "wanda": Wanda({"w": seen(weights)}),
        "ria": RIA({"w": seen(weights)}),
        "lamp": LAMP(),
    }


NAMES = list(scorers(np.ones((2, 2))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
def test_formulas(shape: tuple[int, ...], dtype: Any) -> None:
    """Against the papers' formulas, element by element."""
    weights, data = draw(*shape, dtype=dtype), draw(*shape, seed=9, dtype=dtype)
    statistics = seen(weights)
    w, g = weights.astype(np.float64), data.astype(np.float64)
    matrix = np.abs(w).reshape(shape[0], -1)
    norms = np.sqrt(statistics.sum_squares)
    got = {
        "saliency": Saliency({"w": data}).score("w", weights),
        "fisher": Fisher({"w": data * data}).score("w", weights),
        "wanda": Wanda({"w": statistics}).score("w", weights) * np.sqrt(statistics.count),
        "ria": RIA({"w": statistics}, power=0.7).score("w", weights),
        "lamp": LAMP().score("w", weights),
    }
    assert all(scores.dtype == np.float64 for scores in got.values())
    for at in np.ndindex(shape):
        i, j = at[0], int(np.ravel_multi_index(at[1:], shape[1:]))
        assert got["saliency"][at] == abs(w[at] * g[at])
        assert np.isclose(got["fisher"][at], w[at] ** 2 * float((data * data)[at]), rtol=1e-15, atol=0)
        assert np.isclose(got["wanda"][at], matrix[i, j] * norms[j], rtol=1e-14, atol=0)
        share = matrix[i, j] / matrix[:, j].sum() + matrix[i, j] / matrix[i].sum()
        assert np.isclose(got["ria"][at], share * statistics.rms[j] ** 0.7, rtol=1e-14, atol=0)
        flat = int(np.ravel_multi_index(at, shape))
        others = np.abs(w).reshape(-1)
        rest = [v for k, v in enumerate(others) if (v, -k) >= (others[flat], -flat)]
        assert np.isclose(got["lamp"][at], w[at] ** 2 / sum(v * v for v in rest), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_score_zero_others_more_and_nothing_is_modified(name: str, dtype: Any) -> None:
    weights = draw(6, 5, dtype=dtype)
    weights[::2, 1:3] = 0
    weights[1, 1] = -0.0
    before = weights.tobytes()
    scores = scorers(weights)[name].score("w", weights)
    assert scores.shape == weights.shape
    assert ((scores == 0) == (weights == 0)).all()
    assert (scores >= 0).all()
    assert weights.tobytes() == before
    for layout in (np.asfortranarray(weights), np.repeat(weights, 2, axis=1)[:, ::2]):
        assert (scorers(weights)[name].score("w", layout) == scores).all()
    assert not scorers(weights)[name].score("w", np.zeros_like(weights)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_are_refused_by_name(name: str, dtype: Any) -> None:
    weights = draw(6, 5, dtype=dtype)
    method = scorers(weights)[name]
    weights[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"tensor 'w'.*at index \(2, 3\)"):
        prune({"w": weights}, method=method)


def test_infinite_weights() -> None:
    weights = draw(3, 4)
    weights[1, 2] = -np.inf
    data = np.ones((3, 4))
    data[1, 2] = 0
    still = InputStatistics(4).update(np.array([[1.0, 2.0, 0.0, 1.0]]))
    for method in (Saliency({"w": data}), Fisher({"w": data}), Wanda({"w": still})):
        assert method.score("w", weights)[1, 2] == 0
        assert not np.isnan(method.score("w", weights)).any()
    assert Saliency({"w": 1 - data}).score("w", weights)[1, 2] == np.inf
    for relative in (LAMP(), RIA({"w": seen(weights)})):
        with pytest.raises(ValueError, match=r"tensor 'w': expected a finite number at index \(1, 2\)"):
            relative.score("w", weights)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_squares_and_products_of_narrow_types_neither_overflow_nor_vanish(dtype: Any) -> None:
    least, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    weights = np.array([[least, 2 * least, most, most / 2]], dtype)
    inputs = InputStatistics(4, gram=False).update(np.full((1, 4), most, dtype))
    for method in (
        Saliency({"w": weights}),
        Fisher({"w": weights}),
        LAMP(),
        Wanda({"w": inputs}),
    ):
        a, b, d, c = method.score("w", weights)[0].tolist()
        assert 0 < a < b < c < d < np.inf, method


def test_double_precision_at_its_limits() -> None:
    weights = np.array([[1e-300, 1e200, 1e-20, 1.7e308]])
    assert Saliency({"w": weights}).score("w", weights).tolist() == [[0.0, np.inf, 1e-20 * 1e-20, np.inf]]
    lamp = LAMP().score("w", weights)
    assert lamp[0, 3] == 1
    assert (
        RIA({"w": InputStatistics(4).update(np.ones((1, 4)))}).score("w", np.full((2, 4), 1.7e308)).tolist()
    )
    assert np.isfinite(lamp).all()


@given(
    hnp.arrays(
        np.float32, st.integers(0, 30), elements=st.sampled_from([0.0, -1.0, 1.0, 2.0, -0.5, 2.0**-66])
    ),
    st.floats(0, 1),
)
def test_lamp_orders_a_tensor_as_magnitude_does(weights: NDArray[Any], sparsity: float) -> None:
    by_lamp = prune(weights, target_sparsity=sparsity, method="lamp")
    assert by_lamp.masks == prune(weights, target_sparsity=sparsity).masks


def test_lamp_of_equal_weights_by_hand() -> None:
    assert LAMP().score("w", np.array([3.0, -3.0, 4.0])).tolist() == [9 / 25, 9 / 34, 1.0]
    assert LAMP().score("w", np.array([0.0, 2.0, 0.0])).tolist() == [0.0, 1.0, 0.0]


def test_wanda_of_a_convolution_is_that_of_its_unfolded_input() -> None:
    weights, images = draw(4, 3, 2, 2), draw(2, 3, 5, 5, seed=1)
    windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    scores = Wanda({"w": InputStatistics(12).update(patches)}).score("w", weights)
    for channel, y, x in np.ndindex(3, 2, 2):
        column = images[:, channel, y : y + 4, x : x + 4]
        expected = np.abs(weights[:, channel, y, x]) * np.sqrt((column**2).mean())
        np.testing.assert_allclose(scores[:, channel, y, x], expected, rtol=1e-13)


@given(hnp.arrays(np.float32, (2, 8), elements=st.floats(-100, 100, width=32)))
def test_movement_keeps_the_order_within_and_between_tensors(sums: NDArray[np.float32]) -> None:
    method = Movement({"a": sums[0], "b": sums[1]})
    ones = np.ones(8, np.float32)
    scores = np.concatenate([method.score("a", ones), method.score("b", ones)])
    flat = sums.reshape(-1).astype(np.float64)
    assert (scores > 0).all()
    span = float(np.ptp(flat)) or 1.0
    for i, j in np.ndindex(16, 16):
        if flat[i] > flat[j] + 2.0**-51 * span:
            assert scores[i] > scores[j]
        elif flat[i] == flat[j]:
            assert scores[i] == scores[j]
    np.testing.assert_allclose(np.diff(scores), np.diff(flat), rtol=0, atol=1e-14 * span)


def test_movement_prunes_what_moved_towards_zero_first() -> None:
    weights = np.array([[5.0, 1.0, 0.0, 2.0, 3.0, 4.0]])
    sums = np.array([[-2.0, 0.5, 9.0, 0.0, -1.0, 1.0]])
    result = prune({"w": weights}, method=Movement({"w": sums}), target_sparsity=0.5)
    assert result.weights["w"].tolist() == [[0, 1, 0, 2, 0, 4]]
    grown = Movement({"w": sums.copy(), "v": sums})
    grown.accumulated["w"][...] = -3  # type: ignore[index]
    with pytest.raises(ValueError, match=r"tensor 'w': .* got smaller ones; make a new Movement"):
        grown.score("w", weights)


@pytest.mark.parametrize("pattern", [Block(2, 2), Slices(1)])
@pytest.mark.parametrize("name", NAMES)
def test_groups_have_the_sum_of_their_scores(name: str, pattern: Any) -> None:
    weights = draw(6, 4)
    method = scorers(weights)[name]
    scores = method.score("w", weights)
    tall, wide = (2, 2) if pattern == Block(2, 2) else (6, 1)
    sums = scores.reshape(6 // tall, tall, 4 // wide, wide).sum((1, 3))
    keep = np.ones(sums.size, np.bool_)
    keep[np.argsort(sums, axis=None)[: sums.size // 2]] = False
    expected = np.kron(keep.reshape(sums.shape), np.ones((tall, wide))) == 1
    mask = prune({"w": weights}, method=method, pattern=pattern).masks["w"]
    assert (mask.to_array() == expected).all()


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    weights, data = np.ones((2, 3)), {"v": np.ones((2, 3)), "w": np.ones((3, 2))}
    inputs = {"w": InputStatistics(3), "v": InputStatistics(4), "u": np.ones(3)}
    cases: list[tuple[Any, str, str]] = [
        (
            Saliency(data),
            "x",
            r"Saliency: gradients: expected an entry for tensor 'x'; got \['v', 'w'\]; add it, or excl",
        ),
        (Fisher(data), "x", "Fisher: squared_gradients: expected an entry for tensor 'x'"),
        (Movement(data), "x", "Movement: accumulated: expected an entry for tensor 'x'"),
        (Wanda(inputs), "x", "Wanda: statistics: expected an entry for tensor 'x'"),  # type: ignore[arg-type]
        (RIA(inputs), "x", "RIA: statistics: expected an entry for tensor 'x'"),  # type: ignore[arg-type]
        (
            Saliency(data),
            "w",
            r"Saliency: gradients of tensor 'w': expected .* \(2, 3\); got \(3, 2\)",
        ),
        (Wanda(inputs), "v", r"tensor 'v': expected those of 3 inputs .*; got 4"),  # type: ignore[arg-type]
        (Wanda(inputs), "w", "tensor 'w': expected some inputs; got none"),  # type: ignore[arg-type]
        (RIA(inputs), "u", "tensor 'u': expected InputStatistics; got array"),  # type: ignore[arg-type]
        (Saliency({"v": [["a"]]}), "v", "gradients of tensor 'v': dtype: expected real numbers; got '<U1'"),
        (Saliency({"v": weights * np.nan}), "v", r"tensor 'v': expected a finite number at index \(0, 0\)"),
        (Fisher({"v": -weights}), "v", "squared_gradients of tensor 'v': expected at least 0; got -1.0"),
    ]
    for method, name, message in cases:
        with pytest.raises(ValueError, match=message):
            method.score(name, weights)
    with pytest.raises(ValueError, match=r"tensor 'w': expected shape \(out, in\) .*; got \(3,\)"):
        Wanda(inputs).score("w", np.ones(3))  # type: ignore[arg-type]
    for kind in (Saliency, Fisher, Movement, Wanda, RIA):
        with pytest.raises(ValueError, match="expected a mapping from tensor names to"):
            kind(np.ones(3))  # type: ignore[arg-type]
    for power in (-1, np.inf, True, "1"):
        with pytest.raises(ValueError, match="RIA: power: expected a finite number"):
            RIA({}, power=power)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accumulated: expected a range within float64"):
        Movement({"w": np.array([-1.7e308, 1.7e308])})


def test_scorers_with_data_fit_into_a_configuration() -> None:
    method = Saliency({"w": np.ones((2, 2))})
    assert repr(method) == "Saliency()"
    assert hash(method) == hash(method)
    assert method != Saliency(method.gradients)


@pytest.mark.parametrize("kind", ["normal", "mostly zero", "one value", "few values", "rising"])
def test_lamp_of_many_weights_sorts_by_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of one sort, with pieces small enough that Ctrl-C does not wait."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1300, 1700), dtype=np.float32)
    if kind == "mostly zero":
        weights[rng.random(weights.shape) < 0.95] = 0
    elif kind == "one value":
        weights[:] = 3
    elif kind == "few values":
        weights = np.round(weights)
    elif kind == "rising":
        weights = np.sort(weights, axis=None).reshape(weights.shape)
    squares = np.square(weights.astype(np.float64)).reshape(
        -1
    )  # LAMP's are these times a power of two: exact
    backwards = np.argsort(squares[::-1], kind="stable")
    sums = np.cumsum(squares[::-1][backwards][::-1])[::-1]
    expected = np.empty_like(squares)
    expected[squares.size - 1 - backwards] = squares[::-1][backwards] / np.where(sums == 0, 1, sums)
    sort, sorted_at_once = np.argsort, []

    def argsort(values: NDArray[Any], kind: Any) -> NDArray[np.intp]:
        sorted_at_once.append(np.unique(values).size if values.itemsize > 1 else 0)
        return sort(values, kind=kind)

    monkeypatch.setattr(np, "argsort", argsort)
    got = LAMP().score("w", weights)
    assert np.array_equal(got.reshape(-1), expected)
    assert max(sorted_at_once) < max(np.unique(squares).size / 20, 10)
