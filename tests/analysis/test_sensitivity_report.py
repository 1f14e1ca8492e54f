from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import network
from sparsam.analysis.sweep import SensitivityReport, sensitivity
from sweeps import GRID

REPORT = sensitivity(network.weights(), network.accuracy, GRID)


def test_json_round_trip(tmp_path: Path) -> None:
    awkward = sensitivity(
        network.weights(),
        lambda w: (
            -np.inf if (w["mid.weight"] == 0).all() else 0.1 + 0.2 * np.count_nonzero(w["in.weight"]) / 3
        ),
        (1 / 3, 1.0),
    )
    for report in (REPORT, awkward):
        assert SensitivityReport.from_json(report.to_json()) == report
        json.loads(report.to_json(), parse_constant=pytest.fail)
        report.save(tmp_path / "report.json")
        assert SensitivityReport.from_json((tmp_path / "report.json").read_bytes()) == report
    assert awkward.curves[1].points[-1].score == -np.inf
    text = REPORT.to_json()
    for bad, message in [
        ("", "sensitivity report: expected a sensitivity report; got no valid JSON"),
        ("[]", "expected a sensitivity report; got JSON without the field 'sparsam_sensitivity'"),
        (text.replace('"sparsam_sensitivity": 2', '"sparsam_sensitivity": 7'), "expected version 2 .* got 7"),
        (text.replace('"pruned"', '"gone"'), r"field curves\[0\].points\[0\].gone: expected no such field"),
        (
            text.replace('"sparsity": 0.25', '"sparsity": 0.5'),
            r"points\[1\].sparsity: expected rising .* 0.5",
        ),
        (text.replace('"pruned": 48', '"pruned": -1'), r"pruned: expected int >= 0; got -1"),
        (text.replace('"pruned": 48', f'"pruned": {2**63}'), rf"pruned: expected int <= {2**53 - 1}; got 9"),
        (text.replace('"pruned": 48', '"pruned": 1e300'), r"pruned: expected int; got 1e\+300"),
        (
            text.replace('"in.weight": ', '"in.weight": -'),
            r"curves\[0\].tensors\[...\]: expected int >= 0; got",
        ),
        (text.replace('"in.weight": ', f'"in.weight": {2**62}'), r"tensors\[...\]: expected int <= .*; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            SensitivityReport.from_json(bad)


def made(dense: float, curves: dict[str, tuple[int, dict[float, float]]]) -> SensitivityReport:
    """A report of scores that are made up: name -> size and sparsity -> score."""
    content = {
        "sparsam_sensitivity": 2,
        "dense_score": dense,
        "method": "m",
        "pattern": "p",
        "curves": [
            {
                "name": name,
                "tensors": {name: size},
                "all_or_nothing": False,
                "points": [
                    {"sparsity": s, "pruned": round(s * size), "score": score} for s, score in scores.items()
                ],
            }
            for name, (size, scores) in curves.items()
        ],
    }
    return SensitivityReport.from_json(json.dumps(content))


MADE = made(
    0.9,
    {
        "delicate": (100, {0.5: 0.6, 0.9: 0.1}),
        "lucky": (200, {0.5: 0.85, 0.9: 0.95}),
        "robust": (1000, {0.5: 0.9, 0.9: 0.895}),
    },
)


def test_ranking() -> None:
    assert MADE.ranking() == ("robust", "lucky", "delicate")
    assert MADE.mean_losses() == pytest.approx(
        {
            "delicate": (0.5 * 0.3 / 2 + 0.4 * (0.3 + 0.8) / 2) / 0.9,
            "lucky": (0.5 * 0.05 / 2 + 0.4 * 0.05) / 0.9,  # what recovers is not trusted
            "robust": 0.4 * 0.005 / 2 / 0.9,
        }
    )
    assert MADE.tolerated() == {"delicate": 0.0, "lucky": 0.0, "robust": 0.9}
    assert MADE.tolerated(0.05000001) == {"delicate": 0.0, "lucky": 0.9, "robust": 0.9}
    assert MADE.tolerated(0) == {"delicate": 0.0, "lucky": 0.0, "robust": 0.5}
    with pytest.raises(ValueError, match="max_drop: expected a drop of at least 0; got -1"):
        MADE.tolerated(-1)


def test_a_dense_score_of_minus_zero_is_zero() -> None:
    report = sensitivity(
        {"a": np.ones((2, 2))}, lambda weights: -float((weights["a"] - 1).sum() ** 2), (0.5,)
    )
    assert str(report).startswith("dense score 0;")


def test_text() -> None:
    assert str(MADE) == (
        "dense score 0.9; scores with one tensor or group pruned, all else dense\n"
        "tolerates: the highest sparsity measured that costs at most 0.009 of the score\n"
        "\n"
        "pruned alone  weights  50 %   90 %  mean loss  tolerates\n"
        "--------------------------------------------------------\n"
        "robust          1,000   0.9  0.895    0.00111       90 %\n"
        "lucky             200  0.85   0.95     0.0361    nothing\n"
        "delicate          100   0.6    0.1      0.328    nothing\n"
        "\n"
        "tolerate the middle sparsity or more: robust\n"
        "do not: delicate, lucky"
    )


# Allocation


def losses(report: SensitivityReport, name: str) -> list[tuple[int, float]]:
    """Pruned weights and loss, by the definition: the worst drop so far, never below 0."""
    (curve,) = (c for c in report.curves if c.name == name)
    worst, found = 0.0, [(0, 0.0)]
    for point in curve.points:
        worst = max(worst, report.dense_score - point.score)
        if point.pruned > found[-1][0]:
            found.append((point.pruned, worst))
    return found


def brute_force(report: SensitivityReport, needed: int) -> float:
    """The least loss over all combinations on the grid that prune enough, by trying them all."""
    levels = [losses(report, curve.name) for curve in report.curves]
    return min(
        sum(loss for _, loss in choice)
        for choice in itertools.product(*levels)
        if sum(pruned for pruned, _ in choice) >= needed
    )


@pytest.mark.parametrize("seed", range(60))
def test_allocation_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = seed % 4
    curves = {}
    for i in range(int(rng.integers(1, 6))):
        grid = sorted(set(rng.choice(np.arange(1, 21), int(rng.integers(1, 6))) / 20))
        scores = {
            0: rng.random(len(grid)),  # anything, also above the dense score
            1: 1 - np.array(grid) ** 3 * rng.random(),  # convex
            2: np.round(1 - rng.random(len(grid)) / 3, 1),  # plateaus and ties
            3: -(10.0 ** rng.integers(-8, 8, len(grid))),  # very different scales
        }[kind]
        curves[f"t{i}"] = (
            int(rng.integers(1, 400)),
            dict(zip(map(float, grid), map(float, scores), strict=True)),
        )
    report = made(0.9 if kind != 3 else 0.0, curves)
    sizes = {name: size for name, (size, _) in curves.items()}
    for target in (0.0, 0.1, 0.37, 0.5, 0.66, 0.8, report.max_sparsity):
        needed = round(target * report.params)
        if needed > round(report.max_sparsity * report.params):
            continue
        found = report.allocate(target)
        counts = {name: s * sizes[name] for name, s in found.items()}
        assert all(abs(count - round(count)) < 1e-9 for count in counts.values())
        assert sum(round(count) for count in counts.values()) == needed
        assert all(0 <= s <= 1 for s in found.values())
        best = brute_force(report, needed)
        # What is given back can only save.
        assert report.predicted_loss(found) <= best * (1 + 1e-11)
        # At most one curve is between two levels: all others, and its level above, are a choice on the grid.
        rounded = 0.0
        between = 0
        for name, count in counts.items():
            levels = losses(report, name)
            above = next(loss for pruned, loss in levels if pruned >= round(count))
            between += round(count) not in [pruned for pruned, _ in levels]
            rounded += above
        assert between <= 1
        assert rounded == pytest.approx(best, rel=1e-10)


def test_the_surplus_goes_back_where_it_saves_most() -> None:
    report = made(1.0, {"a": (100, {0.5: 0.9}), "b": (100, {0.5: 0.8}), "c": (100, {0.1: 0.1})})
    # 60 need both a and b: 40 too many go back to b, whose weights cost twice as much.
    assert report.allocate(0.2) == {"a": 0.5, "b": 0.1, "c": 0.0}
    assert report.predicted_loss(report.allocate(0.2)) == pytest.approx(0.1 + 0.2 / 5)


def test_a_plateau_is_shared_out() -> None:
    flat = dict.fromkeys((0.25, 0.5, 0.75, 1.0), 1.0)
    report = made(1.0, dict.fromkeys("abcd", (100, flat)))
    assert report.allocate(0.5) == dict.fromkeys("abcd", 0.5)
    assert report.allocate(0.25) == dict.fromkeys("abcd", 0.25)


def test_infinite_losses_are_never_chosen() -> None:
    report = made(1.0, {"a": (100, {0.5: 0.9, 0.9: float("-inf")}), "b": (100, {0.5: 0.5, 0.9: -100.0})})
    assert report.max_sparsity == 0.7
    assert report.allocate(0.7) == {"a": 0.5, "b": 0.9}
    with pytest.raises(ValueError, match=r"target: expected at most 0.7, .* got 0.8; measure higher"):
        report.allocate(0.8)
    with pytest.raises(ValueError, match="target: expected a number from 0"):
        report.allocate(1.5)
    with pytest.raises(ValueError, match="'a': expected at most 50 weights"):
        report.predicted_loss({"a": 0.9})


def test_many_tensors_are_no_obstacle() -> None:
    rng = np.random.default_rng(0)
    grid = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9]
    curves = {
        f"t{i}": (int(rng.integers(10**4, 10**8)), dict(zip(grid, np.sort(rng.random(6))[::-1], strict=True)))
        for i in range(150)
    }
    report = made(1.0, curves)
    found = report.allocate(0.65)
    pruned = sum(round(s * curves[name][0]) for name, s in found.items())
    assert pruned == round(0.65 * report.params)
    # No allocation that is uniform on the grid does better.
    assert report.predicted_loss(found) < report.predicted_loss(dict.fromkeys(curves, 0.7))


def test_extreme_scores_allocate() -> None:
    huge = made(1e308, {"a": (100, {0.5: 0.0, 0.9: -1e307}), "b": (100, {0.5: 9e307, 0.9: 8e307})})
    assert huge.allocate(0.45) == {"a": 0.0, "b": 0.9}
    with pytest.raises(ValueError, match="dense_score: expected a finite score to compare with; got inf"):
        SensitivityReport(float("inf"), ())
