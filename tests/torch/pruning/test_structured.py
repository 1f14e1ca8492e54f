"""`shrink`: the small model computes what the large one with its units zeroed does; the right units go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structured_models
import transformers
from structured_models import MODELS, hooks, make, run

import torch
from sparsam import PruningConfig
from sparsam.torch import ShrinkReport, shrink
from torch import nn


def zeroed(model: nn.Module, report: ShrinkReport) -> nn.Module:
    """The model of before with all that went set to zero."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, axis, gone in report.removed:
            tensors[name].index_fill_(axis, torch.tensor(gone), 0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_zeroed_model(name: str) -> None:
    model, inputs = make(name)
    before = copy.deepcopy(model)
    assert torch.equal(run(model, inputs), run(before, inputs))
    params = sum(p.numel() for p in model.parameters())
    report = shrink(model, 0.5, inputs, seconds=0)
    wanted = run(zeroed(copy.deepcopy(before), report), inputs)
    torch.testing.assert_close(run(model, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, run(before, inputs), rtol=1e-3, atol=1e-4)
    for row in report.structures:
        assert row.after == row.before - round(0.5 * row.before)
        assert row.kept == tuple(sorted(set(row.kept)))
    assert report.params_before == params
    assert report.params_after == sum(p.numel() for p in model.parameters()) < params
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    assert hooks(model) == 0
    again = shrink(before, 0.5, inputs, seconds=0)
    assert again == report


@pytest.mark.parametrize("name", MODELS)
def test_a_small_model_is_read_back_deep_copied_exported_and_trained(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    fresh, _ = make(name)
    report = shrink(model, 0.5, inputs, seconds=0)
    wanted = run(model, inputs)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    ShrinkReport.from_json(report.to_json()).apply(fresh)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    assert torch.equal(run(fresh, inputs), wanted)
    assert torch.equal(run(copy.deepcopy(model), inputs), wanted)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(run(torch.load(tmp_path / "whole.pt", weights_only=False), inputs), wanted)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if hasattr(model, "config"):
        model.config.use_cache = False
    exported = torch.export.export(model, args, kwargs).module()
    torch.testing.assert_close(
        structured_models.first(exported(*args, **kwargs)), wanted, rtol=1e-4, atol=1e-5
    )
    torch.autograd.backward(structured_models.first(model(*args, **kwargs)).square().sum())
    assert all(
        p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.grad is not None
    )
    assert any(p.grad is not None for p in model.parameters())


def kept(report: ShrinkReport, name: str) -> tuple[int, ...]:
    return next(row.kept for row in report.structures if row.name == name)


def best(scores: list[float], count: int) -> tuple[int, ...]:
    """Slow: the count largest, of equals the first."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]))


def size(*slices: torch.Tensor) -> float:
    return sum(float(s.detach().double().abs().sum()) for s in slices)


def test_the_units_with_the_least_weights_go() -> None:
    model, inputs = make("bert")
    attention, mlp = model.encoder.layer[1].attention, model.encoder.layer[1].intermediate.dense
    own = attention.self
    rows = [slice(8 * h, 8 * h + 8) for h in range(4)]
    heads = [
        size(own.query.weight[r], own.key.weight[r], own.value.weight[r], attention.output.dense.weight[:, r])
        for r in rows
    ]
    out = model.encoder.layer[1].output.dense.weight.clone()
    neurons = [size(mlp.weight[i], out[:, i]) for i in range(48)]
    report = shrink(model, PruningConfig(0.3), inputs, seconds=0)
    assert kept(report, "encoder.layer.1.attention.self") == best(heads, 4 - round(0.3 * 4))
    assert kept(report, "encoder.layer.1.intermediate.dense") == best(neurons, 48 - round(0.3 * 48))


def test_heads_of_one_layer_for_queries_keys_and_values() -> None:
    model, inputs = make("gpt2")
    attention = model.transformer.h[0].attn
    weight, out = attention.c_attn.weight.clone(), attention.c_proj.weight.clone()
    heads = [
        size(
            *(weight[:, 32 * part + 8 * h : 32 * part + 8 * h + 8] for part in range(3)),
            out[8 * h : 8 * h + 8],
        )
        for h in range(4)
    ]
    report = shrink(model, 0.75, inputs, kinds=("heads",), seconds=0)
    (only,) = best(heads, 1)
    assert kept(report, "transformer.h.0.attn") == (only,)
    expected = torch.cat([weight[:, 32 * part + 8 * only : 32 * part + 8 * only + 8] for part in range(3)], 1)
    assert torch.equal(attention.c_attn.weight, expected)
    assert attention.c_attn.nf == 24
    assert attention.num_heads == 1
    assert attention.split_size == 8


def test_grouped_queries_go_with_their_key() -> None:
    model, inputs = make("llama")
    attention = model.model.layers[0].self_attn
    q, k, v, o = (getattr(attention, f"{n}_proj").weight.clone() for n in "qkvo")
    groups = [
        size(q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8], o[:, 16 * g : 16 * g + 16])
        for g in range(2)
    ]
    report = shrink(model, 0.5, inputs, seconds=0)
    (only,) = kept(report, "model.layers.0.self_attn")
    assert (only,) == best(groups, 1)
    assert torch.equal(attention.q_proj.weight, q[16 * only : 16 * only + 16])
    assert torch.equal(attention.k_proj.weight, k[8 * only : 8 * only + 8])
    assert attention.num_key_value_groups == 2
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)


def test_queries_go_alone_where_one_key_serves_all() -> None:
    torch.manual_seed(0)
    model, inputs = structured_models.llama(keys=1)
    model.eval()
    before = copy.deepcopy(model)
    report = shrink(model, 0.5, inputs, kinds=("heads",), seconds=0)
    torch.testing.assert_close(run(model, inputs), run(zeroed(before, report), inputs), rtol=1e-4, atol=1e-5)
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.weight.shape == (8, 32)
        assert layer.self_attn.q_proj.weight.shape == (16, 32)
        assert layer.self_attn.num_key_value_groups == 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hugging_face_reads_what_its_config_can_say(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    kinds: Any = ("heads", "neurons") if name == "llama" else ("neurons",)
    config = model.config
    report = shrink(model, 0.5, inputs, kinds=kinds, seconds=0)
    assert config.intermediate_size == 48  # the caller's own object
    assert report.config["intermediate_size"] == model.config.intermediate_size == 24
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, inputs), run(model, inputs))


def test_attention_written_out_is_found_too() -> None:
    model, inputs = make("bert")
    model.config._attn_implementation = "eager"
    report = shrink(model, 0.5, inputs, kinds=("heads",), seconds=0)
    assert [row.kind for row in report.structures] == ["heads", "heads"]
    assert model.config._attn_implementation == "eager"


def test_among_equals_the_lower_index_stays() -> None:
    model, inputs = make("mlp")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    report = shrink(model, 0.55, inputs, seconds=0)
    assert kept(report, "0") == tuple(range(9))
    assert kept(report, "2") == tuple(range(7))


def test_one_threshold_over_all_neurons_by_score_per_weight() -> None:
    model, inputs = make("mlp")
    first, second, third = (p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight"))
    scores = [size(first[i], second[:, i]) / (12 + 16) for i in range(20)]
    scores += [size(second[i], third[:, i]) / (20 + 3) for i in range(16)]
    report = shrink(model, PruningConfig(0.4, scope="global"), inputs, seconds=0)
    chosen = best(scores, 36 - round(0.4 * 36))
    assert kept(report, "0") == tuple(i for i in chosen if i < 20)
    assert kept(report, "2") == tuple(i - 20 for i in chosen if i >= 20)


def test_globally_the_best_unit_of_each_structure_stays() -> None:
    model, inputs = make("mlp")
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
        model[2].weight.mul_(1e-3)
    report = shrink(model, PruningConfig(34 / 36, scope="global"), inputs, seconds=0)
    assert [row.after for row in report.structures] == [1, 1]


def test_names_decide_what_is_left_out_and_how_much_goes() -> None:
    model, inputs = make("vit")
    config = PruningConfig(0.5, exclude="*.layers.0.*", overrides={"*.mlp.fc1": 0.25})
    report = shrink(model, config, inputs, seconds=0)
    assert {row.name: row.after for row in report.structures} == {
        "vit.layers.1.attention": 2,
        "vit.layers.1.mlp.fc1": 36,
    }
    assert report.left["vit.layers.0.attention"] == "excluded"
    assert report.left["classifier"] == "the model returns them"


def test_frozen_parameters_training_flags_and_random_state_stay() -> None:
    model, inputs = make("cnn")
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    running = model[1].running_mean.clone()
    report = shrink(model, 0.5, inputs, seconds=0)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert torch.equal(model[1].running_mean, running[list(kept(report, "0"))])


def test_latency_is_measured() -> None:
    model, inputs = make("mlp")
    report = shrink(model, 0.5, inputs, seconds=0.01)
    assert report.seconds_before is not None
    assert report.seconds_after is not None
    assert report.seconds_before > 0
    assert report.seconds_after > 0
    assert "times as fast" in str(report)


def test_a_bias_for_each_head_keeps_the_heads() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.bias = nn.Parameter(torch.randn(1, 2, 5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(2, 5, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
            found: torch.Tensor = self.out(y.transpose(1, 2).reshape(2, 5, -1))
            return found

    with pytest.raises(ValueError, match=r"heads to cut; got none \(: its mask or position bias"):
        shrink(Model().eval(), 0.5, torch.randn(2, 5, 8), kinds=("heads",), seconds=0)


def test_weights_of_half_precision_are_cut_bit_for_bit() -> None:
    model, inputs = make("mlp")
    model.bfloat16()
    weight = model[0].weight.detach().clone()
    report = shrink(model, 0.5, inputs.bfloat16(), seconds=0)
    assert torch.equal(model[0].weight, weight[list(kept(report, "0"))])


def test_a_method_of_the_library_scores() -> None:
    scores = pytest.importorskip("sparsam.scores")
    model, inputs = make("mlp")
    gradients = {n: np.zeros(p.shape) for n, p in model.named_parameters() if n.endswith("weight")}
    gradients["0.weight"][[3, 7, 8]] = 1.0
    config = PruningConfig(17 / 20, method=scores.Saliency(gradients), exclude="2")
    assert kept(shrink(model, config, inputs, seconds=0), "0") == (3, 7, 8)


def test_models_of_transformers_are_the_real_ones() -> None:
    assert {
        type(make(name)[0]).__module__.split(".")[0] for name in ("bert", "gpt2", "llama", "vit", "resnet")
    } == {transformers.__name__}
