from __future__ import annotations

import copy
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from torch_cases import ACTIVATIONS, conv_net, mlp, packed, pruned
from transformers import GPT2Config, GPT2LMHeadModel

import torch
from sparsam.torch import load, pack, restore, save
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

NAME = "sparsam.safetensors"


def raw(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, taken apart without the library."""
    content = (folder / NAME).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def check_round_trip(model: nn.Module, example: Any, fresh: nn.Module, folder: Path) -> None:
    """What was saved, loaded into a model with other weights, computes the same and restores to the same."""
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    report = accelerate(model, example)
    save(model, folder)
    layers = [name for name, m in fresh.named_modules() if m is not fresh]
    assert load(folder, fresh) == report.swapped
    assert repr(fresh) == repr(model)
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        ours, theirs = fresh.eval()(*inputs), model.eval()(*inputs)
    ours, theirs = (getattr(value, "logits", value) for value in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert restore(fresh) == report.swapped
    assert [name for name, m in fresh.named_modules() if m is not fresh] == layers
    assert fresh.state_dict().keys() == dense.keys()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, dense[name]), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str, tmp_path: Path) -> None:
    act = ACTIVATIONS[activation]
    check_round_trip(mlp(act), torch.randn(3, 24), mlp(act), tmp_path)


def test_conv_net_with_groups(tmp_path: Path) -> None:
    check_round_trip(conv_net(), torch.randn(2, 3, 8, 8), conv_net(), tmp_path)


def test_hugging_face_with_tied_embeddings(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    model, fresh = pruned(GPT2LMHeadModel(config)), GPT2LMHeadModel(config)
    check_round_trip(model, torch.randint(0, 50, (2, 5)), fresh, tmp_path)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


class Shares(nn.Module):
    """Two layers with one Parameter, one module at two places, an activation at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.c = nn.Linear(8, 8)
        self.d = self.c
        self.act = nn.SiLU()
        self.again = self.act

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(self.again(self.b(self.act(self.a(x))))))


def test_shared_weights_and_modules_are_stored_once(tmp_path: Path) -> None:
    check_round_trip(pruned(Shares()), torch.randn(3, 8), Shares(), tmp_path)
    header, _ = raw(tmp_path)
    assert header.keys() == {
        "a.weight",
        "a.weight_bits",
        "c.weight",
        "c.weight_bits",
        "a.bias",
        "b.bias",
        "c.bias",
        "__metadata__",
    }
    fresh = Shares()
    load(tmp_path, fresh)
    assert fresh.c is fresh.d
    assert packed(fresh, "a").packed is packed(fresh, "b").packed
    untied = Shares()
    untied.b, untied.d, untied.again = nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()
    load(tmp_path, untied)
    x = torch.randn(3, 8)
    assert torch.equal(untied(x), fresh(x))


def test_narrow_values(tmp_path: Path) -> None:
    model, fresh = mlp(), mlp()
    x = torch.randn(3, 24)
    accelerate(model, x, dtype=torch.bfloat16)
    save(model, tmp_path)
    header, _ = raw(tmp_path)
    assert header["0.weight"]["dtype"] == "BF16"
    load(tmp_path, fresh)
    assert torch.equal(model(x), fresh(x))
    narrow, other = mlp().bfloat16(), mlp().bfloat16()
    accelerate(narrow, x.bfloat16())
    save(narrow, tmp_path)
    load(tmp_path, other)
    assert torch.equal(narrow(x.bfloat16()), other(x.bfloat16()))
    with pytest.raises(
        ValueError, match=r"expected \(32, 24\) bfloat16 in the model; got \(32, 24\) float32"
    ):
        load(tmp_path, mlp())


def test_a_model_without_packed_layers(tmp_path: Path) -> None:
    model, fresh = mlp(), mlp()
    save(model, tmp_path)
    assert load(tmp_path, fresh) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_layers_placed_by_hand(tmp_path: Path) -> None:
    linear = pruned(nn.Linear(8, 8))
    model = nn.Sequential(pack(linear, activation="gelu"))
    fresh = nn.Sequential(nn.Linear(8, 8))
    save(model, tmp_path)
    assert load(tmp_path, fresh) == 1
    assert packed(fresh, "0").activation == "gelu"


# --- bytes


def test_golden_file(tmp_path: Path) -> None:
    """As docs/formats.md shows it."""
    linear = nn.Linear(9, 2)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0, 0], linear.weight[0, 8], linear.weight[1, 3] = 1.0, -2.0, 0.5
        linear.bias[:] = torch.tensor([1.0, 2.0])
    model = nn.Sequential(linear, nn.ReLU())
    accelerate(model, torch.ones(1, 9))
    save(model, tmp_path)
    header, data = raw(tmp_path)
    metadata = header.pop("__metadata__")
    assert metadata.pop("sparsam") == "accelerated 3"
    assert metadata.pop("format") == "pt"
    assert {key: json.loads(value) for key, value in metadata.items()} == {
        "weights": {"0.weight": {"shape": [2, 9], "dtype": "float32", "transposed": False}},
        "layers": {"0": {"groups": 1, "activation": "relu", "forms": ["panels"], "computed": None}},
        "fused": {"1": ["0"]},
        "tied": {},
        "buffers": [],
    }
    assert header == {
        "0.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "0.weight": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]},
        "0.weight_bits": {"dtype": "U8", "shape": [2, 2], "data_offsets": [20, 24]},
    }
    assert data.hex(" ") == ("00 00 80 3f 00 00 00 40 00 00 80 3f 00 00 00 c0 00 00 00 3f 01 01 08 00")


def test_the_size_is_that_of_the_tensors_and_the_header(tmp_path: Path) -> None:
    model = conv_net()
    accelerate(model, torch.randn(2, 3, 8, 8))
    save(model, tmp_path)
    content = (tmp_path / NAME).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = 0
    for name, value in model.state_dict().items():
        if name.endswith("weight") and value.ndim > 1:
            rows = value.reshape(len(value), -1)
            expected += len(rows) * ((rows.shape[1] + 7) // 8) + 4 * int(torch.count_nonzero(rows))
        else:
            expected += value.nbytes
    assert len(content) == header + expected


def test_bits_and_values_of_groups_and_transposed_weights(tmp_path: Path) -> None:
    conv = pruned(nn.Conv2d(4, 6, 3, groups=2))
    model = nn.Sequential(conv)
    weight = conv.get_parameter("weight").detach().clone()
    accelerate(model, torch.randn(1, 4, 5, 5))
    save(model, tmp_path)
    found = safetensors.torch.load_file(tmp_path / NAME)
    keep = np.unpackbits(found["0.weight_bits"].numpy(), axis=1, count=18, bitorder="little").astype(bool)
    rows = weight.reshape(6, 18).numpy()
    np.testing.assert_array_equal(keep, rows != 0)
    np.testing.assert_array_equal(found["0.weight"].numpy(), rows[keep])


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(TypeError, match="_extra_state: expected a dense tensor"):
        save(Extra(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(ValueError, match="Sequential"):
        save(pack(nn.Linear(2, 2)), tmp_path)
    model = nn.ModuleDict({"a": mlp()})
    accelerate(model["a"], torch.randn(3, 24))
    with pytest.raises(ValueError, match="save the whole model"):
        save(nn.Sequential(model["a"][1]), tmp_path)  # type: ignore[index]
    with pytest.raises(FileNotFoundError):
        save(mlp(), tmp_path / "missing" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_file_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(mlp(), tmp_path)
    before = (tmp_path / NAME).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(mlp(), tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_copy_can_be_saved(tmp_path: Path) -> None:
    model = mlp()
    accelerate(model, torch.randn(3, 24))
    save(model, tmp_path / "a")
    save(copy.deepcopy(model), tmp_path / "b")
    (header, data), (other, again) = raw(tmp_path / "a"), raw(tmp_path / "b")
    assert header == other
    assert data == again
    assert sum(isinstance(m, Fused) for m in model.modules()) == 2
    assert len(list(itertools.chain(tmp_path.rglob("*")))) == 4
