from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from pruning_models import tiny_bert
from torch.utils.data import DataLoader, TensorDataset
from training_cases import batch, equal_states, mlp
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import torch
from sparsam.torch import Pruner, lightning_callback, trainer_callback
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of both libraries, about their own defaults
]


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(tiny_bert())


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (48, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def trainer(folder: Path, pruner: Pruner, model: nn.Module, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 12,
        "save_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    args = TrainingArguments(output_dir=str(folder), **(options | changes))
    return Trainer(
        model, args, train_dataset=rows(), callbacks=[trainer_callback(pruner, mask_gradients=True)]
    )


@pytest.mark.parametrize("options", [{}, {"method": "movement"}, {"regrow": "rigl"}], ids=str)
def test_hugging_face_trainer_prunes_and_resumes(tmp_path: Path, options: dict[str, Any]) -> None:
    model = bert()
    keys = list(model.state_dict())
    pruner = Pruner(model, target_sparsity=0.7, end=9, every=2, **options)
    trainer(tmp_path / "a", pruner, model).train()
    assert pruner.steps == 12
    assert pruner.finished
    assert list(model.state_dict()) == keys
    assert len(pruner.masks) == 14  # Two blocks of six, the pooler, and the classifier.
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name).detach().numpy()
        assert not weight[~mask.to_array()].any()
        assert mask.count == mask.size - round(0.7 * mask.size)
    saved = sorted(path.parent.name for path in (tmp_path / "a").glob("*/sparsam_pruner.pt"))
    assert saved == ["checkpoint-10", "checkpoint-12", "checkpoint-5"]

    again = bert(1)
    second = Pruner(again, target_sparsity=0.7, end=9, every=2, **options)
    trainer(tmp_path / "a", second, again).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert second.steps == 12
    assert second.masks == pruner.masks
    assert equal_states(model, again)


def test_hugging_face_trainer_accumulates(tmp_path: Path) -> None:
    model = bert()
    pruner = Pruner(model, target_sparsity=0.5, end=4)
    trainer(tmp_path, pruner, model, gradient_accumulation_steps=3, max_steps=6, save_strategy="no").train()
    assert pruner.steps == 6
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_pruner_of_another_model_is_refused(tmp_path: Path) -> None:
    pruner = Pruner(bert(), target_sparsity=0.7, end=9)
    with pytest.raises(ValueError, match="pruner: expected that of the Trainer's model; got one of another"):
        trainer(tmp_path, pruner, bert()).train()
    pruner = Pruner(Regression(), target_sparsity=0.7, end=9)
    with pytest.raises(ValueError, match="pruner: expected that of the LightningModule; got one of another"):
        fit(Regression(), pruner, tmp_path)


def test_a_checkpoint_without_the_pruner_is_refused(tmp_path: Path) -> None:
    model = bert()
    trainer(tmp_path, Pruner(model, target_sparsity=0.7, end=9), model).train()
    (tmp_path / "checkpoint-5" / "sparsam_pruner.pt").unlink()
    again = bert()
    pruner = Pruner(again, target_sparsity=0.7, end=9)
    with pytest.raises(
        ValueError, match=r"expected the pruner's state in .*checkpoint-5.*step 5; got no such"
    ):
        trainer(tmp_path, pruner, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    pruner.load_state_dict(
        torch.load(tmp_path / "checkpoint-10" / "sparsam_pruner.pt") | {"steps": 5}  # The user's own way.
    )
    trainer(tmp_path, pruner, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert pruner.steps == 12


class Regression(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = mlp(seed)

    def training_step(self, part: list[Tensor]) -> Tensor:
        return torch.nn.functional.mse_loss(self.model(part[0]), part[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


def fit(module: Regression, pruner: Pruner, folder: Path, resume: Path | None = None, **options: Any) -> None:
    inputs, targets = batch(0, 64)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8, num_workers=0)
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    settings = {"max_epochs": 2, "gradient_clip_val": 1.0} | options
    pl.Trainer(
        accelerator="cpu",
        callbacks=[saver, lightning_callback(pruner, mask_gradients=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    ).fit(module, loader, ckpt_path=resume)


@pytest.mark.parametrize("options", [{}, {"method": "saliency"}, {"regrow": "rigl"}], ids=str)
def test_lightning_prunes_and_resumes(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Regression()
    pruner = Pruner(module, target_sparsity=0.8, end=13, every=2, **options)
    fit(module, pruner, tmp_path)
    assert pruner.steps == 16
    for name, mask in pruner.masks.items():
        assert not module.get_parameter(name).detach().numpy()[~mask.to_array()].any()
        assert mask.count == mask.size - round(0.8 * mask.size)

    again = Regression(1)
    second = Pruner(again, target_sparsity=0.8, end=13, every=2, **options)
    fit(again, second, tmp_path / "b", tmp_path / "step=8.ckpt")
    assert second.steps == 16
    assert second.masks == pruner.masks
    assert equal_states(module, again)


def test_lightning_accumulates(tmp_path: Path) -> None:
    module = Regression()
    pruner = Pruner(module.model, target_sparsity=0.8, end=5, every=2)
    fit(module, pruner, tmp_path, accumulate_grad_batches=2)
    assert pruner.steps == 8
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    assert np.count_nonzero(module.get_parameter("model.0.weight").detach().numpy()) == 128


@pytest.mark.parametrize(
    ("make", "package", "module"),
    [
        (trainer_callback, "transformers", "huggingface_callback"),
        (lightning_callback, "lightning.pytorch", "lightning_callback"),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, make: Any, package: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"sparsam.torch.pruning.{module}", raising=False)
    name = package.partition(".")[0]
    with pytest.raises(ImportError, match=f"expected {name}; got no such package"):
        make(Pruner(mlp(), target_sparsity=0.5, end=3))
