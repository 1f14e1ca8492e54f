"""Pruning in sequence, as a job: executors, interrupts, resuming from a folder, progress."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from pruning_models import model_and_batches, normal
from sequence_cases import net

import torch
from sparsam.reconstruction.sequential import LayerFit, LayerProblem, fit_layer
from sparsam.scores import Saliency
from sparsam.torch import prune
from sparsam.torch.pruning import layer_fits, spilling
from torch import Tensor, nn


def pruned_state(executor: Executor | None) -> dict[str, Tensor]:
    model, batches = model_and_batches("llama", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(model, None, batches, target_sparsity=0.5, executor=executor)
    state: dict[str, Tensor] = model.state_dict()
    return state


@contextmanager
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@contextmanager
def dask() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.mark.parametrize("workers", [processes, dask], ids=lambda make: make.__name__)
def test_an_executor_gives_the_same_bits(workers: Callable[[], Any]) -> None:
    want = pruned_state(None)
    with workers() as executor:
        found = pruned_state(executor)
    for name, tensor in want.items():
        assert torch.equal(tensor, found[name]), name


class Stop(Exception):
    pass


def stopping(after: int, error: type[BaseException]) -> Callable[[LayerProblem], LayerFit]:
    count = 0

    def fit(problem: LayerProblem) -> LayerFit:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return fit_layer(problem)

    return fit


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 4])
def test_what_is_stopped_leaves_the_model_as_it_was(
    error: type[BaseException], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = threading.active_count()
    monkeypatch.setattr(layer_fits, "fit_layer", stopping(after, error))
    with pytest.raises(error):
        prune(model.train(), None, batches, target_sparsity=0.5)
    assert threading.active_count() == threads
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_interrupt_while_results_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    equal, calls = torch.equal, 0

    def interrupted(a: Tensor, b: Tensor) -> bool:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(model, None, batches, target_sparsity=0.5)
    monkeypatch.undo()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("after", [1, 5])
def test_a_stopped_call_goes_on_from_its_folder(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"target_sparsity": 0.5, "state_dir": tmp_path / "state"}
    model, batches = net()
    monkeypatch.setattr(layer_fits, "fit_layer", stopping(after, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(model, None, batches, **options)
    fits: list[str] = []

    def counted(problem: LayerProblem) -> LayerFit:
        fits.append(problem.name)
        return fit_layer(problem)

    monkeypatch.setattr(layer_fits, "fit_layer", counted)
    report = prune(model, None, batches, **options)
    done = {1: 1, 5: 4}[after]  # whole groups
    assert len(fits) == 8 - done
    other, _ = net()
    whole = prune(other, None, batches, target_sparsity=0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert [layer.error for layer in report.layers] == [layer.error for layer in whole.layers]


def test_a_folder_of_another_call_is_refused(tmp_path: Path) -> None:
    model, batches = net()
    prune(model, None, batches, target_sparsity=0.5, state_dir=tmp_path)
    wanted = "state_dir: .*: expected what a call with this model, calibration and configuration saved"
    for changes in ({"target_sparsity": 0.6}, {"target_sparsity": 0.5, "method": "obs"}):
        other, _ = net()
        options: Any = changes
        with pytest.raises(ValueError, match=wanted):
            prune(other, None, batches, state_dir=tmp_path, **options)
    other, _ = net()
    with pytest.raises(ValueError, match=wanted):
        prune(other, None, batches[1:], target_sparsity=0.5, state_dir=tmp_path)


def test_a_folder_of_other_scores_or_other_keywords_is_refused(tmp_path: Path) -> None:
    dense, batches = net()
    wanted = "state_dir: .*: expected what a call with this model, calibration and configuration saved"
    gradients = {name: normal(1, *p.shape).numpy() for name, p in dense.named_parameters()}
    prune(copy.deepcopy(dense), None, batches, method=Saliency(gradients), state_dir=tmp_path / "scores")
    prune(copy.deepcopy(dense), None, batches, method=Saliency(gradients), state_dir=tmp_path / "scores")
    others = {name: gradient[::-1].copy() for name, gradient in gradients.items()}
    with pytest.raises(ValueError, match=wanted):
        prune(copy.deepcopy(dense), None, batches, method=Saliency(others), state_dir=tmp_path / "scores")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)  # type: ignore[no-any-return]

    two, x, y = Two(), normal(2, 64, 6), normal(3, 64, 6)
    prune(copy.deepcopy(two), None, [{"x": x, "y": y}], state_dir=tmp_path / "keywords")
    with pytest.raises(ValueError, match=wanted):
        prune(copy.deepcopy(two), None, [{"y": x, "x": y}], state_dir=tmp_path / "keywords")


def test_progress_goes_to_standard_error_and_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = net()
    prune(model, None, batches, target_sparsity=0.5)
    assert capsys.readouterr() == ("", "")
    prune(model, None, batches, target_sparsity=0.6, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("[########################] 8/8 end.weight")
    assert lines[-1].endswith("0:00 left")


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_activations_on_disk_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilling, "_LEAST", 1)
    mapped: list[int] = []
    from_file = torch.from_file

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        mapped.append(1)
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch, "from_file", counted)
    results = []
    for spill_dir in (None, tmp_path / "spill"):
        model, batches = model_and_batches(name, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prune(model, None, batches, target_sparsity=0.5, spill_dir=spill_dir)
        results.append(model.state_dict())
    assert len(mapped) > 50
    assert list((tmp_path / "spill").iterdir()) == []
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key
