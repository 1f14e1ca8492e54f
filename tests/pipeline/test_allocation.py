from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocated_weights import METHODS, NETWORK, WEIGHTS, Arrays, draw, mask_of_ones, seen
from sparsam import NM, Block, Slices, Unstructured, prune
from sparsam.allocation import ERK, OWL, Explicit, Global, Uniform, allocate, block_of, resolve
from sparsam.apportionment import split_total
from sparsam.config import AllocationLike, AllocationName
from sparsam.scores import LAMP, Magnitude, Random
from sparsam.tiles import count_pruned


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 3), Slices(0), Slices(1, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("target", [0.0, 0.1, 0.333, 0.5, 0.77, 0.95, 1.0])
def test_totals_are_exact(method: AllocationLike, pattern: Any, target: float) -> None:
    if isinstance(method, dict) and not 0.45 < target < 0.6:
        target = 0.5
    shares = allocate(NETWORK, target, method, pattern=pattern)
    sizes = {name: count_pruned(name, ~mask_of_ones(array), pattern) for name, array in WEIGHTS.items()}
    assert list(shares) == list(WEIGHTS)
    assert all(0 <= share <= 1 for share in shares.values())
    counts = {name: round(share * sizes[name]) for name, share in shares.items()}
    assert sum(counts.values()) == round(target * sum(sizes.values()))
    if method != "uniform":
        result = prune(NETWORK, target_sparsity=target, allocation=method, pattern=pattern)
        assert {name: count_pruned(name, mask, pattern) for name, mask in result.masks.items()} == counts


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["uniform", "erk", "lamp", "global"]),
)
def test_totals_of_any_shapes(shapes: list[tuple[int, int]], target: float, method: AllocationName) -> None:
    weights = draw(0, **{f"w{i}": shape for i, shape in enumerate(shapes)})
    shares = allocate(weights, target, method)
    counts = [round(shares[name] * array.size) for name, array in weights.items()]
    assert sum(counts) == round(target * sum(array.size for array in weights.values()))
    assert all(0 <= share <= 1 for share in shares.values())
    exact = resolve(method).shares(weights, target, Unstructured())
    for name, count in zip(weights, counts, strict=True):
        assert abs(count - exact[name] * weights[name].size) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("erk", "target", "expected"),
    [
        (ERK(), 0.5, [0.0, 0.3095, 0.6548]),
        (ERK(), 0.8, [0.5556, 0.7037, 0.8519]),
        (ERK(include_kernel=False), 0.5, [0.207, 0.471, 0.5595]),
        (ERK(power=2), 0.5, [0.0, 0.0333, 0.7583]),
        (ERK(power=0), 0.5, [0.5, 0.5, 0.5]),
    ],
)
def test_erk_has_the_published_numbers(erk: ERK, target: float, expected: list[float]) -> None:
    """Of jaxpruner's tests, with floor(s N) zeros where s N is no whole number (s = 0.8)."""
    weights = {"a": np.ones((2, 4)), "b": np.ones((3, 6)), "c": np.ones((4, 6, 2))}
    zeros = sum(math.floor(target * array.size) for array in weights.values())
    total = sum(array.size for array in weights.values())
    got = erk.shares(weights, zeros / total, Unstructured())
    np.testing.assert_allclose(list(got.values()), expected, atol=6e-4 if not erk.include_kernel else 6e-5)


@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 1.0])
def test_erk_of_any_power(target: float) -> None:
    """Of a high power all but the tensor of the largest ratio is as good as nothing, and it goes last."""
    weights = {
        "wide": np.ones((30, 40)),
        "thin": np.ones((1, 9)),
        "even": np.ones((6, 6)),
        "none": np.ones((0, 3)),
    }
    shares = allocate(weights, target, ERK(power=1e6))
    assert list(shares.values()) == list(allocate(weights, target, ERK(power=1e3)).values())
    total = round(target * 1245)
    assert [round(shares[name] * weights[name].size) for name in ("wide", "even", "thin")] == [
        min(total, 1200),
        min(max(total - 1200, 0), 36),
        max(total - 1236, 0),
    ]


def test_erk_makes_dense_what_would_be_more_than_dense() -> None:
    weights = {"thin": np.ones((2, 2)), "medium": np.ones((6, 6)), "wide": np.ones((40, 40))}
    for target in (0.05, 0.3, 0.6, 0.9):
        shares = ERK().shares(weights, target, Unstructured())
        scales = {
            name: (1 - share) * array.size / sum(array.shape)
            for (name, array), share in zip(weights.items(), shares.values(), strict=True)
        }
        most = max(scales.values())
        for name, share in shares.items():
            assert share == 0 or math.isclose(scales[name], most)
        sizes = np.array([array.size for array in weights.values()])
        assert math.isclose(sizes @ list(shares.values()), target * sizes.sum())


def test_global_counts_are_those_of_one_threshold() -> None:
    for scorer in (Magnitude(), Magnitude(2), LAMP(), Random(1)):
        for pattern in (Unstructured(), Block(2, 3), Slices(0)):
            pooled = prune(NETWORK, target_sparsity=0.6, scope="global", method=scorer, pattern=pattern)
            shares = allocate(NETWORK, 0.6, Global(scorer), pattern=pattern)
            for name, mask in pooled.masks.items():
                groups = count_pruned(name, ~mask_of_ones(WEIGHTS[name]), pattern)
                assert round(shares[name] * groups) == count_pruned(name, mask, pattern)
    assert prune(NETWORK, allocation="global").masks == prune(NETWORK, scope="global").masks
    lamp = prune(NETWORK, scope="global", method="lamp").masks
    assert prune(NETWORK, allocation="lamp").masks == lamp
    assert len({mask.sparsity for mask in lamp.values()}) > 1


def test_lamp_never_empties_a_tensor_before_the_last() -> None:
    """The largest weight of each scores 1, however small the tensor's scale."""
    weights = draw(a=(10, 10), b=(10, 10))
    weights["b"] *= 1e-6
    assert allocate(weights, 0.98, "global")["b"] == 1
    assert allocate(weights, 0.99, "lamp") == {"a": 0.99, "b": 0.99}


def owl_by_hand(weights: Arrays, owl: OWL, target: float) -> dict[str, float]:
    """The paper's steps over blocks of equal size, before anything leaves [0, 1]."""
    blocks: dict[str, list[str]] = {}
    for name in weights:
        blocks.setdefault(name.split(".")[0], []).append(name)
    ratios = []
    for names in blocks.values():
        a = np.concatenate(
            [
                (
                    np.abs(weights[n]) * np.sqrt(owl.statistics[n].sum_squares / owl.statistics[n].count)
                ).ravel()
                for n in names
            ]
        )
        ratios.append(100 * np.sum(a > owl.multiple * a.mean()) / a.size)
    r = (np.array(ratios) - min(ratios)) / (max(ratios) - min(ratios)) * 2 * owl.spread
    r = r - r.mean() + (1 - target)
    return {n: 1 - float(r[i]) for i, names in enumerate(blocks.values()) for n in names}


def test_owl_is_the_papers_where_blocks_are_alike() -> None:
    rng = np.random.default_rng(0)
    names = [f"{block}.{part}" for block in range(4) for part in ("q", "up")]
    weights = {n: rng.standard_normal((12, 10)) ** (1 + 2 * int(n[0])) for n in names}
    owl = OWL(seen(weights), multiple=3, spread=0.1)
    got = owl.shares(weights, 0.7, Unstructured())
    expected = owl_by_hand(weights, owl, 0.7)
    np.testing.assert_allclose([got[n] for n in names], [expected[n] for n in names], atol=1e-12)
    assert len({round(share, 9) for share in got.values()}) > 2
    assert math.isclose(max(got.values()) - min(got.values()), 0.2)


def test_owl_stays_in_range_and_passes_on_what_is_over() -> None:
    rng = np.random.default_rng(0)
    weights = {f"{i}.w": rng.standard_normal((12, 10 + i)) ** (1 + 2 * i) for i in range(4)}
    owl = OWL(seen(weights), multiple=2, spread=0.5)
    sizes = np.array([array.size for array in weights.values()])
    for target in (0.02, 0.3, 0.9, 0.99):
        shares = np.array(list(owl.shares(weights, target, Unstructured()).values()))
        assert shares.min() >= 0
        assert shares.max() <= 1
        assert math.isclose(shares @ sizes, target * sizes.sum(), rel_tol=1e-9)
    assert (shares == 1).any()
    same = {name: np.ones((2, 3)) for name in ("a", "b")}
    assert OWL(seen(same)).shares(same, 0.7, Unstructured()) == pytest.approx({"a": 0.7, "b": 0.7})


def test_owl_blocks() -> None:
    names = ("model.layers.3.mlp.up.weight", "model.layers.3.q", "h.0.w", "3.weight", "lm_head.weight", "fc2")
    expected = ["model.layers.3", "model.layers.3", "h.0", "3", "lm_head.weight", "fc2"]
    assert [block_of(name) for name in names] == expected
    together = dict.fromkeys(WEIGHTS, 0)
    for blocks in (together, lambda _: 0):
        owl = OWL(seen(WEIGHTS), multiple=2, blocks=blocks)
        assert set(owl.shares(WEIGHTS, 0.5, Unstructured()).values()) == {0.5}
    with pytest.raises(ValueError, match="OWL: blocks: expected a block of tensor 'head'"):
        allocate(WEIGHTS, 0.5, OWL(seen(WEIGHTS), blocks=dict.fromkeys(("conv", "fc1", "fc2"), 0)))
    with pytest.raises(ValueError, match="Wanda: statistics: expected an entry for tensor 'conv'"):
        allocate(WEIGHTS, 0.5, OWL({}))
    broken = {**WEIGHTS, "fc1": WEIGHTS["fc1"] * np.inf}
    with pytest.raises(ValueError, match="OWL: tensor 'fc1': expected finite weights"):
        allocate(broken, 0.5, OWL(seen(WEIGHTS)))


def test_explicit_sparsities() -> None:
    weights = {name: np.ones((10, 10)) for name in ("a.1", "a.2", "b", "c")}
    shares = allocate(weights, 0.5, {"a.*": 0.33, "a.2": 0.9})
    assert shares == {"a.1": 0.33, "a.2": 0.9, "b": 0.39, "c": 0.38}
    assert allocate(weights, 0.5, {"*": 0.5}) == dict.fromkeys(weights, 0.5)
    odd = {name: np.ones((1, 3)) for name in "abc"}
    assert allocate(odd, 0.5, {"*": 0.5}) == {"a": 2 / 3, "b": 1 / 3, "c": 1 / 3}


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        ({"a": 0.0}, "allow the total 0.8; got ones that allow from 0 to 0.5"),
        ({"a": 1.0, "b": 1.0}, "allow the total 0.8; got ones that allow from 1 to 1"),
        (
            {"x*": 0.5},
            r"allocation: expected names .* to be pruned, .* total; got 'x\*', .*; the closest names are",
        ),
        ({"bias": 0.5}, "allocation: expected .*; got 'bias', which matches none"),
        ({"a": 1.5}, r"allocation\['a'\]: expected a number from 0"),
    ],
)
def test_explicit_sparsities_that_cannot_be(sparsities: dict[str, float], message: str) -> None:
    weights = {"a": np.ones((5, 4)), "b": np.ones((4, 5)), "bias": np.ones(5)}
    for run in (
        lambda: allocate(weights, 0.8, sparsities),
        lambda: prune(weights, target_sparsity=0.8, allocation=sparsities),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_mistakes_are_named() -> None:
    nonsense: list[tuple[Any, str]] = [
        ("er", "allocation: expected 'uniform', 'erk', 'lamp', 'global', an Allocation"),
        (None, "allocation: expected 'uniform'"),
        (ERK, "allocation: expected 'uniform'"),
    ]
    for method, message in nonsense:
        with pytest.raises(ValueError, match=message):
            allocate(WEIGHTS, 0.5, method)
    with pytest.raises(ValueError, match="target: expected a number from 0"):
        allocate(WEIGHTS, 1.5)
    with pytest.raises(
        ValueError, match=r"expected the pattern Unstructured.*got pattern 2:4, which has one"
    ):
        allocate(WEIGHTS, 0.5, pattern=NM(2, 4))
    with pytest.raises(ValueError, match=r"expected the pattern Unstructured.*got 'rows'"):
        allocate(WEIGHTS, 0.5, pattern="rows")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights: expected a mapping from names to arrays; got ndarray"):
        allocate(np.ones((2, 2)), 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights: expected names as keys; got 3"):
        allocate({3: np.ones((2, 2))}, 0.5)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"tensor 'w': expected float16, .*; got int64"):
        allocate({"w": np.ones((2, 2), np.int64)}, 0.5)
    assert allocate({"w": [[1, 2], [3, 4]]}, 0.5, "global") == {"w": 0.5}
    with pytest.raises(ValueError, match=r"got the name 'wanda'; pass scores.Wanda"):
        Global("wanda")
    with pytest.raises(ValueError, match=r"tensor 'w': expected numbers to rank; got NaN at index \(0, 1\)"):
        allocate({"w": np.array([[1.0, np.nan]])}, 0.5, "global")
    makers: list[tuple[Any, str]] = [
        (lambda: ERK(power=-1), "ERK: power: expected a finite number of at least 0; got -1"),
        (lambda: ERK(include_kernel=1), "ERK: include_kernel: expected True or False; got 1"),  # type: ignore[arg-type]
        (lambda: Global(Random), "Global: scorer: expected a method's name or object"),  # type: ignore[arg-type]
        (lambda: OWL({}, multiple=0), "OWL: multiple: expected a finite number above 0; got 0"),
        (lambda: OWL({}, multiple=math.inf), "OWL: multiple: expected a finite number above 0"),
        (lambda: OWL({}, spread=0.6), "OWL: spread: expected a number from 0 to 0.5; got 0.6"),
        (lambda: OWL({}, blocks=3), "OWL: blocks: expected a mapping or function"),  # type: ignore[arg-type]
        (lambda: OWL(3), "Wanda: statistics: expected a mapping"),  # type: ignore[arg-type]
        (lambda: Explicit(3), "Explicit: sparsities: expected a mapping"),  # type: ignore[arg-type]
    ]
    for make, message in makers:
        with pytest.raises(ValueError, match=message):
            make()


class Wrong:
    def __init__(self, **shares: Any) -> None:
        self.given = shares

    def shares(self, weights: Any, target: float, pattern: Any, /) -> dict[str, Any]:
        del weights, target, pattern
        return self.given


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5}, r"share of tensor 'b': expected one in \[0, 1\]; got None"),
        ({"a": 1.5, "b": 0.5}, "share of tensor 'a': .*; got 1.5"),
        ({"a": 0.9, "b": 0.9}, "total of its shares: expected the target 0.5; got 0.9"),
    ],
)
def test_allocations_of_ones_own_are_checked(shares: dict[str, float], message: str) -> None:
    weights = {"a": np.ones((5, 4)), "b": np.ones((4, 5))}
    with pytest.raises(ValueError, match=message):
        allocate(weights, 0.5, Wrong(**shares))
    assert allocate(weights, 0.5, Wrong(a=0.9, b=0.1)) == {"a": 0.9, "b": 0.1}


def test_uniform_totals_are_exact_too() -> None:
    weights = {name: np.ones((1, 3)) for name in "abcd"}
    assert allocate(weights, 0.5, Uniform()) == {"a": 2 / 3, "b": 2 / 3, "c": 1 / 3, "d": 1 / 3}
    assert allocate({}, 0.5) == {}
    assert allocate({"empty": np.ones((0, 3)), **weights}, 0.5, "erk")["a"] == 2 / 3


def test_a_count_is_divided_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 9, rng.integers(1, 6)).tolist()
        total = int(rng.integers(0, sum(sizes) + 1))
        counts = split_total(total, sizes)
        assert sum(counts) == total
        exact = [total * size / sum(sizes) for size in sizes]
        assert all(abs(count - number) < 1 for count, number in zip(counts, exact, strict=True))

    assert split_total(3, [1, 1]) == [2, 1]
    assert split_total(0, []) == []
    assert split_total(0, [0, 0]) == [0, 0]
