"""Folders of runs that were stopped: what belongs to other data or other functions is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from structured_models import make
from torch.utils.data import DataLoader, TensorDataset
from training_cases import batch, mlp

import torch
from sparsam.torch import Pruner, distill, find_smallest, prune
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(steps: Iterable[int]) -> list[Tensor]:
    return [batch(step)[0] for step in steps]


def pruned_mlp() -> tuple[nn.Module, nn.Module]:
    student = mlp()
    prune(student, target_sparsity=0.7)
    return student, mlp()


def mean_of(result: Tensor, _: Any) -> Tensor:
    return result - result.mean()


def stopped_after(student: nn.Module, calls: int) -> None:
    seen = 0

    def count(_: nn.Module, __: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise KeyboardInterrupt

    student.register_forward_pre_hook(count)


def start(folder: Path, batches: Any, calls: int) -> None:
    student, teacher = pruned_mlp()
    stopped_after(student, calls)
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, batches, steps=12, state_dir=folder, checkpoint_every=1)


@pytest.mark.parametrize("calls", [3, 4, 5])  # in the middle of the batches, at their end, in the next round
def test_distill_goes_on_with_the_same_batches_only(calls: int, tmp_path: Path) -> None:
    batches = inputs_of(range(4))
    start(tmp_path, batches, calls)
    student, teacher = pruned_mlp()
    for others in (inputs_of(range(50, 54)), batches[:2], batches[::-1]):
        if calls == 5 and others == batches[:2]:
            continue  # of this round, it has seen the first only
        with pytest.raises(
            ValueError, match=r"batches: expected the \d of this pass .*; got others; pass the"
        ):
            distill(student, teacher, others, steps=12, state_dir=tmp_path)
    student, teacher = pruned_mlp()
    whole, other_teacher = pruned_mlp()
    report = distill(student, teacher, batches, steps=12, state_dir=tmp_path)
    assert report.losses == distill(whole, other_teacher, batches, steps=12).losses


def test_distill_goes_on_with_the_same_output_only(tmp_path: Path) -> None:
    student, teacher = pruned_mlp()
    distill(student, teacher, inputs_of(range(2)), steps=2, output=mean_of, state_dir=tmp_path)
    for output in (None, lambda result, _: result):
        with pytest.raises(ValueError, match="expected this run's state; got one of other output"):
            distill(student, teacher, inputs_of(range(2)), steps=2, output=output, state_dir=tmp_path)
    distill(student, teacher, inputs_of(range(2)), steps=2, output=mean_of, state_dir=tmp_path)


def test_a_loader_that_shuffles_is_the_same_after_a_resume(tmp_path: Path) -> None:
    def loader() -> Any:
        torch.manual_seed(7)
        return DataLoader(TensorDataset(torch.cat(inputs_of(range(4)))), 16, shuffle=True)

    start(tmp_path, loader(), 6)
    student, teacher = pruned_mlp()
    assert distill(student, teacher, loader(), steps=12, state_dir=tmp_path).steps == 12


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"learning_rate": 1e-2, "optimizer": "sgd"}, ValueError,
         r"learning_rate: expected none beside an optimizer; got 0.01; set it in the optimizer"),
        ({"learning_rate": "high"}, ValueError, "learning_rate: expected a number above 0; got 'high'"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a number above 0; got 0.0"),
        ({"optimizer": "adam"}, TypeError, "optimizer: expected a torch.optim.Optimizer; got 'adam'"),
        ({"pruner": 3}, TypeError, "pruner: expected a sparsam.torch.Pruner; got 3; make one"),
        ({"output": 3}, TypeError, "output: expected a function of .*; got 3; pass one"),
        ({"seconds": "long"}, ValueError, "seconds: expected a time above 0; got 'long'"),
        ({"state_dir": 3}, TypeError, "state_dir: expected the path of a folder; got 3"),
        ({"state_dir": "{file}"}, ValueError, "state_dir: expected a folder, .*; got .*; name a folder"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches; got int; put"),
        ({"batches": torch.ones(2, 20)}, TypeError, "batches: expected an iterable of batches; got Tensor"),
    ],
)  # fmt: skip
def test_distill_with_arguments_of_another_kind(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    student, teacher = pruned_mlp()
    options: dict[str, Any] = {"batches": inputs_of(range(2)), "steps": 2} | changes
    if options.get("optimizer") == "sgd":
        options["optimizer"] = torch.optim.SGD(student.parameters(), lr=0.1)
    if options.get("state_dir") == "{file}":
        options["state_dir"] = tmp_path / "file"
        options["state_dir"].touch()
    with pytest.raises(kind, match=message):
        distill(student, teacher, options.pop("batches"), **options)


def zeros(model: nn.Module) -> float:
    return float(sum(int((p == 0).sum()) for p in model.parameters()))


def test_find_smallest_goes_on_with_the_same_function_only(tmp_path: Path) -> None:
    model, _ = make("mlp")
    options: Any = {"max_drop": 1.0, "max_evaluations": 3, "state_dir": tmp_path}
    found = find_smallest(model, lambda model: 1.0 - min(1.0, zeros(model) / 300), **options)
    fresh, _ = make("mlp")
    message = r"eval_fn: expected that of the search in .*, by which the dense model scores 1; got 2; pass"
    with pytest.raises(ValueError, match=message):
        find_smallest(fresh, lambda _: 2.0, **options)
    assert not zeros(fresh)
    again = find_smallest(fresh, lambda model: 1.0 - min(1.0, zeros(model) / 300), **options)
    assert again.curve == found.curve


@pytest.mark.parametrize("options", [{}, {"scope": "global"}])
def test_a_search_that_prunes_at_once_keeps_its_state_too(options: Any, tmp_path: Path) -> None:
    model, _ = make("mlp")
    found = find_smallest(
        model, lambda model: -zeros(model), max_drop=100, max_evaluations=3, state_dir=tmp_path, **options
    )
    assert len(found.curve) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize(
    ("eval_fn", "changes", "kind", "message"),
    [
        (3, {}, TypeError, "eval_fn: expected a function; got 3; pass one"),
        (zeros, {"callback": 3}, TypeError, "callback: expected a function; got 3"),
        (zeros, {"state_dir": 3}, TypeError, "state_dir: expected the path of a folder; got 3"),
        (
            zeros,
            {"max_drop": "little"},
            ValueError,
            "max_drop: expected a number of at least 0; got 'little'",
        ),
        (zeros, {"max_evaluations": 0}, ValueError, "max_evaluations: expected an integer of at least 1"),
    ],
)
def test_find_smallest_with_arguments_of_another_kind(
    eval_fn: Any, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        find_smallest(make("mlp")[0], eval_fn, **{"max_drop": 0.1, **changes})


@pytest.mark.parametrize("state", [None, 3, {}, "saved"])
def test_a_pruner_takes_its_own_state_only(state: Any) -> None:
    pruner = Pruner(pruned_mlp()[0], target_sparsity=0.5, end=4)
    with pytest.raises(
        ValueError, match=r"state: expected what state_dict\(\) returned: .*; got .*; pass the"
    ):
        pruner.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [("identity", None), ("masks", None), ("masks", {"0.weight": 3}), ("steps", "many"), ("due", None),
     ("sparsity", "high"), ("evidence", 3)],
)  # fmt: skip
def test_a_state_with_something_else_inside_is_refused_whole(key: str, value: Any) -> None:
    pruner = Pruner(pruned_mlp()[0], target_sparsity=0.5, method="movement", end=4)
    before = pruner.state_dict()
    state = before | {key: value}
    with pytest.raises(ValueError, match=r"state(: sparsity)?: expected .*; got .*; "):
        pruner.load_state_dict(state)
    assert pruner.state_dict()["steps"] == before["steps"]
