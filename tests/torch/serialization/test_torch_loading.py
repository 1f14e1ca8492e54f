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
from sparsam.torch import load, pack, restore, save
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

NAME = "sparsam.safetensors"

Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def rewrite(folder: Path, change: Change) -> None:
    """Writes a file again with something changed."""
    with safetensors.safe_open(folder / NAME, "pt") as handle:
        metadata = dict(handle.metadata())
    tensors = safetensors.torch.load_file(folder / NAME)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / NAME, metadata)


def fields(key: str, name: str, **fields: Any) -> Change:
    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        entries = json.loads(metadata[key])
        entries[name] |= fields
        metadata[key] = json.dumps(entries)

    return change


def layer(**changed: Any) -> Change:
    return fields("layers", "0", **changed)


def weight(**changed: Any) -> Change:
    return fields("weights", "0.weight", **changed)


def text(key: str, value: str) -> Change:
    return lambda _, metadata: metadata.update({key: value})


def tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: value(tensors[name])})


REFUSED: dict[str, tuple[Change, str]] = {
    "no mark": (lambda _, metadata: metadata.clear(), "sparsam='accelerated 3'; got None"),
    "a newer version": (text("sparsam", "accelerated 4"), "got 'accelerated 4'"),
    "an older version": (text("sparsam", "accelerated 2"), "got 'accelerated 2'"),
    "another format": (text("sparsam", "SparseMatrix 1"), "got 'SparseMatrix 1'"),
    "no JSON": (text("layers", "{"), "metadata 'layers': expected JSON; got no valid JSON"),
    "deep JSON": (text("layers", "[" * 100_000), "expected JSON; got no valid JSON"),
    "a list": (text("layers", "[]"), "metadata 'layers': expected object; got []"),
    "a layer that is none": (text("layers", '{"0": 3}'), "layer '0': expected object; got 3"),
    "weights that are a list": (text("weights", "[]"), "metadata 'weights': expected object; got []"),
    "a weight that is none": (
        text("weights", '{"0.weight": 3}'),
        "weight '0.weight': expected object; got 3",
    ),
    "no tied": (
        lambda _, metadata: metadata.pop("tied"),
        "metadata 'tied': expected JSON; got no valid JSON",
    ),
    "no buffers": (
        lambda _, metadata: metadata.pop("buffers"),
        "metadata 'buffers': expected JSON; got no valid JSON",
    ),
    "buffers that are numbers": (
        text("buffers", "[1]"),
        "metadata 'buffers': field [0]: expected str; got 1",
    ),
    "attention that is no list": (
        text("attention", '"sdpa"'),
        "metadata 'attention': expected array; got 'sdpa'",
    ),
    "a buffer that is not there": (text("buffers", '["x"]'), "got a file without 'x'"),
    "another shape": (
        weight(shape=[24, 32]),
        "weight '0.weight': bits: expected uint8 (24, 4); got uint8 (32, 3)",
    ),
    "a shape of as many bits": (
        weight(shape=[32, 23]),
        "weight '0.weight': expected values and bits of one matrix; got others: bits of row|past the last",
    ),
    "a vector": (
        weight(shape=[32]),
        "weight '0.weight': field shape: expected array of length >= 2; got [32]",
    ),
    "a negative size": (
        weight(shape=[-32, -24]),
        "weight '0.weight': field shape[0]: expected int >= 0; got -32",
    ),
    "a size that is no integer": (
        weight(shape=[32.0, 24]),
        "weight '0.weight': field shape[0]: expected int; got 32.0",
    ),
    "a size that is a bool": (
        weight(shape=[True, 24]),
        "weight '0.weight': field shape[0]: expected int; got True",
    ),
    "a huge size": (
        weight(shape=[1 << 80, 24]),
        "weight '0.weight': field shape[0]: expected int <= 9007199254740991; got 12",
    ),
    "another dtype": (
        weight(dtype="bfloat16"),
        "tensor '0.weight': expected (32, 24) bfloat16 in the model; got (32, 24) float32",
    ),
    "an unknown dtype": (
        weight(dtype="int8"),
        "weight '0.weight': field dtype: expected one of float32, bfloat16, float16; got 'int8'",
    ),
    "a dtype that is a list": (
        weight(dtype=["float32"]),
        "weight '0.weight': field dtype: expected str; got ['float32']",
    ),
    "groups": (layer(groups=2), "layer '0': expected 2 groups in the model; got 1"),
    "no groups": (layer(groups=0), "layer '0': field groups: expected int >= 1; got 0"),
    "groups that do not divide": (
        layer(groups=5),
        "layer '0': field groups: expected a divisor of its rows; got 5",
    ),
    "transposed": (
        weight(transposed=True),
        "layer '0': expected a Conv1D of transformers, with a weight (in, out); got a layer with",
    ),
    "transposed axes": (
        weight(transposed=True, shape=[4, 3, 2]),
        "weight '0.weight': field transposed: expected false for 4x3x2 float32; got true",
    ),
    "an unknown activation": (
        layer(activation="tanh"),
        "field activation: expected null or one of relu, gelu, gelu_tanh, silu; got 'tanh'",
    ),
    "an empty activation": (layer(activation=""), "layer '0': field activation: expected null or one of"),
    "an activation that is a list": (
        layer(activation=[]),
        "layer '0': field activation: expected str | null; got []",
    ),
    "another activation": (layer(activation="gelu"), "activation '1': expected gelu in the model; got relu"),
    "no activation": (layer(activation=None), "activation '1': expected the layers that compute it"),
    "unknown forms": (
        layer(forms=["sloths"]),
        (
            "field forms: expected one of ['bitmask'], ['panels'], ['slots'], ['bitmask', 'panels'], "
            "['bitmask', 'slots'], ['panels', 'slots'], ['rows']; got ('sloths',)"
        ),
    ),
    "computed": (
        layer(computed="float32"),
        "layer '0': expected one that torch.nn.utils.prune or parametrize computes, as in the model",
    ),
    "computed as an unknown dtype": (
        layer(computed="int16"),
        "layer '0': field computed: expected null or one of",
    ),
    "an additional field": (layer(more=1), "layer '0': field more: expected no such field; got one"),
    "a field too many of a weight": (weight(more=1), "weight '0.weight': field more: expected no such field"),
    "no weight of a layer": (
        text("weights", "{}"),
        "layer '0': expected values and bits of its weight; got none under '0.weight'",
    ),
    "a layer that is an activation": (
        lambda _, metadata: metadata.update(layers=metadata["layers"].replace('"2"', '"3"'), fused="{}"),
        "layer '3': expected values and bits of its weight; got none under '3.weight'",
    ),
    "fused into nothing": (text("fused", '{"1": []}'), "activation '1': expected the layers"),
    "fused into what is no list": (
        text("fused", '{"1": "0"}'),
        "metadata 'fused': field [...]: expected array",
    ),
    "fused into the unknown": (text("fused", '{"1": ["7"]}'), "activation '1': expected the layers"),
    "fused from nowhere": (
        text("fused", '{"7": ["0"]}'),
        "activation '7': expected relu in the model; got another or none",
    ),
    "fused from a layer": (
        text("fused", '{"2": ["0"]}'),
        "activation '2': expected relu in the model; got another or none",
    ),
    "tied to itself": (
        text("tied", '{"0.bias": "0.bias"}'),
        "tensor '0.bias': expected to be tied to one that is",
    ),
    "tied and stored": (
        text("tied", '{"0.weight": "2.weight"}'),
        "tensor '0.weight': expected to be tied to one that is",
    ),
    "tied to a number": (text("tied", '{"0.bias": 3}'), "metadata 'tied': field [...]: expected str; got"),
    "tied from nowhere": (
        text("tied", '{"x": "0.bias"}'),
        "metadata 'tied': expected tensors that the model has; got 'x'",
    ),
    "tied to another kind": (
        text("tied", '{"0.bias": "2.bias"}'),
        "tensors: expected those of the model; got '0.bias', which it lacks",
    ),
    "a tensor too many": (lambda t, _: t.update(x=torch.ones(1)), "got 'x', which it lacks"),
    "a tensor too few": (lambda t, _: t.pop("2.bias"), "got a file without '2.bias'"),
    "a weight without bits": (lambda t, _: t.pop("2.weight_bits"), "got a file without '2.weight_bits'"),
    "a bias of another shape": (
        tensor("0.bias", lambda b: b[:-1].clone()),
        "tensor '0.bias': expected (31,) float32 in the model; got (32,) float32",
    ),
    "a bias of another dtype": (
        tensor("0.bias", Tensor.double),
        "tensor '0.bias': expected (32,) float64 in the model; got (32,) float32",
    ),
    "bits of another dtype": (tensor("0.weight_bits", Tensor.char), "bits: expected uint8 (32, 3); got int8"),
    "bits of another shape": (
        tensor("0.weight_bits", lambda b: b.T.contiguous()),
        "bits: expected uint8 (32, 3); got uint8 (3, 32)",
    ),
    "a bit too many": (tensor("0.weight_bits", lambda b: b | 1), "values: expected one for each of"),
    "all bits": (tensor("0.weight_bits", lambda b: b | 255), "values: expected one for each of 768 bits"),
    "a bit too few": (tensor("0.weight_bits", lambda b: b & 254), "values: expected one for each of"),
    "a value too many": (
        tensor("0.weight", lambda v: torch.cat([v, v[:1]])),
        "values: expected one for each of",
    ),
    "a value too few": (tensor("0.weight", lambda v: v[1:].clone()), "values: expected one for each of"),
    "values of another dtype": (
        tensor("0.weight", Tensor.double),
        "values: expected a vector of float32, bfloat16, float16, int8, uint8; got float64",
    ),
    "values as a matrix": (tensor("0.weight", lambda v: v[None]), "values: expected a vector of"),
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
    with pytest.raises(ValueError, match=r"sparsam\.safetensors: expected an accelerated model") as caught:
        load(saved, model)
    assert message in str(caught.value) or all(part in str(caught.value) for part in message.split("|"))
    assert "save it again" in str(caught.value)
    assert state(model) == before


def test_forms_of_floats_are_refused_for_int8(tmp_path: Path) -> None:
    model: Any = mlp()
    pack(model[0], dtype=torch.int8)
    save(model, tmp_path)
    rewrite(tmp_path, layer(forms=["panels"]))
    with pytest.raises(ValueError, match=r"expected others than 'panels' for int8 values; got \['panels'\]"):
        load(tmp_path, mlp())


def test_the_model_itself_is_no_layer_of_it(tmp_path: Path) -> None:
    save(nn.Sequential(pack(pruned(nn.Linear(9, 4)))), tmp_path)

    def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("0.")] = tensors.pop(name)
        metadata["layers"] = metadata["layers"].replace('"0"', '""')
        metadata["weights"] = metadata["weights"].replace('"0.weight"', '".weight"')

    rewrite(tmp_path, rename)
    wanted = "layer '': expected a linear layer, an embedding or a convolution in the model; got none"
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path, nn.Linear(9, 4))


def test_into_a_layer_whose_weight_is_computed(tmp_path: Path) -> None:
    model = nn.Sequential(pruned(nn.Linear(9, 4)))
    save(nn.Sequential(pack(copy.deepcopy(model[0]))), tmp_path)
    prune.identity(model[0], "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(
        ValueError, match=r"layer '0': expected a weight of its own; got one that torch.nn.utils.prune"
    ):
        load(tmp_path, model)
    prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    assert load(tmp_path, model) == 1


def test_a_computed_weight_is_saved_as_what_it_is_computed_from(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), weight_norm(nn.Conv1d(2, 3, 3)))
        prune.random_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
        return model.eval()

    model, fresh = build(), build()
    pack(model[0], activation="relu", dtype=torch.bfloat16)
    pack(model[2])
    model[1] = Fused(model[1], (model[0],), ("0",))
    x, signal = torch.randn(2, 9), torch.randn(1, 2, 9)
    save(model, tmp_path)
    assert load(tmp_path, fresh) == 2
    assert torch.equal(fresh[:2](x), model[:2](x))
    assert torch.equal(fresh[2](signal), model[2](signal))
    assert fresh.state_dict().keys() == model.state_dict().keys() == build().state_dict().keys()
    assert restore(fresh) == restore(model) == 2
    assert torch.equal(fresh[0](x), model[0](x))
    assert torch.equal(fresh[2].weight, model[2].weight)
    with pytest.raises(ValueError, match=r"layer '0': expected one that torch.nn.utils.prune or parametrize"):
        load(tmp_path, nn.Sequential(nn.Linear(9, 4), nn.ReLU(), weight_norm(nn.Conv1d(2, 3, 3))))


def test_bits_past_the_last_column(tmp_path: Path) -> None:
    model = nn.Sequential(pruned(nn.Linear(9, 4)))
    accelerate(model, torch.randn(3, 9))
    save(model, tmp_path)

    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["0.weight_bits"][-1, 1] |= 128
        tensors["0.weight"] = torch.cat([tensors["0.weight"], torch.ones(1)])

    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="expected an accelerated model"):
        load(tmp_path, nn.Sequential(nn.Linear(9, 4)))


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3)])
def test_forms_that_convolutions_cannot_compute_with(conv: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(pruned(copy.deepcopy(conv)))
    accelerate(
        model, torch.randn(2, 4, 8, 8)[:, :, 0] if isinstance(conv, nn.Conv1d) else torch.randn(2, 4, 8, 8)
    )
    save(model, tmp_path)
    wanted = r"field forms: expected \['panels'\], or with int8 values \['slots'\], for a convolution; got"
    other = nn.Sequential(copy.deepcopy(conv))
    for forms, values, text in (
        (["bitmask"], None, rf"{wanted} \['bitmask'\];"),
        (
            ["slots"],
            None,
            r"weight '0.weight': expected int8 values for \['slots'\] of a conv.*; got floats;",
        ),
    ):
        rewrite(tmp_path, layer(forms=forms, computed=values))
        with pytest.raises(ValueError, match=text):
            load(tmp_path, other)
        assert type(other[0].weight) is nn.Parameter


@pytest.mark.parametrize(("forms", "values"), [("slots", "float32"), ("panels", "int8"), ("slots", "int4")])
def test_forms_that_computed_convolutions_cannot_compute_with(
    forms: str, values: str, tmp_path: Path
) -> None:
    save(nn.Sequential(pack(weight_norm(nn.Conv1d(4, 6, 3)), dtype=torch.int8)), tmp_path)
    rewrite(tmp_path, layer(forms=[forms], computed=values))
    with pytest.raises(ValueError, match=rf"field forms: expected .* got \['{forms}'\] of {values};"):
        load(tmp_path, nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3))))


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


def test_into_a_model_that_never_ran(saved: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(16), nn.ReLU())
    with pytest.raises(ValueError, match=r"0.weight: expected a model that ran before; .* call it once"):
        load(saved, model)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path, mlp())
    (tmp_path / NAME).write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="zip archive"):
        load(tmp_path, mlp())
