from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from pruning_models import ids, tiny_bert
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import torch
from sparsam.torch import distill, prune
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(kind: Any, config: Any) -> tuple[Any, Any]:
    """A pruned model and its dense one."""
    torch.manual_seed(0)
    teacher = kind(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4)  # so that outputs are far from alike
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=0.6)
    return student, teacher


def llama() -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return pair(LlamaForCausalLM, config)


def divergence(found: Tensor, target: Tensor) -> float:
    """KL(softmax(target) || softmax(found)), the mean over rows, in float64 by its definition."""
    p, q = (np.exp(t.detach().double().numpy()).reshape(-1, t.shape[-1]) for t in (target, found))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def cosine(found: Tensor, target: Tensor) -> float:
    a, b = (t.detach().double().reshape(-1, t.shape[-1]) for t in (found, target))
    return float((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def first_loss(student: nn.Module, teacher: nn.Module, batch: Any, **options: Any) -> float:
    return distill(copy.deepcopy(student), teacher, [batch], steps=1, layers="outputs", **options).losses[0]


@pytest.mark.parametrize("kind", ["causal", "tokens", "sequences"])
def test_logits_are_compared_by_their_probabilities(kind: str) -> None:
    labels = tiny_bert()
    labels.num_labels = 5
    kinds = {"tokens": BertForTokenClassification, "sequences": BertForSequenceClassification}
    student, teacher = llama() if kind == "causal" else pair(kinds[kind], labels)
    batch = {"input_ids": ids(3) % 40}
    with torch.no_grad():
        found, target = student(**batch).logits, teacher(**batch).logits
    wanted = divergence(found, target)
    assert wanted > 1e-4
    assert first_loss(student, teacher, batch) == pytest.approx(wanted, rel=1e-4)
    assert first_loss(student, teacher, batch, loss="kl") == first_loss(student, teacher, batch)
    assert first_loss(student, teacher, batch, loss="cosine") == pytest.approx(
        cosine(found, target), rel=1e-4
    )


def test_positions_of_padding_do_not_count() -> None:
    student, teacher = llama()
    mask = torch.ones(8, 12, dtype=torch.int64)
    mask[2:, 7:] = 0
    batch = {"input_ids": ids(3) % 40, "attention_mask": mask}
    with torch.no_grad():
        found, target = (model(**batch).logits[mask.bool()] for model in (student, teacher))
    assert first_loss(student, teacher, batch) == pytest.approx(divergence(found, target), rel=1e-4)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_logits_that_are_no_probabilities_of_one_label(problem: Any) -> None:
    config = tiny_bert()
    config.num_labels, config.problem_type = 5, problem
    student, teacher = pair(BertForSequenceClassification, config)
    batch = {"input_ids": ids(3) % 40}
    with torch.no_grad():
        wanted = cosine(student(**batch).logits, teacher(**batch).logits)
    assert first_loss(student, teacher, batch) == pytest.approx(wanted, rel=1e-4)


def test_one_number_for_each_row() -> None:
    config = tiny_bert()
    config.num_labels = 1  # a regression, whatever the config says
    student, teacher = pair(BertForSequenceClassification, config)
    batch = {"input_ids": ids(3) % 40}
    with torch.no_grad():
        a, b = student(**batch).logits, teacher(**batch).logits
    wanted = float((a - b).square().sum() / b.square().sum())
    for options in ({}, {"loss": "kl"}, {"loss": "cosine"}):
        assert first_loss(student, teacher, batch, **options) == pytest.approx(wanted, rel=1e-4)


def test_a_tensor_is_compared_by_its_direction_unless_told() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    student = copy.deepcopy(teacher)
    prune(student, target_sparsity=0.6)
    x = torch.randn(32, 8)
    with torch.no_grad():
        found, target = student(x), teacher(x)
    assert first_loss(student, teacher, x) == pytest.approx(cosine(found, target), rel=1e-4)
    assert first_loss(student, teacher, x, loss="kl") == pytest.approx(divergence(found, target), rel=1e-4)
    report = distill(student, teacher, [x], steps=60, loss="kl", learning_rate=3e-3)
    assert report.last_loss < 0.7 * report.first_loss


class Masked(nn.Module):
    """A model that rules out the last of its seven classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], -1)


def test_classes_that_the_teacher_rules_out_count_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = Masked(), Masked()
    x = torch.randn(5, 8)
    wanted = divergence(student.head(x), teacher.head(x))
    assert first_loss(student, teacher, x, loss="kl") == pytest.approx(wanted, rel=1e-5)
    losses = distill(student, teacher, [x], steps=20, layers="outputs", loss="kl").losses
    assert losses[-1] < losses[0]
