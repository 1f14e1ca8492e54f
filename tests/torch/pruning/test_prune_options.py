"""What each option of `prune` is for: elsewhere it is refused. Names, padding, and zeros that stay."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pruning_models import WORDS, ids, model_and_batches, normal, output

import torch
from sparsam import NM, Block, Slices, Tied
from sparsam.torch import Pruner, find_ticket, prune
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def inputs(count: int = 5) -> list[Tensor]:
    return [normal(i, 64, 8) for i in range(count)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = model(batch).square().mean()
    return result


AT_ONCE: dict[str, dict[str, Any]] = {
    "no calibration": {},
    "global": {"calibration": True, "method": "wanda", "scope": "global"},
    "gradients": {"calibration": True, "method": "fisher", "loss_fn": loss},
    "ties": {
        "calibration": True,
        "method": "magnitude",
        "ties": Tied({"0.weight": Slices(0), "2.weight": Slices(1)}),
    },
}


@pytest.mark.parametrize("option", ["state_dir", "spill_dir", "executor"])
@pytest.mark.parametrize("how", AT_ONCE)
def test_what_goes_layer_by_layer_is_refused_at_once(how: str, option: str, tmp_path: Path) -> None:
    options = dict(AT_ONCE[how])
    calibration = inputs() if options.pop("calibration", False) else None
    value: Any = ThreadPoolExecutor(1) if option == "executor" else tmp_path / "folder"
    model = network()
    before = copy.deepcopy(model.state_dict())
    wanted = f"{option}: expected pruning layer by layer; got .*, which is at once; leave it out"
    with pytest.raises(ValueError, match=wanted):
        prune(model, None, calibration, target_sparsity=0.5, **{option: value}, **options)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", AT_ONCE)
def test_the_bar_counts_batches_where_all_is_pruned_at_once(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(AT_ONCE[how])
    calibration = inputs() if options.pop("calibration", False) else None
    prune(network(), None, calibration, target_sparsity=0.5, progress=True, **options)
    lines = capsys.readouterr().err.splitlines()
    steps = 6 if how in ("global", "gradients") else 1
    assert f"{steps}/{steps} selection" in lines[-1]
    assert len(lines) == steps


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"executor": 3}, TypeError, "executor: expected a concurrent.futures.Executor; got 3; pass"),
        ({"executor": ThreadPoolExecutor(1), "method": "wanda"}, ValueError,
         "executor: expected method 'obs' or 'admm', whose fits .*; got 'wanda'"),
        ({"state_dir": 3}, TypeError, "state_dir: expected the path of a folder; got 3; name a folder"),
        ({"state_dir": "{file}"}, ValueError, "state_dir: expected a folder, or where .*; got '.*'; name"),
        ({"spill_dir": "{file}/more"}, ValueError, "spill_dir: expected a folder, or where .* made; got"),
        ({"loss_fn": 3, "method": "fisher"}, TypeError, "loss_fn: expected a function of .*; got 3; pass"),
        ({"calibration_samples": "many"}, ValueError, "calibration_samples: expected an integer; got 'many'"),
        ({"targets": 1}, ValueError, "targets: expected 'dense' or 'own'; got 1"),
    ],
)  # fmt: skip
def test_options_of_another_kind(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    options: Any = {
        name: value.format(file=file) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(kind, match=message):
        prune(network(), None, inputs(), target_sparsity=0.5, **options)


class Reader(nn.Module):
    """Words in, with a mask for those that are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        del attention_mask  # the padding is looked at nowhere
        x = self.table(words)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        result: Tensor = self.head(x)
        return result


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


NAMED = {"table.weight": 0.25, "layers.0.bias": 0.5, "*": 0.75}


def test_prune_and_pruner_and_tickets_have_one_rule_for_names() -> None:
    """An exact name reaches what would stay dense; a pattern chooses among what is pruned anyway."""
    whole, stepped, tried = (made(Reader()) for _ in range(3))
    prune(whole, target_sparsity=0.5, overrides=dict(reversed(NAMED.items())))
    pruner = Pruner(
        stepped, target_sparsity=0.5, schedule="one_shot", overrides=dict(reversed(NAMED.items()))
    )
    pruner.step()
    assert set(pruner.masks) == {"table.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"}
    shares = {"table.weight": 0.25, "layers.0.bias": 0.5, "layers.0.weight": 0.75, "layers.1.weight": 0.75}
    for name, parameter in whole.named_parameters():
        assert int((parameter == 0).sum()) == round(shares.get(name, 0) * parameter.numel()), name
        assert torch.equal(parameter, stepped.get_parameter(name)), name
    overrides = {"table.weight": 0.25}
    found = find_ticket(
        tried, lambda *_: None, lambda _: 0.0, rounds=1, controls=(), config=_config(overrides=overrides)
    )
    assert set(found.masks) == {"table.weight", "layers.0.weight", "layers.1.weight"}
    found = find_ticket(
        tried, lambda *_: None, lambda _: 0.0, rounds=1, controls=(), config=_config(overrides={"*": 0.25})
    )
    assert set(found.masks) == {"layers.0.weight", "layers.1.weight"}


def _config(**fields: Any) -> Any:
    from sparsam import PruningConfig  # noqa: PLC0415

    return PruningConfig(**fields)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs", "admm"])
def test_a_named_embedding_has_no_inputs_to_calibrate_with(method: Any) -> None:
    batches = [(ids(i),) for i in range(4)]
    message = "overrides: expected weights whose inputs are seen, .*; got 'table.weight'; prune it in a call"
    with pytest.raises(ValueError, match=message):
        prune(made(Reader()), None, batches, method=method, overrides={"table.weight": 0.5})


def test_a_named_head_is_fitted_like_any_linear_layer() -> None:
    model = made(Reader())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibration: expected")
        report = prune(model, None, [(ids(i),) for i in range(6)], overrides={"head.weight": 0.25})
    found = {row.name: row for row in report.layers}
    assert found["head.weight"].pruned_params == round(0.25 * 16 * WORDS)
    assert found["head.weight"].error is not None
    assert found["table.weight"].note == "embedding"


def test_a_mask_by_position_says_what_padding_is() -> None:
    masks = [(torch.arange(12) < 4 + i % 8)[None].expand(8, -1).long() for i in range(8)]
    named = [{"words": ids(i), "attention_mask": mask} for i, mask in enumerate(masks)]
    placed = [(ids(i), mask) for i, mask in enumerate(masks)]
    other = [(ids(i).where(mask != 0, 7), mask) for i, mask in enumerate(masks)]
    models = []
    for batches in (named, placed, other, [batch[:1] for batch in placed]):
        model = made(Reader())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "calibration: expected")
            prune(model, None, batches, target_sparsity=0.5)
        models.append(model.get_parameter("layers.1.weight"))
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
    assert not torch.equal(models[0], models[3])


ZEROS: dict[str, dict[str, Any]] = {
    "admm": {"method": "admm"},
    "admm own": {"method": "admm", "targets": "own"},
    "obs": {"method": "obs"},
    "obs own": {"method": "obs", "targets": "own"},
    "obs rows": {"method": "obs", "scope": "row"},
    "wanda": {"method": "wanda"},
    "obs 2:4": {"method": "obs", "pattern": NM(2, 4)},
    "admm 2:4": {"method": "admm", "pattern": NM(2, 4)},
    "admm blocks": {"method": "admm", "pattern": Block(2, 2), "target_sparsity": 0.75},
}


def check_zeros(model: nn.Module, batches: list[Any], **options: Any) -> None:
    """Zeroes three weights in ten at random, prunes, and looks for any that came back."""
    torch.manual_seed(3)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                kept[name] = torch.rand(parameter.shape) < 0.7
                parameter.mul_(kept[name])
    wanted = output(model, batches[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibration: expected")
        report = prune(model, None, batches, **options)
    assert not torch.equal(output(model, batches[0]), wanted)
    assert report.pruned
    for row in report.pruned:
        weight = model.get_parameter(row.name).detach()
        assert not weight[~kept[row.name]].any(), row.name
        if "pattern" not in options and "scope" not in options:
            assert row.pruned_params == round(0.6 * weight.numel()), row.name


@pytest.mark.parametrize("how", ZEROS)
def test_zeros_of_a_model_pruned_before_stay_zero(how: str) -> None:
    target = {} if "pattern" in ZEROS[how] else {"target_sparsity": 0.6}
    check_zeros(network(), inputs(6), **(target | ZEROS[how]))


@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_zeros_of_models_of_real_classes_stay_zero(name: str) -> None:
    model, batches = model_and_batches(name, 5)
    check_zeros(model, batches, target_sparsity=0.6, method="obs")


def test_of_fewer_zeros_than_there_are_none_comes_back() -> None:
    model, batches = network(), inputs()
    prune(model, target_sparsity=0.8)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    prune(model, None, batches, target_sparsity=0.5)
    for name, zero in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, zero), name
