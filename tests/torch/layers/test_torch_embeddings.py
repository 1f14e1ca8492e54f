"""Embeddings whose rows are int8: look-ups, changes, ties, accelerate, files, folders of Hugging Face."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import NAME as FOLDER_FILE
from huggingface_models import bert, example, outputs, pruned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import BertForMaskedLM, BertModel, GPT2Config, GPT2Model, T5Config, T5EncoderModel

import sparsam.torch
import torch
from messages import FORM
from sparsam import SparseMatrix
from sparsam._core import Packed
from sparsam.torch.acceleration.memory import parameter_bytes
from sparsam.torch.layers.packing import packed_layers
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def embedding(rows: int = 50, width: int = 24, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Embedding(rows, width, dtype=dtype, **options)


def int8(layer: Any) -> Any:
    return sparsam.torch.pack(copy.deepcopy(layer), dtype=torch.int8)


class Tagger(nn.Module):
    """Words and places, and a layer that is pruned."""

    def __init__(self, words: int = 400, width: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(40, width)
        self.mix = nn.Linear(width, 256)
        self.head = nn.Linear(256, 9)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[-1])
        logits: Tensor = self.head(torch.relu(self.mix(self.words(ids) + self.places(places))))
        return logits


def tagger() -> Tagger:
    torch.manual_seed(0)
    model = Tagger().eval()
    with torch.no_grad():
        model.mix.weight[torch.rand(model.mix.weight.shape) < 0.8] = 0
    return model


def ids(*shape: int, rows: int = 50) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4), (300, 40)])
def test_rows_are_those_of_the_rounded_weight(
    dtype: torch.dtype, shape: tuple[int, ...], threads: int
) -> None:
    dense = embedding(dtype=dtype, padding_idx=3)
    layer = int8(dense)
    rounded = SparseMatrix.from_dense(dense.weight.detach().float().numpy(), dtype="int8").to_dense()
    expected = functional.embedding(ids(*shape), torch.from_numpy(rounded).to(dtype))
    with torch.no_grad():
        for indices in (ids(*shape), ids(*shape).int(), torch.stack([ids(*shape)] * 2, -1)[..., 0]):
            y = layer(indices)
            assert y.dtype is dtype
            assert y.shape == (*shape, 24)
            assert torch.equal(y, expected)
    assert type(layer) is nn.Embedding
    weight: Any = layer.weight
    assert weight.packed.forms == ("rows",)
    assert torch.equal(layer.weight.to_dense(), torch.from_numpy(rounded).to(dtype))
    assert "rows, which are looked up" in str(weight.explain(4))


def test_its_memory_is_a_byte_a_weight_and_a_scale_a_row() -> None:
    layer = int8(embedding(1000, 96))
    assert 1000 * 100 <= layer.weight.nbytes <= 1000 * 100 + 320


def test_numbers_of_no_row_and_other_indices_are_refused() -> None:
    layer = int8(embedding())
    for bad in (50, -1, 2**40):
        with pytest.raises(IndexError, match=rf"indices: expected .* 0 to 49; got {bad}; pass") as caught:
            layer(torch.tensor([0, bad]))
        assert FORM.fullmatch(str(caught.value))
    with pytest.raises(TypeError, match=r"indices: expected int64 or int32 on the CPU; got torch.float32"):
        layer(torch.ones(3))
    empty = sparsam.torch.pack(nn.Embedding(0, 4), dtype=torch.int8)
    with torch.no_grad():
        assert empty(ids(0)).shape == (0, 4)
    with pytest.raises(IndexError):
        empty(torch.tensor([0]))


def test_what_else_reads_or_changes_the_weight() -> None:
    layer = int8(embedding())
    rounded = layer.weight.to_dense()
    with torch.no_grad():
        assert torch.equal(layer.weight[4], rounded[4])
        assert torch.equal(functional.embedding(ids(6), layer.weight[:50]), rounded[ids(6)])
        x = torch.randn(3, 24)
        assert torch.equal(functional.linear(x, layer.weight), functional.linear(x, rounded))  # a tied head
        layer.weight[4] = 0.25
        layer.weight.data[5].fill_(-0.5)
        assert (layer(torch.tensor([4, 5])) == torch.tensor([[0.25], [-0.5]])).all()
        bag = functional.embedding_bag(ids(2, 3), layer.weight)
    assert bag.shape == (2, 24)
    weight: Any = layer.weight
    assert weight.packed.forms == ("rows",)
    state = layer.state_dict()
    again = int8(embedding())
    again.load_state_dict(state)
    assert torch.equal(again.weight.to_dense(), layer.weight.to_dense())
    sparsam.torch.restore(layer)
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight.detach(), again.weight.to_dense())


def test_norms_are_kept_as_ever() -> None:
    dense = embedding(max_norm=1.0)
    layer = int8(dense)
    with torch.no_grad():
        y = layer(ids(9))
    assert (y.norm(dim=-1) <= 1.02).all()
    weight: Any = layer.weight
    assert weight.packed.forms == ("rows",)


def test_gradients_are_refused_unless_it_is_frozen() -> None:
    layer = int8(embedding())
    with pytest.raises(RuntimeError, match="backward or forward-mode differentiation: expected dense"):
        layer(ids(3)).sum().backward()
    frozen = int8(embedding().requires_grad_(requires_grad=False))
    assert not frozen(ids(3)).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_conversions_and_graphs(dtype: torch.dtype) -> None:
    layer, x = int8(embedding(dtype=dtype)), ids(4, 3)
    with torch.no_grad():
        y = layer(x)
        twins = {
            "deepcopy": copy.deepcopy(layer),
            "pickle": pickle.loads(pickle.dumps(layer)),
            "compile": torch.compile(layer, backend="eager", fullgraph=True),
            "export": torch.export.export(layer, (x,)).module(),
            "trace": torch.jit.trace(layer, x),  # type: ignore[no-untyped-call]
            "vmap": torch.func.vmap(layer),
        }
        for name, twin in twins.items():
            assert torch.equal(twin(x), y), name
        wide = copy.deepcopy(layer).float()
        assert wide.weight.packed.forms == ("rows",)
        assert torch.allclose(wide(x), y.float(), atol=0.02)  # rounded once more
    exported = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), exported)
    assert exported.tell() < 0.9 * layer.weight.nbytes + 60_000


def test_other_values_and_activations_are_refused() -> None:
    for dtype in (None, torch.bfloat16):
        with pytest.raises(TypeError, match=r"dtype: expected torch.int8 for an embedding; got .*; pass"):
            sparsam.torch.pack(embedding(), dtype=dtype)
    with pytest.raises(ValueError, match="activation: expected None for a layer of class Embedding"):
        sparsam.torch.pack(embedding(), dtype=torch.int8, activation="relu")


@pytest.mark.usefixtures("clock", "one_thread")
def test_accelerate_rounds_embeddings_and_frees_what_it_may(tmp_path: Path) -> None:
    model, x = tagger(), ids(5, 12, rows=400)
    dense = model(x).detach()
    original = model.words.weight.detach().clone()
    report = sparsam.torch.accelerate(model, x, values="int8", tolerance=0.05, verbose=False)
    rows = {row.name: row for row in report.layers}
    assert [rows[name].kernel for name in ("words", "places")] == ["rows", "rows"]
    assert rows["words"].swapped
    assert rows["words"].kind == "Embedding"
    assert report.difference is not None
    assert 0 < report.difference <= 0.05
    with torch.no_grad():
        y = model(x)
    assert (y - dense).abs().max() <= 0.05 * dense.abs().max()
    kept = parameter_bytes(model)
    assert kept == report.weights_after > 400 * 64 * 5  # with the dense weight, for restore
    sparsam.torch.save(model, tmp_path)
    loaded = Tagger().eval()
    sparsam.torch.load(tmp_path, loaded)
    assert parameter_bytes(loaded) < kept - 400 * 64 * 3.9
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
    sparsam.torch.restore(model)
    assert torch.equal(model.words.weight.detach(), original)
    model = tagger()
    report = sparsam.torch.accelerate(
        model, x, values="int8", tolerance=0.05, keep_dense=False, verbose=False
    )
    assert report.weights_after == parameter_bytes(model) == parameter_bytes(loaded)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    rounded = SparseMatrix.from_dense(original.numpy(), dtype="int8").to_dense()
    sparsam.torch.restore(model)
    assert np.array_equal(model.words.weight.detach().numpy(), rounded)


@pytest.mark.usefixtures("clock", "one_thread")
def test_which_embeddings_accelerate_leaves() -> None:
    class Odd(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(256, 400, bias=False)
            self.words = nn.Embedding(400, 256)
            self.head.weight = self.words.weight  # tied
            self.places = nn.Embedding(40, 256, max_norm=1e3)
            self.kinds = nn.Embedding(2, 4)
            self.mix = nn.Linear(256, 256)

        def forward(self, ids: Tensor) -> Tensor:
            kinds: Tensor = self.kinds(ids % 2).sum(-1, keepdim=True)
            return super().forward(ids) + kinds

    model, x = Odd().eval(), ids(2, 5, rows=400)
    report = sparsam.torch.accelerate(model, x, values="int8", verbose=False)
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["words"] == "its weight is also that of head"
    assert reasons["places"] == "max_norm changes its weight as it is used"
    assert reasons["kinds"] == "rows of int8 would take no less memory"
    floats = sparsam.torch.accelerate(tagger(), x, verbose=False)
    assert {row.kind for row in floats.layers} == {"Linear"}
    alone = sparsam.torch.accelerate(tagger(), values="int8", verbose=False)
    assert {row.reason for row in alone.layers if row.kind == "Embedding"} == {"needs example_inputs"}
    far = sparsam.torch.accelerate(tagger(), x, values="int8", tolerance=1e-7, verbose=False)
    assert not far.swapped
    again_packed = tagger()
    sparsam.torch.pack(again_packed.words, dtype=torch.int8)
    again = sparsam.torch.accelerate(again_packed, x, values="int8", verbose=False)
    assert {row.name: row.reason for row in again.layers}["words"] == "packed already"


def test_one_parameter_of_two_embeddings_is_packed_once() -> None:
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    model = T5EncoderModel(config).eval()  # type: ignore[no-untyped-call]
    dense = parameter_bytes(model)
    for module in (model.shared, model.encoder.embed_tokens):
        if not sparsam.torch.layers.packing.is_packed(module):
            sparsam.torch.pack(module, dtype=torch.int8)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert parameter_bytes(model) <= dense + 99 * 36 + 320
    assert model(input_ids=ids(1, 4)).last_hidden_state.shape == (1, 4, 32)


@pytest.mark.parametrize("kind", [BertModel, GPT2Model, BertForMaskedLM])
@pytest.mark.usefixtures("clock", "one_thread")
def test_folders_of_transformers(kind: Any, tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    model = pruned(kind(gpt2 if kind is GPT2Model else bert())).eval()
    x = example(model)
    dense = outputs(model, x)
    report = sparsam.torch.accelerate(model, x, values="int8", keep_dense=False, verbose=False)
    rows = [row for row in report.layers if row.kind == "Embedding"]
    tied = [row for row in rows if "also that of" in row.reason]
    assert len(tied) == (kind is BertForMaskedLM)
    small = [row for row in rows if "no less memory" in row.reason]
    assert len(small) == (kind is not GPT2Model)  # of two kinds of tokens
    assert sum(row.swapped for row in rows) == len(rows) - len(tied) - len(small)
    wanted = outputs(model, x)
    assert (wanted - dense).abs().max() <= 0.1 * dense.abs().max()
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(loaded.eval(), x), wanted)
    assert parameter_bytes(loaded) == report.weights_after
    assert len(packed_layers(loaded)) == len(packed_layers(model))
    half = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert outputs(half.eval(), x).dtype is torch.bfloat16
    assert (tmp_path / FOLDER_FILE).stat().st_size < 0.8 * sum(
        p.nbytes for p in kind(model.config).parameters()
    )


def test_golden_file(tmp_path: Path) -> None:
    """As docs/formats.md shows it."""
    model: Any = nn.Sequential(nn.Embedding(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, 0.0, -1.0], [0.25, 0.5, 0.5]]))
    sparsam.torch.pack(model[0], dtype=torch.int8)
    sparsam.torch.save(model, tmp_path)
    content = (tmp_path / "sparsam.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert json.loads(metadata["weights"]) == {
        "0.weight": {"shape": [2, 3], "dtype": "float32", "transposed": False}
    }
    assert json.loads(metadata["layers"]) == {
        "0": {"groups": 1, "activation": None, "forms": ["rows"], "computed": None}
    }
    assert header == {
        "0.weight": {"dtype": "I8", "shape": [6], "data_offsets": [0, 6]},
        "0.weight_bits": {"dtype": "U8", "shape": [2, 4], "data_offsets": [6, 14]},
    }
    assert content[8 + size :].hex(" ") == "20 00 c0 20 40 40 00 00 80 3c 00 00 00 3c"
    loaded: Any = nn.Sequential(nn.Embedding(2, 3))
    assert sparsam.torch.load(tmp_path, loaded) == 1
    assert torch.equal(loaded[0].weight.to_dense(), model[0].weight.to_dense())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t["0.weight"].fill_(-65), "expected int8 values with scales; got others: values"),
        (lambda t: t["0.weight_bits"].fill_(0), "expected int8 values with scales; got others: scales"),
        (lambda t: t.update({"0.weight": t["0.weight"][:5].clone()}), "bits: expected uint8"),
        (lambda t: t.update({"0.weight": t["0.weight"].float()}), "expected others than 'panels' for int8"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Any, what: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(2, 3))
    sparsam.torch.pack(model[0], dtype=torch.int8)
    sparsam.torch.save(model, tmp_path)
    file = tmp_path / "sparsam.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=what):
        sparsam.torch.load(tmp_path, nn.Sequential(nn.Embedding(2, 3)))


def test_a_file_of_rows_fits_embeddings_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 3))
    sparsam.torch.pack(model[0], dtype=torch.int8)
    sparsam.torch.save(model, tmp_path)
    wanted = "layer '0': field forms: expected .*'rows'.* for an embedding, and for nothing else; got"
    with pytest.raises(ValueError, match=wanted):
        sparsam.torch.load(tmp_path, nn.Sequential(nn.Linear(3, 9, bias=False)))


def test_the_form_alone() -> None:
    q = np.array([[1, 0, -64], [0, 0, 0], [64, 3, 2]], np.int8)
    packed = Packed.pack_int8(q, np.array([0.5, 1, 2], np.float32))
    packed.add("rows")
    packed.keep(["rows"])
    assert packed.nnz == 5
    assert packed.unpack().tolist() == [[0.5, 0, -32], [0, 0, 0], [128, 6, 4]]
    again = Packed.from_buffers([packed.buffer("rows")])
    again.add("slots")
    assert np.array_equal(again.unpack(), packed.unpack())
    x, y = np.ones((1, 3), np.float32), np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="kernel: expected slots, the kernel of int8 values") as caught:
        packed.linear("rows", x, None, "", y)
    assert FORM.fullmatch(str(caught.value))
    with pytest.raises(ValueError, match="form 'rows': expected a form that the weight has") as caught:
        Packed.pack_int8(q, np.ones(3, np.float32)).look_up_at(0, 0, 0)
    assert FORM.fullmatch(str(caught.value))
    with pytest.raises(ValueError, match="form: expected bitmask, panels or slots, for float values"):
        Packed.pack(np.ones((2, 2), np.float32)).add("rows")
    good, refused = packed.buffer("rows"), 0
    for at in range(len(good)):
        bad = good.copy()
        bad[at] ^= 0x81
        try:
            Packed.from_buffers([bad]).unpack()
        except ValueError:
            refused += 1
    assert refused > 130
