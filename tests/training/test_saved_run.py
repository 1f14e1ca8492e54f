"""Run as a script, this file is the process that the kill test kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cases import model
from sparsam import checkpoint
from sparsam.allocation import ERK, OWL
from sparsam.checkpoint import atomic
from sparsam.config import PruningConfig
from sparsam.masks import Mask
from sparsam.patterns import Block
from sparsam.scores import Magnitude, Saliency, Wanda
from sparsam.statistics import InputStatistics
from sparsam.training.iterative import HistoryRow, IterativePruner

Arrays = dict[str, NDArray[Any]]
Masks = dict[str, Mask]


def pruner() -> IterativePruner:
    return IterativePruner(config=PruningConfig(0.9, scope="global", schedule="cubic", num_iterations=5))


def kept(arrays: Mapping[str, NDArray[Any]]) -> float:
    """A score: the share of weights that are not zero."""
    return sum(np.count_nonzero(a) for a in arrays.values()) / sum(a.size for a in arrays.values())


def train(arrays: Arrays, masks: Masks, iteration: int) -> Arrays:
    """A recovery that moves every weight, the pruned ones too."""
    del masks
    rng = np.random.default_rng(iteration)
    return {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items()}


def test_state_can_be_read_while_it_grows(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    names: list[list[str]] = []

    def look(row: HistoryRow) -> None:
        names.append(sorted(path.name for path in folder.iterdir()))
        stored = checkpoint.load(folder / f"sparsam-{row.iteration:04d}" / "weights.safetensors").weights
        assert sum(np.count_nonzero(a) for a in stored.values()) / 572 == row.score

    result = IterativePruner(num_iterations=3).run(model(), kept, train, on_iteration=look, state_dir=folder)
    assert names == [[f"sparsam-{i:04d}", "state.json", "state.lock"] for i in (1, 2, 3)]
    again = IterativePruner(num_iterations=3).run(
        model(), lambda _: pytest.fail("done"), state_dir=str(folder)
    )
    assert again.history == result.history
    assert again.masks == result.masks
    assert again.report == result.report
    assert list(again.weights) == list(result.weights)
    assert all((again.weights[name] == array).all() for name, array in result.weights.items())


def test_an_early_stop_is_remembered_until_the_limits_change(tmp_path: Path) -> None:
    pruner = IterativePruner(num_iterations=4)
    scored: list[float] = []

    def score(arrays: Arrays) -> float:
        scored.append(kept(arrays))
        return scored[-1]

    first = pruner.run(model(), score, min_score=0.7, state_dir=tmp_path)
    assert (first.stopped_early, len(first.history), len(scored)) == (True, 2, 3)
    again = pruner.run(model(), score, min_score=0.7, state_dir=tmp_path)
    assert len(scored) == 3
    assert (again.stopped_early, again.history, again.masks) == (True, first.history, first.masks)
    further = pruner.run(model(), score, min_score=0.5, state_dir=tmp_path)
    assert len(scored) == 5
    assert (further.stopped_early, len(further.history), further.history[0]) == (True, 3, first.history[0])
    assert not pruner.run(model(), score, state_dir=tmp_path).stopped_early
    assert len(scored) == 7


def other_bias() -> Arrays:
    weights = model()
    weights["fc2.bias"][3] += 1
    return weights


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"pattern": Block(1, 2)}, model(), "pattern was unstructured, now block 1x2"),
        ({"method": Magnitude(2)}, model(), r"method was Magnitude\(norm=1\), now Magnitude\(norm=2\)"),
        ({"scope": "global"}, model(), "scope was layer, now global"),
        ({"exclude": "fc1*"}, model(), r"exclude was \[\], now \['fc1\*'\]"),
        ({"overrides": {"fc1*": 0.5}}, model(), "overrides was"),
        ({"target_sparsity": 0.9}, model(), r"schedule was \[.*0.8\], now \[.*0.9\]"),
        ({}, other_bias(), "the dense weights differ in 'fc2.bias'"),
        (
            {},
            {"w": np.ones((2, 2))},
            "the dense weights differ in 'fc2.weight', 'fc2.bias', 'fc1.weight', 'w'",
        ),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], weights: Arrays, message: str
) -> None:
    base: dict[str, Any] = {"target_sparsity": 0.8, "schedule": "linear", "num_iterations": 4}
    IterativePruner(config=PruningConfig(**base)).run(model(), kept, state_dir=tmp_path)
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(ValueError, match="expected the state of this run; got another run's: .*" + message):
        IterativePruner(config=PruningConfig(**base | changes)).run(weights, kept, state_dir=tmp_path)
    assert (tmp_path / "state.json").read_bytes() == before


def test_functions_and_layouts_do_not_make_another_run(tmp_path: Path) -> None:
    class Mine:
        def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
            del name
            return weights

    for _ in range(2):
        config = PruningConfig(schedule=lambda p: 0.5 * p, num_iterations=3, method=Mine())
        weights = {name: np.asfortranarray(array) for name, array in model().items()}
        result = IterativePruner(config=config).run(weights, kept, state_dir=tmp_path)
    assert len(result.history) == 3
    with pytest.raises(ValueError, match="schedule was"):
        IterativePruner(
            config=PruningConfig(schedule=lambda p: 0.6 * p, num_iterations=3, method=Mine())
        ).run(model(), kept, state_dir=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"sparsam_state": 1, "identity": 3}', "\x00"])
def test_a_foreign_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"state\.json: .*expected .*; got .*; delete it .*name another state_dir"
    ):
        IterativePruner().run(model(), kept, state_dir=tmp_path)
    (tmp_path / "state.json").write_text('{"sparsam_state": 99, "identity": {}}')
    with pytest.raises(
        ValueError, match=r"state\.json: expected version 1 of the state of an iterative run; got 99"
    ):
        IterativePruner().run(model(), kept, state_dir=tmp_path)


@pytest.mark.parametrize(
    ("moment", "first"),
    [
        ("dense", 1),
        ("recover", 2),
        ("evaluate", 2),
        ("weights", 2),
        ("masks", 2),
        ("state", 2),
        ("clean", 3),
        ("between", 3),
    ],
)
def test_a_kill_loses_at_most_the_current_iteration(tmp_path: Path, moment: str, first: int) -> None:
    command = [sys.executable, __file__, str(tmp_path), moment]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL

    iterations: list[int] = []
    evaluated: list[float] = []

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> Arrays:
        iterations.append(iteration)
        return train(arrays, masks, iteration)

    def evaluate(arrays: Arrays) -> float:
        evaluated.append(kept(arrays))
        return evaluated[-1]

    expected = pruner().run(model(), kept, train)
    result = pruner().run(model(), evaluate, recover, state_dir=tmp_path)
    assert iterations == list(range(first, 6))
    assert len(evaluated) == len(iterations)
    assert [row[:3] for row in result.history] == [row[:3] for row in expected.history]
    assert result.dense_score == expected.dense_score
    assert result.masks == expected.masks
    assert result.report == expected.report
    assert all((result.weights[name] == array).all() for name, array in expected.weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparsam-0005", "state.json", "state.lock"]
    assert len(list((tmp_path / "sparsam-0005").iterdir())) == 2


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "sparsam-0.1.0").mkdir()
    (tmp_path / "sparsam-0.1.0" / "setup.py").write_text("mine")
    (tmp_path / "sparsam-0.1.0.tar.gz").write_text("mine")
    (tmp_path / "sparsam-0001.bak").mkdir()
    (tmp_path / "sparsam-0001").mkdir()
    (tmp_path / "sparsam-0001" / "notes.txt").write_text("mine")
    (tmp_path / "sparsam-0002").write_text("mine")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    IterativePruner(schedule=[0.5], config=PruningConfig()).run(model(), kept, state_dir=tmp_path)
    IterativePruner(schedule=[0.5], config=PruningConfig()).run(model(), kept, state_dir=tmp_path)
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert after >= set(before)
    assert len(after) == len(before) + 4


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    def nested(arrays: Arrays) -> float:
        with pytest.raises(
            ValueError,
            match=r": expected a free folder; got one in use by another run; .* name another state_dir",
        ):
            IterativePruner().run(model(), kept, state_dir=tmp_path)
        return kept(arrays)

    expected = IterativePruner().run(model(), kept)
    assert IterativePruner().run(model(), nested, state_dir=tmp_path).masks == expected.masks
    with pytest.raises(ZeroDivisionError):
        IterativePruner(num_iterations=5).run(model(), lambda _: 1 / 0, state_dir=tmp_path / "failed")
    assert IterativePruner(num_iterations=5).run(model(), kept, state_dir=tmp_path / "failed").history


def finished(folder: Path) -> dict[str, Any]:
    IterativePruner(num_iterations=3).run(model(), kept, state_dir=folder)
    state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": None}, "state.json: field history: expected a value; got none"),
        ({"dense_score": None}, "state.json: field dense_score: expected a value; got none"),
        ({"failed": None}, "state.json: field failed: expected a value; got none"),
        ({"history": 3}, "state.json: field history: expected array; got 3"),
        ({"history": [[1, 0.2]]}, r"field history\[0\]: expected array of length 4; got \[1, 0.2\]"),
        ({"history": [[1, 0.2, "a", 0.1]]}, r"field history\[0\]\[2\]: expected one of .*; got 'a'"),
        ({"history": [[1, -1e25, 0.3, 0.1]]}, r"field history\[0\]\[1\]: expected float >= 0.0; got -1e\+25"),
        ({"history": [[1, float("inf"), 0.3, 0.1]]}, r"history\[0\]\[1\]: expected float <= 1.0; got inf"),
        ({"history": [[1, 0.2, 0.3, float("inf")]]}, r"history\[0\]\[3\]: expected float <= .*; got inf"),
        ({"history": [[2, 0.2, 0.3, 0.1]]}, r"field history\[0\]\[0\]: expected iteration 1; got 2"),
        ({"history": [["../x", 0.2, 0.3, 0.1]]}, r"field history\[0\]\[0\]: expected int; got '../x'"),
        ({"history": [[1, 0.2, 0.3, 0.1]]}, "sparsam-0001: expected the weights and masks .*No such file"),
        ({"failed": [1, 2]}, r"field failed: expected array of length 4; got \[1, 2\]"),
        ({"failed": [3, 0.1, 0.1, 0.1]}, r"field failed\[0\]: expected iteration 4; got 3"),
        ({"dense_score": [1]}, r"field dense_score: expected float \| str; got \[1\]"),
        ({"identity": {"weights": []}}, r"field identity\.weights: expected object; got \[\]"),
        ({"more": 1}, "field more: expected no such field; got one"),
    ],
)
def test_a_damaged_state_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    state = finished(tmp_path)
    for field, value in changes.items():
        if value is None:
            del state[field]
        else:
            state[field] = value
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "sparsam-0009").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{message}.*; delete it to start again, or name"):
        IterativePruner(num_iterations=3).run(model(), kept, state_dir=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "sparsam-0009").exists()


def test_files_that_are_gone_or_others(tmp_path: Path) -> None:
    finished(tmp_path)
    weights, masks = (tmp_path / "sparsam-0003" / f"{name}.safetensors" for name in ("weights", "masks"))
    content = {file: file.read_bytes() for file in (weights, masks)}
    cases: list[tuple[Path, Arrays | None, str]] = [
        (weights, None, "No such file"),
        (masks, None, "No such file"),
        (weights, {"fc1.weight": np.ones((20, 16))}, "weights.safetensors: expected the tensors of the run"),
        (masks, {}, "masks.safetensors: expected the masks of the run"),
        (masks, {"fc1.weight": np.zeros(9, np.uint8)}, "expected a mask"),
    ]
    for file, arrays, message in cases:
        if arrays is None:
            file.unlink()
        else:
            checkpoint.save(file, arrays)
        with pytest.raises(ValueError, match=f"{message}.*; delete it to start again"):
            IterativePruner(num_iterations=3).run(model(), kept, state_dir=tmp_path)
        file.write_bytes(content[file])
    assert len(IterativePruner(num_iterations=3).run(model(), kept, state_dir=tmp_path).history) == 3


def test_stricter_limits_hold_for_what_is_done_already(tmp_path: Path) -> None:
    pruner = IterativePruner(num_iterations=4)
    done = pruner.run(model(), kept, state_dir=tmp_path)
    scores = [row.score for row in done.history]
    limits: list[dict[str, Any]] = [
        {"min_score": scores[0] - 0.01},
        {"max_drop": done.dense_score - scores[1] - 0.01},
    ]
    for limit in limits:
        with pytest.raises(
            ValueError, match=r"got 0.\d+ in iteration 2 of 4, .* are gone; loosen the limits"
        ):
            pruner.run(model(), kept, state_dir=tmp_path, **limit)
    dense = pruner.run(model(), kept, state_dir=tmp_path, min_score=scores[0] + 0.01)
    assert (dense.stopped_early, dense.final_sparsity, len(dense.history)) == (True, 0.0, 1)
    assert dense.masks["fc1.weight"] == Mask.ones((20, 16))
    again = pruner.run(model(), kept, state_dir=tmp_path, min_score=scores[-1])
    assert (again.stopped_early, again.history, again.masks) == (False, done.history, done.masks)


def run_until(moment: str, folder: Path) -> None:
    """Prunes, and ends as in a power cut when the moment comes in the second iteration."""
    publish, save, glob = atomic.publish, checkpoint.save, Path.glob
    done = 0

    def reached(here: str) -> None:
        if here == moment and (done == 1 or here == "dense"):
            os.kill(os.getpid(), signal.SIGKILL)

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> Arrays:
        reached("recover")
        return train(arrays, masks, iteration)

    def evaluate(arrays: Arrays) -> float:
        reached("evaluate")
        return kept(arrays)

    def half_saved(path: Path, weights: Arrays) -> None:
        if path.stem == moment:
            path.with_name(".tmpABCDEF").write_bytes(b"half a file")
            path.with_name(f".{path.name}.0123abcd.tmp").write_bytes(b"half a file")
        reached(path.stem)
        save(path, weights)

    def published(writers: Any) -> None:
        reached("state")
        publish(writers)

    def globbed(path: Path, pattern: str) -> Any:
        reached("clean" if list(glob(path, "sparsam-*")) else "dense")
        return glob(path, pattern)

    def on_iteration(row: HistoryRow) -> None:
        nonlocal done
        done = row.iteration - 1
        reached("between")
        done = row.iteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsam.training.saved_run.publish", published)
        patch.setattr("sparsam.training.saved_run.checkpoint.save", half_saved)
        patch.setattr(Path, "glob", globbed)
        pruner().run(model(), evaluate, recover, state_dir=folder, on_iteration=on_iteration)


if __name__ == "__main__":
    run_until(sys.argv[2], Path(sys.argv[1]))


def test_data_and_allocations_tell_runs_apart(tmp_path: Path) -> None:
    weights = {"w": np.arange(1.0, 41.0).reshape(5, 8)}

    def run(folder: str, *, scale: float = 1.0, power: float = 1.0) -> None:
        gradients = {"w": np.linspace(1, 2, 40).reshape(5, 8) * scale}
        config = PruningConfig(method=Saliency(gradients), allocation=ERK(power))
        IterativePruner(0.1, 0.5, 3, config=config).run(weights, lambda _: 0.0, state_dir=tmp_path / folder)

    run("a")
    run("a")
    with pytest.raises(
        ValueError, match=r"another run's: .*method was Saliency\(gradients={'w': \w+}\), now"
    ):
        run("a", scale=2)
    with pytest.raises(
        ValueError, match=r"another run's: .*allocation was ERK\(power=1.0.*, now ERK\(power=2.0"
    ):
        run("a", power=2.0)
    statistics = InputStatistics(8).update(np.ones((2, 8)))
    for allocation in (OWL({"w": statistics}), {"w": 0.5}):
        config = PruningConfig(method=Wanda({"w": statistics}), allocation=allocation)
        for _ in range(2):
            IterativePruner(0.1, 0.5, 3, config=config).run(weights, lambda _: 0.0, state_dir=tmp_path / "b")
        (tmp_path / "b" / "state.json").unlink()
