"""Attention whose projections are packed: nn.MultiheadAttention computes with them what it did."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch.nn.utils import parametrizations, prune
from torch_cases import Clock, check_round_trip, packed, pruned, row, state

import torch
from sparsam.torch import PackedTensor, pack, restore
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.layers.packed_content import Content
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

WIDTH, HEADS = 16, 4

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "biases of keys and values": {"add_bias_kv": True, "add_zero_attn": True},
    "other keys": {"kdim": 24, "vdim": 20, "batch_first": True},
    "other keys, no bias": {"kdim": 24, "bias": False},
}


def attention(**options: Any) -> Any:
    return pruned(nn.MultiheadAttention(WIDTH, HEADS, **options))


def inputs(layer: Any, batch: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What it can be called with: queries, keys, values, the same tensor where it can be."""

    def draw(length: int, width: int) -> Tensor:
        return torch.randn((batch, length, width) if layer.batch_first else (length, batch, width))

    query, key, value = draw(5, WIDTH), draw(7, layer.kdim), draw(7, layer.vdim)
    found = [(query, key, value)]
    if layer.kdim == layer.vdim:
        found.append((query, key, key))
    if layer.kdim == layer.vdim == WIDTH:
        found.append((query, query, query))
    return found


def masks(batch: int, keys: int) -> list[dict[str, Any]]:
    """Arguments of the calls."""
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -2:] = True
    hidden = torch.triu(torch.ones(5, keys, dtype=torch.bool), 2)
    return [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": padding, "attn_mask": hidden},
        {"attn_mask": torch.randn(5, keys), "need_weights": False},
        {"attn_mask": torch.randn(batch * HEADS, 5, keys)},
    ]


@pytest.fixture
def unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a packed weight is unpacked."""

    def unpack(_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(Content, "unpack", unpack)


def close(found: Any, wanted: Any) -> bool:
    return float(difference(found, wanted) or 0) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unpacks")
@torch.no_grad()
def test_every_way_to_call_it(kind: str) -> None:
    dense = attention(**KINDS[kind])
    layer: Any = pack(copy.deepcopy(dense))
    assert isinstance(layer.out_proj.weight, PackedTensor)
    names = {name for name, weight in layer.named_parameters() if isinstance(weight, PackedTensor)}
    own = {"in_proj_weight"} if dense._qkv_same_embed_dim else {f"{x}_proj_weight" for x in "qkv"}
    assert names == {*own, "out_proj.weight"}
    for query, key, value in inputs(dense):
        keys = key.shape[1 if dense.batch_first else 0]
        for options in masks(3, keys):
            assert close(layer(query, key, value, **options), dense(query, key, value, **options))
    if not dense.batch_first:
        one = tuple(x[:, 0] for x in inputs(dense)[0])
        assert close(layer(*one), dense(*one))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_same_layer(kind: str) -> None:
    layer = attention(**KINDS[kind])
    before = state(layer)
    calls = inputs(layer)
    dense = [layer(*call) for call in calls]
    values = {name: value.clone() for name, value in layer.state_dict().items()}
    pack(layer)
    wanted = [layer(*call) for call in calls]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for twin in copies:
        assert difference([twin(*call) for call in calls], wanted) == 0
        assert restore(twin) == 1
        assert difference([twin(*call) for call in calls], dense) == 0
    found = layer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert layer.load_state_dict(values).missing_keys == []
    assert difference([layer(*call) for call in calls], wanted) == 0
    assert restore(layer) == 1
    assert state(layer) == before


def test_parts_of_a_packed_projection_can_be_changed() -> None:
    dense = attention()
    layer: Any = pack(copy.deepcopy(dense))
    with torch.no_grad():
        for one in (layer, dense):
            one.in_proj_weight.chunk(3)[1].mul_(2)
            one.in_proj_weight[3:5].zero_()
            one.out_proj.weight.data += 1.0
        for call in inputs(dense):
            assert close(layer(*call), dense(*call))
    restore(layer)
    assert torch.equal(layer.in_proj_weight, dense.in_proj_weight)
    assert torch.equal(layer.out_proj.weight, dense.out_proj.weight)


SLICES: dict[str, Callable[[Any], Any]] = {
    "a group": lambda w: w[16:32],
    "two groups": lambda w: w[16:],
    "nearly a group": lambda w: w[15:31],
    "every second row": lambda w: w[::2],
    "some columns": lambda w: w[:, 4:],
    "a split": lambda w: w.split([16, 32])[1],
    "a group of columns of the transpose": lambda w: w.T[:, 16:32].T,
    "a view of another shape": lambda w: w.view(24, 32),
    "no rows": lambda w: w[16:16],
}


@pytest.mark.parametrize("show", SLICES)
@pytest.mark.parametrize("groups", [1, 3])
@torch.no_grad()
def test_products_with_parts_of_a_weight(show: str, groups: int) -> None:
    dense = pruned(nn.Linear(16, 48, bias=False)).get_parameter("weight").detach()
    view, plain = (SLICES[show](weight) for weight in (PackedTensor.pack(dense, groups=groups), dense))
    x, bias = torch.randn(2, 5, plain.shape[1]), torch.randn(len(plain))
    assert view.shape == plain.shape
    torch.testing.assert_close(nn.functional.linear(x, view, bias), nn.functional.linear(x, plain, bias))
    torch.testing.assert_close(x @ view.T, x @ plain.T)
    torch.testing.assert_close(
        nn.functional.linear(x.half(), view.half()).float(), x @ plain.T, atol=0.1, rtol=0.1
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_within_what_pytorch_switches_on() -> None:
    dense = attention(batch_first=True)
    layer: Any = pack(copy.deepcopy(dense))
    for query, key, value in inputs(dense):
        wanted = dense(query, key, value)
        with torch.inference_mode():
            assert close(layer(query, key, value), wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(query, key, value)
            assert float(difference(found, dense(query, key, value)) or 0) < 0.03
        whole: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert close(whole(query, key, value), wanted)
        torch._dynamo.reset()
        stacked = [torch.stack([x, x + 1]) for x in (query, key, value)]
        each = [dense(*(x[i] for x in stacked))[0] for i in (0, 1)]
        mapped = torch.vmap(lambda *x: layer(*x, need_weights=False)[0])(*stacked)
        assert close(mapped, torch.stack(each))


@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning")
@torch.no_grad()
def test_a_graph_owns_the_projections(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            return self.layer(self.layer(query, query, query)[0], memory, memory)[0]  # type: ignore[no-any-return]

    model = Net(attention(batch_first=True))
    x = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))
    dense = model(*x)
    pack(model.layer)
    program = torch.export.export(model, x)
    torch.export.save(program, tmp_path / "a.pt2")
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    restore(model)
    assert not any("unpack" in str(node.target) for node in program.graph.nodes)
    assert close(torch.export.load(tmp_path / "a.pt2").module()(*x), dense)
    traced = torch.jit.load(tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    assert close(traced(*x), dense)


def test_gradients_are_refused() -> None:
    layer = pack(attention())
    query, key, value = inputs(layer)[0]
    with pytest.raises(
        RuntimeError, match=r"forward-mode differentiation: .*restore\(model\) before training"
    ):
        layer(query, key, value)[0].sum().backward()


def test_what_cannot_be_packed_by_hand() -> None:
    with pytest.raises(
        ValueError, match="activation: expected None for a layer of class MultiheadAttention; got 'relu'"
    ):
        pack(attention(), activation="relu")
    with pytest.raises(TypeError, match="expected a dense one; got a packed MultiheadAttention"):
        pack(pack(attention()))
    with pytest.raises(
        TypeError, match=r"MultiheadAttention or recurrent layer; got a Bilinear; leave it dense"
    ):
        pack(nn.Bilinear(4, 4, 4))


class Crossing(nn.Module):
    """Attention to itself, to something else, and to both."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, HEADS)
        self.other = nn.MultiheadAttention(WIDTH, HEADS)
        self.both = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.own(x, x, value=x)[0]
        x = self.other(x, key=memory, value=memory)[0]
        x = self.both(query=x, key=x, value=x)[0]
        return self.both(x, memory, memory, need_weights=False)[0]  # type: ignore[no-any-return]


def test_projections_are_one_product_where_they_can_be() -> None:
    model = pruned(Crossing())
    example = (torch.randn(5, 2, WIDTH), torch.randn(7, 2, WIDTH))
    report = check_round_trip(model, example)
    assert [r.inputs for r in report.layers] == [(((5, 2, 16), n),) for n in (1, 1, 2)]
    accelerate(model, example)
    groups = [packed(model, name).packed.groups for name in ("own", "other", "both")]
    assert groups == [1, 3, 3]


def test_only_projections_with_zeros_are_packed() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)).eval()
    with torch.no_grad():
        weight = model.get_parameter("0.self_attn.out_proj.weight")
        weight.mul_(torch.rand_like(weight) > 0.7)
    report = check_round_trip(model, torch.randn(2, 5, WIDTH))
    attends = row(report, "0.self_attn")
    assert attends.swapped
    assert attends.shape == (WIDTH, WIDTH)
    assert attends.dense_bytes == weight.nbytes
    assert report.swapped == 1
    assert row(report, "0.linear1").reason == "too few zeros"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m, ""),
        (lambda m: m.double(), "its weight is float64"),
        (lambda m: m.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda m: m.out_proj.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda m: parametrizations.weight_norm(m, "in_proj_weight"), ""),
        (lambda m: parametrizations.spectral_norm(m.out_proj), ""),
        (lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.8), ""),  # type: ignore[no-untyped-call]
        (lambda m: [nn.init.ones_(w) for w in (m.in_proj_weight, m.out_proj.weight)], "too few zeros"),
    ],
)
def test_it_is_packed_or_left_with_a_reason(change: Callable[[Any], object], reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x: Tensor) -> Sequence[Tensor]:
            return self.attention(x, x, x)  # type: ignore[no-any-return]

    model = pruned(Net(), sparsity=0.5)
    with torch.no_grad():
        change(model.attention)
    x = torch.randn(5, 2, WIDTH, dtype=model.get_parameter("attention.in_proj_bias").dtype)
    dense, before = model(x), {name: id(p) for name, p in model.named_parameters()}
    report = accelerate(model, x)
    assert [(r.name, r.kind, r.reason) for r in report.layers] == [
        ("attention", "MultiheadAttention", reason)
    ]
    assert close(model(x), dense)
    assert restore(model) == report.swapped == (0 if reason else 1)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert close(model(x), dense)


def test_attention_needs_examples() -> None:
    report = accelerate(pruned(nn.TransformerEncoderLayer(WIDTH, HEADS, 32)))
    assert {r.name: r.reason for r in report.layers} == {
        "self_attn": "needs example_inputs",
        "linear1": "",
        "linear2": "",
    }


def test_attention_that_gains_nothing_stays_dense(clock: Clock) -> None:
    clock.gains = {"self_attn": 1.0}
    layer = pruned(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True))
    report = check_round_trip(layer, torch.randn(2, 5, WIDTH))
    assert [(r.name, r.swapped) for r in report.layers] == [
        ("self_attn", False),
        ("linear1", True),
        ("linear2", True),
    ]
