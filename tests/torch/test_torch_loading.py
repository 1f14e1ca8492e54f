from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch_cases import mlp, pruned, state

import torch
from sparsam.torch import load, pack, save
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

NAME = "model.safetensors"

Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def rewrite(folder: Path, change: Change) -> None:
    """Writes a file again with something changed."""
    with safetensors.safe_open(folder / NAME, "pt") as handle:
        metadata = dict(handle.metadata())
    tensors = safetensors.torch.load_file(folder / NAME)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / NAME, metadata)


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
    "no mark": (lambda _, metadata: metadata.clear(), "sparsam='accelerated 2'; got None"),
    "a newer version": (text("sparsam", "accelerated 3"), "got 'accelerated 3'"),
    "another format": (text("sparsam", "SparseMatrix 1"), "got 'SparseMatrix 1'"),
    "no JSON": (text("layers", "{"), "metadata 'layers': expected JSON; got no valid JSON"),
    "deep JSON": (text("layers", "[" * 100_000), "expected JSON; got no valid JSON"),
    "a list": (text("layers", "[]"), "metadata 'layers': expected object; got []"),
    "a layer that is none": (text("layers", '{"0": 3}'), "layer '0': expected object; got 3"),
    "no tied": (
        lambda _, metadata: metadata.pop("tied"),
        "metadata 'tied': expected JSON; got no valid JSON",
    ),
    "another shape": (layer(shape=[24, 32]), "layer '0' is 24x32 float32, and in the model 32x24 float32"),
    "a vector": (layer(shape=[32]), "layer '0': field shape: expected array of length >= 2; got [32]"),
    "a negative size": (layer(shape=[-32, -24]), "layer '0': field shape[0]: expected int >= 0; got -32"),
    "a size that is no integer": (
        layer(shape=[32.0, 24]),
        "layer '0': field shape[0]: expected int; got 32.0",
    ),
    "a size that is a bool": (layer(shape=[True, 24]), "layer '0': field shape[0]: expected int; got True"),
    "a huge size": (
        layer(shape=[1 << 80, 24]),
        "layer '0': field shape[0]: expected int <= 9007199254740991; got 12",
    ),
    "another dtype": (layer(dtype="bfloat16"), "layer '0' is 32x24 bfloat16"),
    "an unknown dtype": (
        layer(dtype="int8"),
        "layer '0': field dtype: expected one of float32, bfloat16, float16; got 'int8'",
    ),
    "a dtype that is a list": (
        layer(dtype=["float32"]),
        "layer '0': field dtype: expected str; got ['float32']",
    ),
    "groups": (layer(groups=2), "32x24 float32 in 2 groups"),
    "no groups": (layer(groups=0), "layer '0': field groups: expected int >= 1; got 0"),
    "groups that do not divide": (
        layer(groups=5),
        "layer '0': field groups: expected a divisor of 32 rows; got 5",
    ),
    "transposed": (layer(transposed=True), "and in the model"),
    "an unknown activation": (
        layer(activation="tanh"),
        "field activation: expected null or one of relu, gelu, gelu_tanh, silu; got 'tanh'",
    ),
    "an empty activation": (layer(activation=""), "layer '0': field activation: expected null or one of"),
    "an activation that is a list": (
        layer(activation=[]),
        "layer '0': field activation: expected str | null; got []",
    ),
    "another activation": (layer(activation="gelu"), "activation '1' is gelu, and in the model another"),
    "no activation": (layer(activation=None), "activation '1': expected the layers that compute it"),
    "an additional field": (layer(more=1), "layer '0': field more: expected no such field; got one"),
    "a weight under no layer": (layer(weight="x"), "expected its weight under a like layer; got 'x'"),
    "a weight under another": (layer(weight="2"), "expected its weight under a like layer; got '2'"),
    "fused into nothing": (text("fused", '{"1": []}'), "activation '1': expected the layers"),
    "fused into what is no list": (
        text("fused", '{"1": "0"}'),
        "metadata 'fused': field [...]: expected array",
    ),
    "fused into the unknown": (text("fused", '{"1": ["7"]}'), "activation '1': expected the layers"),
    "fused from nowhere": (text("fused", '{"7": ["0"]}'), "activation '7' is relu, and in the model another"),
    "fused from a layer": (text("fused", '{"2": ["0"]}'), "activation '2' is relu, and in the model another"),
    "tied to itself": (
        text("tied", '{"0.bias": "0.bias"}'),
        "tensor '0.bias': expected to be tied to one that is",
    ),
    "tied to a number": (text("tied", '{"0.bias": 3}'), "metadata 'tied': field [...]: expected str; got"),
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
    assert "save it again" in str(caught.value)
    assert state(model) == before


def test_the_model_itself_is_no_layer_of_it(tmp_path: Path) -> None:
    save(nn.Sequential(pack(pruned(nn.Linear(9, 4)))), tmp_path)

    def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("0.") if name == "0.bias" else name[1:]] = tensors.pop(name)
        tensors["weight"] = torch.zeros(4, 9)
        metadata["layers"] = metadata["layers"].replace('"0"', '""')

    rewrite(tmp_path, rename)
    with pytest.raises(ValueError, match="layer '' is missing in the model"):
        load(tmp_path, nn.Linear(9, 4))


def test_into_a_layer_whose_weight_is_computed(tmp_path: Path) -> None:
    model = nn.Sequential(pruned(nn.Linear(9, 4)))
    save(nn.Sequential(pack(copy.deepcopy(model[0]))), tmp_path)
    prune.identity(model[0], "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"weight of its own, which torch.nn.utils.prune and parametrize do"):
        load(tmp_path, model)
    prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    assert load(tmp_path, model) == 1


def test_a_computed_weight_is_saved_as_what_it_is_computed_from(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), weight_norm(nn.Conv1d(2, 3, 3)))
        prune.random_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
        return model.eval()

    model, fresh = build(), build()
    x = torch.randn(1, 2, 9)
    pack(model[0], activation="relu")
    pack(model[2])
    model[1] = Fused(model[1], (model[0],), ("0",))
    x = torch.randn(2, 9)
    expected = model[:2](x)
    save(model, tmp_path)
    assert load(tmp_path, fresh) == 0
    torch.testing.assert_close(fresh[:2](x), expected)
    torch.testing.assert_close(fresh[2].weight, model[2].weight.to_dense())


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
