from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparsam.torch import SparseLinear, accelerate, load, restore, save
from sparsam.torch.fusion import Fused
from torch_cases import ACTIVATIONS, conv_net, mlp, packed, pruned, state

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

NAME = "model.safetensors"

Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def raw(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, taken apart without the library."""
    content = (folder / NAME).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewrite(folder: Path, change: Change) -> None:
    """Writes a file anew with something changed."""
    header, _ = raw(folder)
    tensors = safetensors.torch.load_file(folder / NAME)
    metadata = header["__metadata__"]
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / NAME, metadata)


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
    names = {name for name in header if name.endswith((".bits", ".values"))}
    assert names == {"a.weight.bits", "a.weight.values", "c.weight.bits", "c.weight.values"}
    assert {"c.bias", "d.bias"} - header.keys() == {"d.bias"}
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
    assert header["0.weight.values"]["dtype"] == "BF16"
    load(tmp_path, fresh)
    assert torch.equal(model(x), fresh(x))
    narrow, other = mlp().bfloat16(), mlp().bfloat16()
    accelerate(narrow, x.bfloat16())
    save(narrow, tmp_path)
    load(tmp_path, other)
    assert torch.equal(narrow(x.bfloat16()), other(x.bfloat16()))
    with pytest.raises(ValueError, match="layer '0' is 32x24 bfloat16, and in the model 32x24 float32"):
        load(tmp_path, mlp())


def test_a_model_without_packed_layers(tmp_path: Path) -> None:
    model, fresh = mlp(), mlp()
    save(model, tmp_path)
    assert load(tmp_path, fresh) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_layers_placed_by_hand(tmp_path: Path) -> None:
    linear = pruned(nn.Linear(8, 8))
    model = nn.Sequential(SparseLinear(linear, activation="gelu"))
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
    layers = {
        "0": {
            "shape": [2, 9],
            "dtype": "float32",
            "groups": 1,
            "transposed": False,
            "activation": "relu",
            "weight": "0",
        }
    }
    metadata = header.pop("__metadata__")
    assert {key: json.loads(metadata[key]) for key in ("layers", "fused", "tied")} == {
        "layers": layers,
        "fused": {"1": ["0"]},
        "tied": {},
    }
    assert metadata["sparsam"] == "accelerated 1"
    assert metadata["format"] == "pt"
    assert header == {
        "0.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "0.weight.values": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]},
        "0.weight.bits": {"dtype": "U8", "shape": [2, 2], "data_offsets": [20, 24]},
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
    keep = np.unpackbits(found["0.weight.bits"].numpy(), axis=1, count=18, bitorder="little").astype(bool)
    rows = weight.reshape(6, 18).numpy()
    np.testing.assert_array_equal(keep, rows != 0)
    np.testing.assert_array_equal(found["0.weight.values"].numpy(), rows[keep])


# --- refusals


def layer(**fields: Any) -> Change:
    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layers = json.loads(metadata["layers"])
        layers["0"] |= fields
        metadata["layers"] = json.dumps(layers)

    return change


def text(key: str, value: str) -> Change:
    return lambda _, metadata: metadata.update({key: value})


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: value(tensors[name])})


REFUSED: dict[str, tuple[Change, str]] = {
    "no mark": (lambda _, metadata: metadata.clear(), "sparsam='accelerated 1', got None"),
    "a newer version": (text("sparsam", "accelerated 2"), "got 'accelerated 2'"),
    "another format": (text("sparsam", "SparseMatrix 1"), "got 'SparseMatrix 1'"),
    "no JSON": (text("layers", "{"), "expected JSON in the metadata 'layers'"),
    "deep JSON": (text("layers", "[" * 100_000), "expected JSON|expected an object"),
    "a list": (text("layers", "[]"), "expected an object in the metadata 'layers', got a list"),
    "a layer that is none": (text("layers", '{"0": 3}'), "layer '0': expected its shape"),
    "no tied": (lambda _, metadata: metadata.pop("tied"), "expected JSON in the metadata 'tied'"),
    "another shape": (layer(shape=[24, 32]), "layer '0' is 24x32 float32, and in the model 32x24 float32"),
    "a vector": (layer(shape=[32]), "layer '0': expected its shape"),
    "a negative size": (layer(shape=[-32, -24]), "layer '0': expected its shape"),
    "a size that is no integer": (layer(shape=[32.0, 24]), "layer '0': expected its shape"),
    "a size that is a bool": (layer(shape=[True, 24]), "layer '0': expected its shape"),
    "a huge size": (layer(shape=[1 << 80, 24]), "and in the model"),
    "another dtype": (layer(dtype="bfloat16"), "layer '0' is 32x24 bfloat16"),
    "an unknown dtype": (layer(dtype="int8"), "layer '0': expected its shape"),
    "a dtype that is a list": (layer(dtype=["float32"]), "layer '0': expected its shape"),
    "groups": (layer(groups=2), "32x24 float32 in 2 groups"),
    "no groups": (layer(groups=0), "layer '0': expected its shape"),
    "groups that do not divide": (layer(groups=5), "layer '0': expected its shape"),
    "transposed": (layer(transposed=True), "and in the model"),
    "an unknown activation": (layer(activation="tanh"), "layer '0': expected its shape"),
    "an empty activation": (layer(activation=""), "layer '0': expected its shape"),
    "an activation that is a list": (layer(activation=[]), "layer '0': expected its shape"),
    "another activation": (layer(activation="gelu"), "activation '1' is gelu, and in the model another"),
    "no activation": (layer(activation=None), "activation '1': expected the layers that compute it"),
    "an additional field": (layer(more=1), "layer '0': expected its shape"),
    "a weight under no layer": (layer(weight="x"), "expected its weight under a like layer, got 'x'"),
    "a weight under another": (layer(weight="2"), "expected its weight under a like layer, got '2'"),
    "fused into nothing": (text("fused", '{"1": []}'), "activation '1': expected the layers"),
    "fused into what is no list": (text("fused", '{"1": "0"}'), "activation '1': expected the layers"),
    "fused into the unknown": (text("fused", '{"1": ["7"]}'), "activation '1': expected the layers"),
    "fused from nowhere": (text("fused", '{"7": ["0"]}'), "activation '7' is relu, and in the model another"),
    "fused from a layer": (text("fused", '{"2": ["0"]}'), "activation '2' is relu, and in the model another"),
    "tied to itself": (text("tied", '{"0.bias": "0.bias"}'), "expected tied tensors to name one"),
    "tied to a number": (text("tied", '{"0.bias": 3}'), "expected tied tensors to name one"),
    "tied from nowhere": (text("tied", '{"x": "0.bias"}'), "ties the tensor 'x'"),
    "tied to another kind": (text("tied", '{"0.bias": "2.bias"}'), "holds, and the model does not"),
    "a tensor too many": (lambda t, _: t.update(x=torch.ones(1)), "does not, the tensor 'x'"),
    "a tensor too few": (lambda t, _: t.pop("2.bias"), "lacks the tensor '2.bias'"),
    "a bias of another shape": (
        tensor("0.bias", lambda b: b[:-1].clone()),
        "tensor '0.bias' is float32 (31,)",
    ),
    "a bias of another dtype": (tensor("0.bias", Tensor.double), "tensor '0.bias' is float64"),
    "bits of another dtype": (tensor("0.weight.bits", Tensor.char), "expected bits as uint8"),
    "bits of another shape": (tensor("0.weight.bits", lambda b: b.T.contiguous()), "expected bits as uint8"),
    "a bit too many": (tensor("0.weight.bits", lambda b: b | 1), "values"),
    "all bits": (tensor("0.weight.bits", lambda b: b | 255), "values"),
    "a bit too few": (tensor("0.weight.bits", lambda b: b & 254), "a value for each bit"),
    "a value too many": (
        tensor("0.weight.values", lambda v: torch.cat([v, v[:1]])),
        "a value for each bit, got 1 more",
    ),
    "a value too few": (tensor("0.weight.values", lambda v: v[1:].clone()), "values"),
    "values of another dtype": (tensor("0.weight.values", Tensor.double), "expected a vector of floats"),
    "values as a matrix": (tensor("0.weight.values", lambda v: v[None]), "expected a vector of floats"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = mlp()
    accelerate(model, torch.randn(3, 24))
    save(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, saved: Path) -> None:
    change, message = REFUSED[case]
    rewrite(saved, change)
    model = mlp()
    before = state(model)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected an accelerated model") as caught:
        load(saved, model)
    assert message in str(caught.value) or any(part in str(caught.value) for part in message.split("|"))
    assert "save it anew" in str(caught.value)
    assert state(model) == before


def test_bits_past_the_last_column(tmp_path: Path) -> None:
    model = nn.Sequential(pruned(nn.Linear(9, 4)))
    accelerate(model, torch.randn(3, 9))
    save(model, tmp_path)

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        bits = tensors["0.weight.bits"]
        bits[-1, 1] |= 128
        tensors["0.weight.values"] = torch.cat([tensors["0.weight.values"], torch.ones(1)])

    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="expected an accelerated model"):
        load(tmp_path, nn.Sequential(nn.Linear(9, 4)))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_harmless(data: st.DataObject, saved: Path) -> None:
    content = bytearray((saved / NAME).read_bytes())
    folder = saved / "damaged"
    folder.mkdir(exist_ok=True)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 100]))
    (folder / NAME).write_bytes(content[: len(content) - cut])
    model = mlp()
    before = state(model)
    try:
        load(folder, model)
    except ValueError:
        assert state(model) == before
    else:
        assert model(torch.ones(1, 24)).shape == (1, 16)


def test_into_other_models(saved: Path) -> None:
    others: list[nn.Module] = [
        nn.Sequential(nn.Linear(24, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.ReLU()),
        nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()),
        mlp().to("meta"),
    ]
    for model in others:
        names = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="load it into the model it was made from"):
            load(saved, model)
        assert [type(m) for m in model.modules()] == names
    accelerated = mlp()
    accelerate(accelerated, torch.randn(3, 24))
    with pytest.raises(ValueError, match=r"restore\(\) it first"):
        load(saved, accelerated)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path, mlp())
    (tmp_path / NAME).write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="zip archive"):
        load(tmp_path, mlp())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(TypeError, match="_extra_state: expected a dense tensor"):
        save(Extra(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(ValueError, match="Sequential"):
        save(SparseLinear(nn.Linear(2, 2)), tmp_path)
    model = nn.ModuleDict({"a": mlp()})
    accelerate(model["a"], torch.randn(3, 24))
    with pytest.raises(ValueError, match="save the whole model"):
        save(nn.Sequential(model["a"][1]), tmp_path)  # type: ignore[index]
    with pytest.raises(FileNotFoundError):
        save(mlp(), tmp_path / "missing" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_file_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / NAME).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(mlp(), saved)
    assert (saved / NAME).read_bytes() == before
    assert [file.name for file in saved.iterdir()] == [NAME]


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
