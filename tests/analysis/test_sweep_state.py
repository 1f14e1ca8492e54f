from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import network
from sparsam.analysis.sweep import SensitivityPoint, sensitivity
from sparsam.config import PruningConfig
from sweeps import TENTHS, Counting


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"

    def stop(done: int, total: int, point: SensitivityPoint) -> None:
        if done == 6:
            raise KeyboardInterrupt

    for budget in (None, 15):
        state.unlink(missing_ok=True)
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            sensitivity(
                network.weights(),
                network.accuracy,
                TENTHS,
                max_evaluations=budget,
                state=state,
                callback=stop,
            )
        eval_fn = Counting()
        report = sensitivity(
            network.weights(),
            eval_fn,
            TENTHS,
            max_evaluations=budget,
            state=state,
            callback=lambda done, *_, seen=seen: seen.append(done),
        )
        assert report == sensitivity(network.weights(), network.accuracy, TENTHS, max_evaluations=budget)
        assert eval_fn.calls == report.evaluations - 6
        assert seen == list(range(7, report.evaluations + 1))
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


def test_more_sparsities_reuse_what_is_there(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"
    sensitivity(network.weights(), network.accuracy, (0.5, 0.9), state=state)
    eval_fn = Counting()
    report = sensitivity(network.weights(), eval_fn, (0.5, 0.7), state=state)
    assert (eval_fn.calls, eval_fn.dense) == (3, 0)
    assert report == sensitivity(network.weights(), network.accuracy, (0.5, 0.7))


def test_states_of_other_sweeps_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "sweep.json"
    weights = network.weights()
    sensitivity(weights, network.accuracy, (0.5,), state=state)
    before = state.read_bytes()
    other = {**weights, "mid.weight": weights["mid.weight"] + 1}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (other, {}, "the dense weights differ in 'mid.weight'"),
        (weights, {"config": PruningConfig(method="random")}, "method was"),
        (weights, {"groups": {"all": "*.weight"}}, "groups was"),
    ]
    for tensors, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            sensitivity(tensors, network.accuracy, (0.5,), state=state, **changes)
    assert state.read_bytes() == before
    for text, message in [
        ("{}", "sweep.json: expected the state of a sensitivity sweep; got JSON without"),
        (
            '{"sparsam_sweep": 1, "identity": {}}',
            "sweep.json: expected version 2 of .*; got 1; .* another file",
        ),
        (
            before.decode().replace('"mid.weight",\n   0.5', '"mid.weight",\n   "x"'),
            r"sweep.json: field points\[\d\]\[1\]: expected float; got 'x'; delete it",
        ),
        (
            before.decode().replace('"mid.weight",\n   0.5', '"mid.weight",\n   -1e25'),
            r"sweep.json: field points\[\d\]\[1\]: expected float >= 0.0; got -1e\+25; delete it",
        ),
    ]:
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            sensitivity(weights, network.accuracy, (0.5,), state=state)
