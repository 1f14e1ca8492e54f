"""The importance of heads, measured on a task: each is dropped alone."""

from __future__ import annotations

import copy

import pytest
from structured_models import make, run

import torch
from sparsam.torch import head_importance, shrink
from torch import nn


def test_each_score_is_that_of_the_model_without_the_head() -> None:
    model, inputs = make("bert")
    wanted = run(model, inputs)

    def score(judged: nn.Module) -> float:
        return -float((run(judged, inputs) - wanted).square().mean())

    seen: list[tuple[str, int, float]] = []
    found = head_importance(model, score, inputs, callback=lambda *row: seen.append(row))
    assert found.dense_score == 0
    assert list(found.scores) == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    for layer in range(2):
        for head in range(4):
            other = copy.deepcopy(model)
            attention = other.encoder.layer[layer].attention
            nn.init.zeros_(attention.output.dense.weight[:, 8 * head : 8 * head + 8])
            own = found.scores[f"encoder.layer.{layer}.attention.self"][head]
            assert own == pytest.approx(score(other), rel=1e-4)
            assert found.drops[f"encoder.layer.{layer}.attention.self"][head] == -own > 0
    assert [(name, head) for name, head, _ in seen] == [(n, h) for n in found.scores for h in range(4)]
    assert torch.equal(run(model, inputs), wanted)
    assert found.ranking()[0] == max(seen, key=lambda row: row[2])[:2]
    assert str(found).count("\n") == 2

    report = shrink(model, 0.25, inputs, kinds=("heads",), importance=found, seconds=0)
    for row in report.structures:
        (gone,) = set(range(4)) - set(row.kept)
        assert found.scores[row.name][gone] == max(found.scores[row.name])


def test_heads_that_hurt_go_first() -> None:
    model, inputs = make("vit")
    names = ["vit.layers.0.attention", "vit.layers.1.attention"]
    importance = {names[0]: [0.5, -1.0, 0.0, 2.0], names[1]: [1.0, 1.0, 1.0, 1.0]}
    report = shrink(model, 0.5, inputs, kinds=("heads",), importance=importance, seconds=0)
    assert [row.kept for row in report.structures] == [(0, 3), (0, 1)]


def test_what_cannot_be_measured_is_an_error() -> None:
    model, inputs = make("mlp")
    with pytest.raises(ValueError, match="expected attention heads to cut; got none"):
        head_importance(model, lambda _: 0.0, inputs)
    model, inputs = make("vit")
    before = [id(p) for p in model.parameters()]
    scores = iter([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"eval_fn: expected a finite number .* nan with head 0 of vit"):
        head_importance(model, lambda _: next(scores), inputs)
    assert [id(p) for p in model.parameters()] == before
