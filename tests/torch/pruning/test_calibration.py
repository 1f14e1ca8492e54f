"""Calibration in every form, and what is wrong with it told with the layer's name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pruning_models import ids, model_and_batches, normal
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding

import sparsam.torch
import torch
from sparsam import NM
from sparsam.torch import prune
from sparsam.torch.pruning.calibration import distinct_tokens, read_calibration
from torch import Tensor, nn


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return (normal(i, 6) for i in itertools.count())


FORMS: dict[str, Callable[[], Any]] = {
    "list of tensors": lambda: [normal(i, 16, 6) for i in range(6)],
    "one tensor": lambda: normal(0, 96, 6),
    "tuples with labels": lambda: [(normal(i, 16, 6), torch.zeros(16)) for i in range(6)],
    "keyword inputs": lambda: [{"input": normal(i, 16, 6)} for i in range(6)],
    "arrays": lambda: [normal(i, 16, 6).numpy() for i in range(6)],
    "generator": lambda: (normal(i, 16, 6) for i in range(6)),
    "endless generator": lambda: (normal(i, 16, 6) for i in itertools.count()),
    "DataLoader": lambda: DataLoader(TensorDataset(normal(0, 96, 6), torch.zeros(96)), batch_size=16),
    "DataLoader of a stream": lambda: DataLoader(Endless(), batch_size=16),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    model = mlp()
    report = prune(model, None, FORMS[form](), target_sparsity=0.5, calibration_samples=96)
    assert int((model[0].weight == 0).sum()) == 24
    assert report.calibration.startswith("96 samples in ")


def test_batches_of_a_tokenizer() -> None:
    model, _ = model_and_batches("bert")
    batches = [
        BatchEncoding({"input_ids": ids(i), "attention_mask": torch.ones(8, 12).long()}) for i in range(6)
    ]
    report = prune(model, None, batches, target_sparsity=0.5, exclude="pooler")
    assert "48 samples in 6 batches, 576 tokens, 1" in report.calibration


def test_samples_are_spread_over_what_has_a_length() -> None:
    batches = [torch.full((4, 6), float(i)) for i in range(100)]
    for given, want in ((batches, [0, 20, 40, 60, 80]), (iter(batches), [0, 1, 2, 3, 4])):
        found = read_calibration(mlp(), given, 20)
        assert [float(batch.args[0][0, 0]) for batch in found] == want
    assert len(read_calibration(mlp(), batches, 1000)) == 100


def test_padding_does_not_count() -> None:
    """What stands at masked places changes nothing."""
    results = []
    for fill in (3, 77):
        model, _ = model_and_batches("gpt2")
        batches = []
        for seed in range(6):
            words, mask = ids(seed), torch.ones(8, 12).long()
            words[::2, 8:], mask[::2, 8:] = fill, 0
            batches.append({"input_ids": words, "attention_mask": mask})
        prune(model, None, batches, target_sparsity=0.5)
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)


def test_row_mask() -> None:
    model, _ = model_and_batches("t5")
    mask = torch.ones(2, 5).long()
    mask[0, 3:] = 0
    batch = {"input_ids": ids(0, 2, 5), "attention_mask": mask, "decoder_input_ids": ids(1, 2, 4)}
    (read,) = read_calibration(model, [batch], 2)
    flat = mask.reshape(-1) != 0
    assert torch.equal(read.row_mask(torch.Size((2, 5))), flat)  # type: ignore[arg-type]
    assert torch.equal(read.row_mask(torch.Size((10,))), flat)  # type: ignore[arg-type]
    assert read.row_mask(torch.Size((2, 4))) is None
    (read,) = read_calibration(model, [{**batch, "decoder_input_ids": ids(1, 2, 5)}], 2)
    assert read.row_mask(torch.Size((2, 5))) is None  # encoder or decoder: it cannot be told


def test_distinct_tokens() -> None:
    model, _ = model_and_batches("bert")
    words = torch.tensor([[1, 2, 2, 0], [3, 1, 0, 0]])
    batches = read_calibration(model, [{"input_ids": words, "attention_mask": (words != 0).long()}], 2)
    assert distinct_tokens(batches) == (3, 5)
    assert distinct_tokens(read_calibration(mlp(), [normal(0, 4, 6)], 4)) is None


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


class Breaks(nn.Module):
    """Not finite behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x) / 0)
        return result


class NoCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        msg = "not this one"
        raise RuntimeError(msg)


GOOD = [normal(i, 16, 6) for i in range(5)]
WRONG: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "none": (
        mlp,
        None,
        {"method": "obs"},
        r"calibration: expected batches of inputs for method 'obs'; got none",
    ),
    "empty": (mlp, [], {}, "calibration: expected at least one batch of tensors.*; got none"),
    "exhausted": (
        mlp,
        iter([]),
        {},
        "calibration: expected at least one batch .*an iterator is read only once",
    ),
    "no samples": (mlp, [torch.empty(0, 6)], {}, "calibration: expected samples; got batches without any"),
    "text": (
        mlp,
        ["a text"],
        {},
        r"calibration: batch 0: expected tensors.*; got str without a tensor; tokenize",
    ),
    "a text": (
        mlp,
        "a text",
        {},
        "calibration: expected an iterable of tensors.*; got str; tokenize texts first",
    ),
    "a number": (mlp, 3, {}, "calibration: expected an iterable of tensors.*; got int"),
    "wrong keyword": (
        mlp,
        [{"pixels": GOOD[0]}],
        {},
        r"calibration: batch 0: expected inputs of the model's forward\(input\); got pixels",
    ),
    "wrong shape": (
        mlp,
        [GOOD[0], normal(0, 4, 5)],
        {},
        "calibration: batch 1: expected inputs that the model runs with; got RuntimeError: mat1 and mat2",
    ),
    "NaN in inputs": (
        mlp,
        [GOOD[0] / 0],
        {},
        "calibration: batch 0: expected finite numbers; got NaN or infinity",
    ),
    "NaN in activations": (
        Breaks,
        GOOD,
        {},
        "weight 'second.weight': expected finite activations in batch 0 of the calibration; got inputs: ",
    ),
    "never reached": (
        Unused,
        GOOD,
        {},
        "calibration: expected inputs that reach every weight that is pruned; got none for 'unused.weight'",
    ),
    "never reached, all at once": (
        Unused,
        GOOD,
        {"method": "wanda", "scope": "global"},
        "calibration: expected inputs that reach every weight that is pruned; got none for 'unused.weight'",
    ),
    "padding only": (
        lambda: model_and_batches("gpt2")[0],
        [{"input_ids": ids(0), "attention_mask": torch.zeros(8, 12).long()}],
        {},
        "calibration: expected inputs that reach weight 'transformer.h.0.attn.c_attn.weight'; got none, or",
    ),
    "samples": (
        mlp,
        GOOD,
        {"calibration_samples": 0},
        "calibration_samples: expected an integer of at least 1",
    ),
    "targets": (mlp, GOOD, {"targets": "mine"}, "targets: expected 'dense' or 'own'; got 'mine'"),
    "pattern of obs": (
        mlp,
        GOOD,
        {"method": "obs", "pattern": sparsam.Block(2, 2)},
        r"pattern: expected Unstructured\(\) or NM\(n, m\) for '0.weight' with method 'obs'; got 'block",
    ),
    "global obs": (
        mlp,
        GOOD,
        {"method": "obs", "scope": "global"},
        "scope: expected 'layer' or 'row' with method",
    ),
    "shape": (mlp, GOOD, {"pattern": NM(2, 4)}, "tensor '0.weight'"),
    "shape, magnitude": (mlp, GOOD, {"pattern": NM(2, 4), "method": "magnitude"}, "tensor '0.weight'"),
    "shape, no calibration": (mlp, None, {"pattern": NM(2, 4)}, "tensor '0.weight'"),
    "no loss": (
        mlp,
        GOOD,
        {"method": "fisher"},
        r"loss_fn: expected loss_fn\(model, batch\) for method 'fisher'",
    ),
    "a loss": (mlp, GOOD, {"loss_fn": print}, "loss_fn: expected none with method 'admm'"),
    "no loss value": (
        mlp,
        GOOD,
        {"method": "fisher", "loss_fn": lambda model, x: model(x)},
        r"loss_fn: batch 0: expected one number with a gradient; got \(16, 4\) numbers",
    ),
    "override": (mlp, GOOD, {"overrides": {"9.weight": 0.5}}, "overrides: expected names or patterns"),
    "everything excluded": (
        mlp,
        GOOD,
        {"exclude": "*"},
        "model: expected weights to prune; got none in Sequential",
    ),
    "another device": (
        lambda: mlp().to("meta"),
        GOOD,
        {},
        "weight '0.weight': expected a dense floating-point Parameter; got one on the meta device",
    ),
    "buffer on another device": (
        lambda: nn.Sequential(mlp(), nn.BatchNorm1d(4, affine=False).to("meta")),
        GOOD,
        {},
        "tensor '1.running_mean': expected a model on the CPU; got one on meta",
    ),
    "no copy": (
        lambda: nn.Sequential(NoCopy(6, 4)),
        GOOD,
        {},
        "model: expected one that copy.deepcopy can copy; got RuntimeError: not this one",
    ),
    "packed": (
        lambda: nn.Sequential(sparsam.torch.pack(nn.Linear(6, 4))),
        GOOD,
        {},
        "weight '0.weight': expected a dense floating-point Parameter; got a packed one",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_the_model_stays(case: str) -> None:
    make, calibration, options, message = WRONG[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(
            model,
            None,
            calibration,
            **{"target_sparsity": 0.5, **options} if "pattern" not in options else options,
        )
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "cpu" and isinstance(before[name], Tensor):
            assert np.array_equal(tensor.detach().numpy(), before[name].detach().numpy()), name
