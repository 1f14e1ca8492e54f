"""`Pruner`: scores that need gradients, and regrowth."""

from __future__ import annotations

import numpy as np
import pytest
from training_cases import (
    METHODS,
    batch,
    loss_of,
    made,
    smallest_pruned,
    train,
    weights_of,
)

import torch
from sparsam.training.regrowth import SET, RigL, rigl_update

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["saliency", "fisher", "movement"])
def test_gradient_scores_are_their_formulas(method: str) -> None:
    model, opt, pruner = made(method=method, begin=6, end=6, schedule="one_shot")
    sums = {name: np.zeros(w.shape, np.float32) for name, w in weights_of(model).items()}
    for step in range(7):
        opt.zero_grad()
        loss_of(model, step).backward()
        taken_at = weights_of(model)
        for name, parameter in model.named_parameters():
            if name in sums:
                assert parameter.grad is not None
                g = parameter.grad.numpy()
                w = taken_at[name]
                sums[name] += {"saliency": g, "fisher": g * g, "movement": -w * g}[method]
        opt.step()
        before = weights_of(model)
        pruner.step()
    for name, total in sums.items():
        w = before[name].astype(np.float64)
        mean = (total / np.float32(7)).astype(np.float64)
        score = {"saliency": np.abs(w * mean), "fisher": w * w * mean, "movement": total}[method]
        wanted = smallest_pruned(score, np.ones(w.shape, np.bool_), round(0.8 * w.size))
        differs = wanted != pruner.masks[name].to_array()
        # Sums in another order of operations may swap neighbours.
        assert np.count_nonzero(differs) <= 2


def test_saliency_counts_from_the_last_update_on() -> None:
    model, opt, pruner = made(method="saliency", end=10, every=5)
    train(model, opt, pruner, range(6))
    assert pruner.state_dict()["evidence"]["steps"] == 0
    train(model, opt, pruner, range(6, 9))
    assert pruner.state_dict()["evidence"]["steps"] == 3


def test_rigl_moves_a_constant_number_of_weights_to_where_gradients_are_large() -> None:
    model, opt, pruner = made("adam", regrow=RigL(0.4), end=20, every=5)
    train(model, opt, pruner, range(10))
    masks = pruner.masks
    opt.zero_grad()
    loss_of(model, 10).backward()
    gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    pruner.mask_gradients()
    opt.step()
    before = weights_of(model)
    assert pruner.step()
    fraction = 0.4 / 2 * (1 + np.cos(np.pi * 10 / 20))
    for name, mask in masks.items():
        wanted = rigl_update(before[name], mask, gradients[name], fraction)
        assert pruner.masks[name] == wanted
        assert wanted.count == mask.count == weights_of(model)[name].size - round(0.8 * mask.size)
        grown = (wanted & ~mask).to_array()
        assert grown.any()
        assert not weights_of(model)[name][grown].any()
        state = opt.state[dict(model.named_parameters())[name]]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert not state[key].numpy()[grown].any()
            assert state[key].numpy()[(wanted & mask).to_array()].all()
    grown = (pruner.masks["0.weight"] & ~masks["0.weight"]).to_array()
    train(model, opt, pruner, range(11, 13))
    assert weights_of(model)["0.weight"][grown].all()
    train(model, opt, pruner, range(13, 30))
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_set_draws_anew_for_each_tensor_and_step() -> None:
    runs = []
    for seed in (0, 0, 1):
        model, opt, pruner = made(regrow=SET(seed=seed), end=20)
        train(model, opt, pruner, range(12))
        runs.append(pruner.masks)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert {name: mask.count for name, mask in runs[0].items()} == {
        name: mask.count for name, mask in runs[2].items()
    }


def test_gradients_that_are_accumulated_count_once() -> None:
    model, opt, pruner = made("sgd", method="saliency", end=8)
    train(model, opt, pruner, range(10))
    parts, parts_opt, parts_pruner = made("sgd", method="saliency", end=8)
    for step in range(10):
        parts_opt.zero_grad()
        inputs, targets = batch(step)
        for part in (slice(0, 8), slice(8, 16)):
            ((parts(inputs[part]) - targets[part]).square().mean() / 2).backward()
        parts_opt.step()
        parts_pruner.step()
    assert parts_pruner.steps == 10
    for name, mask in pruner.masks.items():
        assert mask.count == parts_pruner.masks[name].count
        assert np.mean(mask.to_array() == parts_pruner.masks[name].to_array()) > 0.99


@pytest.mark.parametrize("method", ["magnitude", "saliency", "rigl"])
def test_mixed_precision_with_a_scaler_that_skips_a_step(method: str) -> None:
    model, opt, pruner = made("adam", **METHODS[method], end=8, every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for step in range(12):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
        before = weights_of(model)
        scaler.step(opt)
        scaler.update()
        waited = not pruner.step()
        assert waited == (step not in ({0, 2, 5, 6, 8} if method == "rigl" else {0, 2, 4, 6, 8}))
        if step == 4:
            for name, w in weights_of(model).items():
                keep = pruner.masks[name].to_array()
                np.testing.assert_array_equal(w, np.where(keep, before[name], 0))
    assert scaler.get_scale() == 2.0**7
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(np.isfinite(w).all() for w in weights_of(model).values())
