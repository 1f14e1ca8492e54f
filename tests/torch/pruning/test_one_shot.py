"""`prune` on models of real classes: exact counts, closer than other methods, an ordinary model."""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
from pruning_models import MODELS, distance, model_and_batches, normal, output

import sparsam
import torch
from sparsam import NM, PruningConfig, Slices
from sparsam.scores import Fisher, Movement, Saliency
from sparsam.torch import PruningReport, prune
from sparsam.torch.pruning.prunable import prunable_weights
from torch import Tensor, nn

TARGETS = {
    "gpt2": 0.2,
    "cell": 1.0,  # own targets only, whatever is asked for
    "albert": 1.0,
    "resnet": 1.0,
}


def quiet_prune(model: nn.Module, batches: Any, **options: Any) -> PruningReport:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibration: expected")
        return prune(model, None, batches, **options)


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((tensor == 0).sum()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_real_classes(name: str) -> None:
    dense, batches = model_and_batches(name)
    weights, _ = prunable_weights(dense)
    errors = {}
    for method, targets in (("magnitude", "own"), ("obs", "own"), ("admm", "dense")):
        model = copy.deepcopy(dense).train()
        report = quiet_prune(model, batches, target_sparsity=0.6, method=method, targets=targets)
        found = zeros(model)
        for weight in weights:
            size = weight.parameter.numel()
            assert found[weight.name] == round(0.6 * size), weight.name
        rows = {row.name: row for row in report.layers}
        assert all(rows[weight.name].pruned_params == found[weight.name] for weight in weights)
        assert all(rows[weight.name].error is not None for weight in weights)
        assert model.training
        errors[method] = distance(model.eval(), dense, batches)
    assert errors["admm"] < TARGETS.get(name, 0.8) * errors["obs"] < errors["magnitude"]


@pytest.mark.parametrize("name", ["bert", "convnet", "encoder", "lstm"])
def test_a_pruned_model_is_an_ordinary_model(name: str) -> None:
    model, batches = model_and_batches(name)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    threads = torch.get_num_threads()
    quiet_prune(model, batches, target_sparsity=0.5)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_num_threads() == threads
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in hooks)
    want = output(model.eval(), batches[0])
    assert torch.equal(output(copy.deepcopy(model), batches[0]), want)
    if name == "convnet":
        compiled: Any = torch.compile(model, backend="eager")
        assert torch.equal(output(compiled, batches[0]), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(output(torch.load(file, weights_only=False), batches[0]), want)
    other, _ = model_and_batches(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, batches[0]), want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # within PyTorch
def test_a_pruned_model_is_compiled_by_the_real_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prune(model, None, [normal(i, 64, 8) for i in range(5)], target_sparsity=0.5)
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(normal(9, 64, 8)), model(normal(9, 64, 8)))


def test_without_calibration_as_arrays() -> None:
    model, _ = model_and_batches("gpt2")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [weight.name for weight in prunable_weights(model)[0]]
    report = prune(model, target_sparsity=0.7, scope="global")
    want = sparsam.prune({name: state[name] for name in names}, target_sparsity=0.7, scope="global").weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want.get(name, state[name])), name
    notes = {row.name: row.note for row in report.layers}
    assert notes["transformer.wpe.weight"] == "embedding"
    assert "rule: embeddings, norms" in str(report)


@pytest.mark.parametrize("name", ["gpt2", "conv1d"])
@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "ria", "obs", "admm"])
@pytest.mark.parametrize("how", ["2:4", "rows", "override"])
def test_patterns_scopes_and_overrides(name: str, method: Any, how: str) -> None:
    if (how == "rows") and method == "admm":
        return
    model, batches = model_and_batches(name, 5)
    first = prunable_weights(model)[0][0].name
    config = {
        "2:4": PruningConfig(pattern=NM(2, 4), method=method, exclude=first if name == "conv1d" else ()),
        "rows": PruningConfig(target_sparsity=0.5, scope="row", method=method),
        "override": PruningConfig(target_sparsity=0.5, overrides={first: 0.25}, method=method),
    }[how]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibration: expected")
        prune(model, config, batches)
    for weight in prunable_weights(model, exclude=config.exclude)[0]:
        tensor = weight.parameter.detach()
        kept = (tensor.T if weight.transposed else tensor).reshape(
            tensor.shape[1] if weight.transposed else len(tensor), -1
        ) != 0
        if how == "2:4":
            assert (kept.reshape(len(kept), -1, 4).sum(-1) == 2).all(), weight.name
        elif how == "rows":
            assert (kept.sum(1) == kept.shape[1] - round(0.5 * kept.shape[1])).all(), weight.name
        else:
            share = 0.25 if weight.name == first else 0.5
            assert int((~kept).sum()) == round(share * kept.numel()), weight.name


def test_allocations_and_global_scores() -> None:
    for options in (
        {"method": "wanda", "scope": "global"},
        {"method": "magnitude", "allocation": "erk"},
        {"method": "obs", "allocation": "lamp"},
    ):
        model, batches = model_and_batches("bert", 4)
        quiet_prune(model, batches, target_sparsity=0.5, **options)
        weights = [weight.parameter.detach() for weight in prunable_weights(model)[0]]
        shares = {float((tensor == 0).float().mean()) for tensor in weights}
        gone = sum(int((tensor == 0).sum()) for tensor in weights)
        assert len(shares) > 2
        assert gone == round(0.5 * sum(tensor.numel() for tensor in weights))


def test_slices_by_admm() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prune(model, None, [normal(i, 64, 8) for i in range(5)], target_sparsity=0.5, pattern=Slices(0))
    gone = (model[0].weight == 0).all(1)
    assert int(gone.sum()) == 8


@pytest.mark.parametrize("method", ["saliency", "fisher", "movement"])
def test_gradient_methods(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(normal(i, 16, 6), torch.randint(0, 3, (16,))) for i in range(3)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    total = {name: np.zeros(tuple(p.shape)) for name, p in model.named_parameters() if p.ndim == 2}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        for name in total:
            gradient = model.get_parameter(name).grad.double().numpy()  # type: ignore[union-attr]
            weight = model.get_parameter(name).detach().double().numpy()
            total[name] += {"saliency": gradient, "fisher": gradient**2, "movement": -gradient * weight}[
                method
            ]
    model.zero_grad()
    scorers: dict[str, Any] = {"saliency": Saliency, "fisher": Fisher, "movement": Movement}
    arrays = {name: model.get_parameter(name).detach().numpy().copy() for name in total}
    want = sparsam.prune(arrays, method=scorers[method](total), target_sparsity=0.5, scope="global").weights
    options: Any = {"method": method, "target_sparsity": 0.5, "scope": "global"}
    prune(model, None, batches, loss_fn=loss_fn, **options)
    for name, array in want.items():
        assert np.array_equal(model.get_parameter(name).detach().numpy(), array)
    assert all(parameter.grad is None for parameter in model.parameters())


class Stateful(nn.Module):
    """Counts its runs in a buffer, has a layer that no batch reaches, and needs autograd in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.end = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 1)
        self.runs: Tensor
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.end(self.layer(x).tanh()).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("options", [{}, {"method": "wanda"}, {"method": "ria", "scope": "global"}])
def test_runs_leave_the_state_of_the_model_alone(options: Any) -> None:
    torch.manual_seed(0)
    model = Stateful()
    quiet_prune(model, [normal(i, 16, 6) for i in range(4)], exclude=["unused"], **options)
    assert int(model.runs) == 0
    assert int((model.layer.weight == 0).sum() + (model.end.weight == 0).sum()) == 28


@pytest.mark.parametrize("method", ["saliency", "fisher", "movement"])
def test_a_loss_has_to_depend_on_each_weight(method: Any) -> None:
    model = Stateful()
    before = copy.deepcopy(model.state_dict())
    options: Any = {"loss_fn": lambda model, batch: model(batch).square().mean(), "method": method}
    with pytest.raises(
        ValueError, match=r"loss_fn: expected .*; got no gradient of 'unused.weight' from any"
    ):
        prune(model, None, [normal(0, 16, 6)], **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_result_again_and_with_other_thread_counts() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (before, before, 1):
            torch.set_num_threads(threads)
            model, batches = model_and_batches("bert", 6)
            quiet_prune(model, batches, target_sparsity=0.5)
            results.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        assert torch.equal(tensor, results[2][name]), name


def test_batch_normalisation_measured_again() -> None:
    model, batches = model_and_batches("convnet")
    kept = copy.deepcopy(model)
    quiet_prune(kept, batches, target_sparsity=0.8, method="magnitude")
    quiet_prune(model, batches, target_sparsity=0.8, method="magnitude", estimate_batch_norm=True)
    seen: list[Tensor] = []
    hook = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        output(model, batch)
    hook.remove()
    inputs = torch.cat(seen).transpose(0, 1).flatten(1)
    norm: Any = model[1]
    torch.testing.assert_close(norm.running_mean, inputs.mean(1), rtol=1e-3, atol=1e-4)
    assert norm.momentum == 0.1
    assert torch.equal(norm.num_batches_tracked, kept[1].num_batches_tracked)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept.get_parameter(name)), name


def test_batch_normalisation_is_not_measured_without_calibration() -> None:
    model, _ = model_and_batches("convnet")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="estimate_batch_norm: expected calibration to measure on; got none"):
        prune(model, target_sparsity=0.5, estimate_batch_norm=True)
    flat = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    single = [normal(i, 1, 4) for i in range(20)]
    with pytest.raises(ValueError, match=r"estimate_batch_norm: expected several values .* in batch 0; got"):
        prune(flat, None, single, target_sparsity=0.5, estimate_batch_norm=True)
    assert int((flat.get_parameter("0.weight") != 0).sum()) == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_that_count_runs_do_not_see_the_calibration() -> None:
    class Counting(nn.Module):
        runs: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("runs", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.linear(x)  # type: ignore[no-any-return]

    model = Counting().eval()
    report = prune(model, None, [normal(i, 64, 8) for i in range(5)], target_sparsity=0.5)
    assert int(model.runs) == 0
    assert int((model.linear.weight == 0).sum()) == 32
    plain = report.to_dict()
    assert plain["calibration"] == "320 samples in 5 batches"
    assert plain["warnings"] == []
    assert plain["seconds"] > 0


def test_bfloat16() -> None:
    model, batches = model_and_batches("llama", 5)
    model.to(torch.bfloat16)
    quiet_prune(model, batches, target_sparsity=0.5)
    for weight in prunable_weights(model)[0]:
        assert weight.parameter.dtype == torch.bfloat16
        assert int((weight.parameter == 0).sum()) >= round(0.5 * weight.parameter.numel())


def test_tied_layers_once() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    report = prune(model, None, [normal(i, 40, 8) for i in range(6)], target_sparsity=0.5)
    assert model[2].weight is model[0].weight
    assert [row.name for row in report.layers] == ["0.weight", "4.weight"]
    assert int((model[0].weight == 0).sum()) == 32
