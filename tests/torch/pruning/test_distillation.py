from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pruning_models import tiny_bert
from torch.utils.data import DataLoader, TensorDataset
from training_cases import equal_states, mlp
from transformers import BertModel

import torch
from sparsam.torch import DistillationReport, Pruner, distill, prune
from sparsam.torch.pruning.hidden_states import block_names, first_tensor
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(tiny_bert())


def tokens(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        mask = torch.ones(4, 8, dtype=torch.int64)
        mask[1, 5:] = 0
        found.append({"input_ids": torch.randint(40, (4, 8), generator=generator), "attention_mask": mask})
    return found


def inputs(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 20, generator=generator) for _ in range(count)]


def pruned_mlp(sparsity: float = 0.7) -> tuple[nn.Module, nn.Module]:
    teacher = mlp()
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=sparsity)
    return student, teacher


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("layers", ["all", "last", "outputs"])
def test_a_transformer_learns_and_its_zeros_stay(layers: Any) -> None:
    teacher = bert()
    student = copy.deepcopy(teacher).train()
    student.encoder.layer[0].eval()
    prune(student, target_sparsity=0.6)
    dense, held = copy.deepcopy(teacher), zeros(student)
    modes = [module.training for module in (*student.modules(), *teacher.modules())]
    keys, kinds = list(student.state_dict()), [type(module) for module in student.modules()]
    report = distill(student, teacher, tokens(), steps=40, layers=layers)
    assert report.steps == len(report.losses) == 40
    assert report.stopped == "steps"
    assert report.last_loss < 0.8 * report.first_loss
    assert all(torch.equal(zero, zeros(student)[name]) for name, zero in held.items())
    assert report.sparsity[0] == report.sparsity[1]
    assert [module.training for module in (*student.modules(), *teacher.modules())] == modes
    assert list(student.state_dict()) == keys
    assert [type(module) for module in student.modules()] == kinds
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    assert equal_states(teacher, dense)
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_the_first_loss_is_its_formula() -> None:
    teacher = bert()
    teacher.train(False)
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=0.6)
    batch = tokens(1)[0]
    with torch.no_grad():
        rows = batch["attention_mask"].reshape(-1).bool()
        outputs = [model(**batch, output_hidden_states=True) for model in (student, teacher)]
        states = [[h.reshape(-1, 16)[rows] for h in out.hidden_states[1:]] for out in outputs]
        hidden = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(*states, strict=True)]
        last = [out.last_hidden_state.reshape(-1, 16)[rows] for out in outputs]
        wanted = 0.1 * sum(hidden) / 2 + (1 - nn.functional.cosine_similarity(*last)).mean()
    report = distill(student, teacher, [batch], steps=1)
    assert report.losses[0] == pytest.approx(float(wanted), rel=1e-5)


def test_batches_of_any_form_and_outputs_of_any_form() -> None:
    rows = inputs()
    data = TensorDataset(torch.cat(rows), torch.arange(128))
    forms: list[Any] = [rows, [(x,) for x in rows], [[x, 3] for x in rows], DataLoader(data, 16)]
    results = []
    for batches in forms:
        student, teacher = pruned_mlp()
        distill(student, teacher, batches, steps=20)
        results.append(student)
    assert all(equal_states(results[0], other) for other in results[1:])
    x = torch.ones(2, 3)
    for result in (x, (None, x), [x], {"loss": None, "logits": x}, {"ids": x.long(), "last_hidden_state": x}):
        assert first_tensor(result) is x
    assert first_tensor({"ids": x.long()}) is None


def test_blocks_are_found_by_structure() -> None:
    assert block_names(bert()) == ["encoder.layer.0", "encoder.layer.1"]
    assert block_names(mlp()) == ["0", "2"]


def test_masks_grow_on_the_way_with_a_pruner() -> None:
    teacher = mlp()
    student = copy.deepcopy(teacher)
    pruner = Pruner(student, target_sparsity=0.6, end=20, every=5)
    report = distill(student, teacher, inputs(), steps=40, pruner=pruner)
    assert report.sparsity[0] == 0.0
    assert report.sparsity[1] == pytest.approx(0.6, abs=1e-3)
    assert pruner.finished
    assert sum(int(zero.sum()) for zero in zeros(student).values()) == round(0.6 * 640) + round(0.6 * 256)


def test_the_caller_may_bring_an_optimizer() -> None:
    student, teacher = pruned_mlp()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    report = distill(student, teacher, inputs(), steps=30, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert report.last_loss < report.first_loss


@pytest.mark.parametrize("grow", [False, True])
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, grow: bool) -> None:
    def run(folder: Path | None, stop: int | None = None) -> tuple[nn.Module, DistillationReport | None]:
        student, teacher = pruned_mlp(0.3)
        pruner = Pruner(student, target_sparsity=0.6, end=30, every=4) if grow else None
        torch.manual_seed(7)
        loader = DataLoader(TensorDataset(torch.cat(inputs())), 16, shuffle=True)
        calls = 0

        def count(module: nn.Module, args: Any) -> None:
            nonlocal calls
            calls += 1
            if stop is not None and calls > stop:
                raise KeyboardInterrupt

        handle = student.register_forward_pre_hook(count)
        try:
            report = distill(
                student, teacher, loader, steps=40, state_dir=folder, checkpoint_every=5, pruner=pruner
            )
        except KeyboardInterrupt:
            return student, None
        finally:
            handle.remove()
        return student, report

    whole, report = run(None)
    for stop in (13, 29):  # Within the second epoch, and in the fourth after resuming.
        stopped, nothing = run(tmp_path, stop if stop == 13 else 19)
        assert nothing is None
        assert sum(int(zero.sum()) for zero in zeros(stopped).values()) >= round(0.3 * 640)
    resumed, again = run(tmp_path)
    assert report is not None
    assert again is not None
    assert again.losses == report.losses
    assert equal_states(whole, resumed)
    assert run(tmp_path)[1] == again  # What is finished is not done again.


def test_outputs_of_one_number_are_matched() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=0.5)
    with torch.no_grad():  # which a caller may have left on
        report = distill(student, teacher, inputs(), steps=60, layers="outputs", learning_rate=1e-2)
        a, b = (torch.cat([model(batch) for batch in inputs()]) for model in (student, teacher))
    assert report.last_loss < 0.2 * report.first_loss
    assert float((a - b).square().sum() / b.square().sum()) < 0.2 * report.first_loss


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Recording(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    student, teacher = pruned_mlp()
    distill(student, teacher, inputs(), steps=50, learning_rate=1e-3)
    assert len(rates) == 50
    assert 0 < rates[0] <= 2e-4
    assert rates[5] == max(rates) == pytest.approx(1e-3)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-5


def test_rows_of_padding_do_not_count_as_pruned() -> None:
    teacher = nn.Sequential(nn.Embedding(100, 8, padding_idx=0), nn.Linear(8, 16), nn.Linear(16, 4))
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=0.75)
    report = distill(student, teacher, [torch.randint(1, 100, (4, 6))], steps=2)
    assert report.sparsity == (0.75, 0.75)


def test_ctrl_c_in_the_middle_of_a_step_leaves_the_student_valid() -> None:
    student, teacher = pruned_mlp()
    held = zeros(student)

    class Stopped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(1)
            raise KeyboardInterrupt

    student.train()
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, inputs(), steps=3, optimizer=Stopped(student.parameters(), lr=0.1))
    assert all(not p.detach()[held[n]].any() for n, p in student.named_parameters() if n in held)
    assert student.training
    assert not any(module._forward_hooks for module in student.modules())


def test_a_budget_of_time_and_an_iterator_that_ends() -> None:
    student, teacher = pruned_mlp()
    report = distill(student, teacher, inputs(), seconds=0.2)
    assert report.stopped == "seconds"
    assert 0 < report.seconds < 10
    report = distill(student, teacher, iter(inputs(5)), steps=30)
    assert (report.steps, report.stopped) == (5, "batches")
    assert json.loads(report.to_json())["steps"] == 5
    assert "5 steps in" in str(report)


def test_the_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = pruned_mlp()
    distill(student, teacher, inputs(), steps=3)
    assert capsys.readouterr().err == ""
    distill(student, teacher, inputs(), steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err


def endless() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches: expected at least one batch; got none"),
        ({"batches": endless()}, "batches: expected at least one batch; got none"),
        ({"batches": ["text"]}, "batches: batch 0: expected tensors"),
        ({"batches": [{"x": torch.ones(1)}]}, "batches: batch 0: expected inputs of the model's forward"),
        ({"batches": [torch.full((2, 20), float("nan"))]}, "batches: batch 0: expected finite numbers"),
        ({"steps": None}, "steps: expected a number of steps, or seconds=; got None"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"seconds": -1}, "seconds: expected a time above 0"),
        ({"seconds": True}, "seconds: expected a time above 0; got True"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected an integer of at least 1"),
        ({"loss": "mse"}, "loss: expected 'cosine' or 'kl'; got 'mse'"),
        ({"layers": "some"}, "layers: expected 'all', 'last' or 'outputs'"),
        ({"output": lambda *_: None}, "teacher: expected an output with a floating-point tensor"),
        ({"output": lambda out, _: out.mean()}, "teacher: expected an output with .*; got a single number"),
        ({"learning_rate": 1e30}, "loss: expected a finite number; got (nan|inf) at step"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    student, teacher = pruned_mlp()
    arguments: dict[str, Any] = {"batches": inputs(), "steps": 20} | changes
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, arguments.pop("batches"), **arguments)


@pytest.mark.parametrize("batch", [torch.randn(2, 13), (torch.randn(2, 13),), {"input": torch.randn(2, 13)}])
def test_batches_that_the_models_cannot_be_called_with(batch: Any) -> None:
    student, teacher = pruned_mlp()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    unfit = r"batches: expected what the teacher can be called with; got \w+: .*; pass the arguments of its"
    with pytest.raises(ValueError, match=unfit):
        distill(student, teacher, [batch], steps=2)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_bad_pairs(tmp_path: Path) -> None:
    student, teacher = pruned_mlp()
    with pytest.raises(ValueError, match=r"teacher: expected a model with Parameters of its own"):
        distill(student, student, inputs(), steps=1)
    with pytest.raises(TypeError, match=r"teacher: expected a torch.nn.Module; got str"):
        distill(student, "dense", inputs(), steps=1)  # type: ignore[arg-type]
    wide = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 8))
    with pytest.raises(ValueError, match=r"hidden state of '0': expected shape \(16, 33\); got \(16, 32\)"):
        distill(student, wide, inputs(), steps=1)
    assert distill(student, wide, inputs(), steps=1, layers="outputs").steps == 1
    other = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 9))
    with pytest.raises(ValueError, match=r"output of the student: expected shape \(16, 9\); got \(16, 8\)"):
        distill(student, other, inputs(), steps=1, layers="outputs")
    of_teacher = torch.optim.SGD(teacher.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"student: expected outputs with gradients of what the optimizer"):
        distill(student, teacher, inputs(), steps=1, optimizer=of_teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match=r"expected the student's blocks; got none named '0'"):
        distill(student, nn.Linear(20, 8), inputs(), steps=1)
    pruner = Pruner(copy.deepcopy(student), target_sparsity=0.6, end=1)
    with pytest.raises(ValueError, match=r"pruner: expected that of the student; got one of another model"):
        distill(student, teacher, inputs(), steps=1, pruner=pruner)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"student: expected Parameters that require gradients"):
        distill(student, teacher, inputs(), steps=1)
    student.requires_grad_(True)
    distill(student, teacher, inputs(), steps=1, state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"expected this run's state; got one of other steps"):
        distill(student, teacher, inputs(), steps=2, state_dir=tmp_path)
    sparser = pruned_mlp(0.9)[0]
    with pytest.raises(ValueError, match=r"expected this run's state; got one of other zeros"):
        distill(sparser, teacher, inputs(), steps=1, state_dir=tmp_path)
    with torch.no_grad():
        teacher.get_parameter("0.bias").add_(1)
    with pytest.raises(ValueError, match=r"expected this run's state; got one of other teacher"):
        distill(student, teacher, inputs(), steps=1, state_dir=tmp_path)
    with torch.no_grad():
        teacher.get_parameter("0.bias").sub_(1)
    (tmp_path / "distillation.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected a state of distill; got .*delete it to start again"):
        distill(student, teacher, inputs(), steps=1, state_dir=tmp_path)


def test_states_from_before_there_was_a_choice_of_the_loss(tmp_path: Path) -> None:
    """They were trained by cosines, and go on so when told to."""
    student, teacher = pruned_mlp()
    distill(student, teacher, inputs(), steps=2, state_dir=tmp_path, loss="cosine")
    file = tmp_path / "distillation.pt"
    state = torch.load(file, weights_only=True)
    del state["identity"]["loss"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"expected this run's state; got one of other loss"):
        distill(student, teacher, inputs(), steps=2, state_dir=tmp_path, loss="kl")
    assert distill(student, teacher, inputs(), steps=2, state_dir=tmp_path, loss="cosine").steps == 2
