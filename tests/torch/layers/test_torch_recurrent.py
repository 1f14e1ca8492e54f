"""LSTM, GRU, RNN and their cells compute with packed weights what they did."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch.nn.utils import parametrize, prune, rnn
from torch_cases import Clock, check_round_trip, packed, pruned, row, state

import torch
from sparsam.torch import PackedTensor, pack, restore
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.layers import recurrent
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

IN, HIDDEN = 21, 19

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "projected": partial(nn.LSTM, proj_size=11),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}
CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": partial(nn.RNNCell, nonlinearity="relu"),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def pair(layer: nn.Module) -> tuple[Any, Any]:
    """The layer with many zeros, and a copy with packed weights."""
    dense = pruned(layer)
    return dense, pack(copy.deepcopy(dense))


def tensors(found: Any) -> list[Tensor]:
    """What a layer returned, as a list."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found if part is not None for tensor in tensors(part)]


@torch.no_grad()
def check(dense: Any, layer: Any, *inputs: Any, tolerance: float = 2e-6) -> None:
    wanted, got = tensors(dense(*inputs)), tensors(layer(*inputs))
    assert len(wanted) == len(got)
    for one, other in zip(wanted, got, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance)


def states(layer: Any, batch: int) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(count, batch, layer.hidden_size)) if layer.mode == "LSTM" else h


@pytest.fixture
def nothing_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core computes, not PyTorch with dense weights."""
    monkeypatch.setattr(PackedTensor, "to_dense", lambda *_: pytest.fail("unpacked"))


by_the_core = pytest.mark.usefixtures("nothing_unpacked")


@by_the_core
@each_layer
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers(kind: str, both: bool, bias: bool, batch_first: bool) -> None:
    options = {"bidirectional": both, "bias": bias, "batch_first": batch_first, "num_layers": 2}
    dense, layer = pair(LAYERS[kind](IN, HIDDEN, **options))
    assert all(type(w) is PackedTensor for name, w in layer.named_parameters() if "weight" in name)
    x = torch.randn(5, 7, IN)
    check(dense, layer, x)
    check(dense, layer, x, states(layer, 5 if batch_first else 7))
    check(dense, layer, x[0])
    check(dense, layer, torch.randn(7, 5, IN).transpose(0, 1))
    lengths = [3, 7, 1, 7, 4]
    sequences = [torch.randn(n, IN) for n in lengths]
    check(dense, layer, rnn.pack_sequence(sequences, enforce_sorted=False))
    check(dense, layer, rnn.pack_sequence(sequences, enforce_sorted=False), states(layer, 5))


@by_the_core
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [False, True])
def test_cells(kind: str, bias: bool) -> None:
    dense, layer = pair(CELLS[kind](IN, HIDDEN, bias=bias))
    h = torch.randn(3, HIDDEN)
    check(dense, layer, torch.randn(3, IN))
    check(dense, layer, torch.randn(3, IN), (h, torch.randn(3, HIDDEN)) if kind == "lstm" else h)
    check(dense, layer, torch.randn(IN))


@by_the_core
@each_layer
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("hidden", [16, 19])
def test_every_row_of_kernels(kind: str, hidden: int, isa: str) -> None:
    dense, layer = pair(LAYERS[kind](8, hidden))
    check(dense, layer, torch.randn(3, 5, 8))


@by_the_core
def test_threads(threads: int) -> None:
    dense, layer = pair(nn.LSTM(8, 300))
    check(dense, layer, torch.randn(3, 70, 8), tolerance=4e-6)


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
def test_what_is_not_finite(name: str, isa: str) -> None:
    dense, layer = pair(CELLS[name](4, 4, bias=False))
    rows = torch.tensor([[torch.nan, 0, 1, 2], [1e30, -1e30, 1e30, 1], [0, 0, 0, 0], [-200, 300, 90, -90]])
    # Where a weight is pruned, the dense product is NaN and the packed one is not.
    counts = torch.tensor([[True, False, False, False]] + 3 * [4 * [True]])
    with torch.no_grad():
        for weight in (dense.weight_ih, dense.weight_hh):
            weight.copy_(torch.eye(4).repeat(len(weight) // 4, 1))
        layer.weight_ih.copy_(dense.weight_ih)
        layer.weight_hh.copy_(dense.weight_hh)
        wanted, got = tensors(dense(rows)), tensors(layer(rows))
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other[counts], one[counts], rtol=1e-6, atol=2e-6, equal_nan=True)


@by_the_core
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_narrow_numbers(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    dense, layer = pair(LAYERS[kind](IN, HIDDEN, bidirectional=True).to(dtype))
    check(dense, layer, torch.randn(4, 3, IN, dtype=dtype), tolerance=tolerance)


@by_the_core
def test_dropout_between_layers_while_training() -> None:
    layer = pack(pruned(nn.GRU(IN, HIDDEN, 2, dropout=0.5))).train()
    x = torch.randn(4, 3, IN)
    with torch.no_grad():
        assert not torch.equal(layer(x)[0], layer(x)[0])
        assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_one_dense_matrix_of_the_state_makes_it_dense() -> None:
    dense, layer = pair(nn.LSTM(IN, HIDDEN))
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.to_dense())
    check(dense, layer, torch.randn(4, 3, IN))


@by_the_core
def test_a_dense_matrix_of_the_input_may_stay() -> None:
    dense, layer = pair(nn.LSTM(IN, HIDDEN))
    layer.weight_ih_l0 = nn.Parameter(dense.weight_ih_l0.detach().clone())
    check(dense, layer, torch.randn(4, 3, IN))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gradients_are_refused(kind: str) -> None:
    layer: Any = pack(pruned(LAYERS[kind](IN, HIDDEN)))
    y, after = layer(torch.randn(4, 3, IN))
    for result in (y, *tensors(after)):
        with pytest.raises(
            RuntimeError, match=r"forward-mode differentiation: .*restore\(model\) before training"
        ):
            result.sum().backward()
    layer.requires_grad_(requires_grad=False)
    assert not layer(torch.randn(4, 3, IN))[0].requires_grad


@each_layer
def test_state_of_a_layer(kind: str) -> None:
    layer: Any = pruned(LAYERS[kind](IN, HIDDEN, 2, bidirectional=True))
    before = state(layer)
    pack(layer)
    assert {k: v.numpy().tobytes() for k, v in layer.state_dict().items()} == before["values"]
    restore(layer)
    assert state(layer) == before
    assert all(type(weight) is nn.Parameter for weight in layer._flat_weights)


def test_copies_compute_the_same() -> None:
    layer: Any = pack(pruned(nn.LSTM(IN, HIDDEN, 2)))
    x = torch.randn(4, 3, IN)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
        layer.to(torch.float32),
    ):
        assert all(any(w is p for p in other.parameters()) for w in other._flat_weights)
        with torch.no_grad():
            assert torch.equal(layer(x)[0], other(x)[0])
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2.0)
        assert not torch.equal(layer(x)[0], other(x)[0]) or other is layer
        narrow = copy.deepcopy(layer).to(torch.bfloat16)
        torch.testing.assert_close(narrow(x.bfloat16())[0].float(), layer(x)[0], rtol=0, atol=3e-2)


def test_weights_that_torchs_pruning_computes(clock: Clock) -> None:
    layer: Any = nn.LSTM(IN, HIDDEN).eval()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(layer, name, 0.75)  # type: ignore[no-untyped-call]
    x = torch.randn(4, 3, IN)
    with torch.no_grad():
        wanted = layer(x)[0]
        report = accelerate(nn.Sequential(layer), x)
        assert row(report, "0").swapped
        torch.testing.assert_close(layer(x)[0], wanted, rtol=0, atol=2e-6)
        restore(layer)
        assert torch.equal(layer(x)[0], wanted)


def test_weights_that_a_parametrization_computes_stay_dense() -> None:
    layer = nn.LSTM(IN, HIDDEN)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    report = accelerate(nn.Sequential(pruned(layer)))
    assert row(report, "0").reason == "its weights are computed by torch.nn.utils.parametrize"


class Tagger(nn.Module):
    """Reads sequences of several lengths, with a state of its own for the first step."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.net = kind(IN, HIDDEN, 2, bidirectional=True)
        self.cell = nn.GRUCell(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed_steps = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = rnn.pad_packed_sequence(self.net(packed_steps)[0])
        return self.cell(y[0], y[-1, :, :HIDDEN])  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_accelerate(kind: Callable[..., nn.RNNBase], clock: Clock) -> None:
    model = pruned(Tagger(kind))
    inputs = torch.randn(6, 4, IN), torch.tensor([6, 2, 5, 1])
    check_round_trip(model, inputs)
    report = accelerate(model, inputs)
    assert packed(model, "net").density < 0.5 > packed(model, "cell").density
    assert row(report, "net").inputs == (((14, IN), 1),)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.0._flat_weights")
def test_export(clock: Clock) -> None:
    model = pruned(nn.Sequential(nn.LSTM(IN, HIDDEN)))
    x = torch.randn(4, 3, IN)
    accelerate(model, x)
    with torch.no_grad():
        exported: Any = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x)[0], model(x)[0], rtol=0, atol=2e-6)


def test_all_of_a_layer_or_nothing(clock: Clock) -> None:
    layer: Any = nn.LSTM(IN, HIDDEN).eval()
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    assert row(accelerate(nn.Sequential(layer)), "0").reason == "needs example_inputs"
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
    assert row(accelerate(nn.Sequential(layer)), "0").reason == "too few zeros"


def test_what_the_core_refuses() -> None:
    layer: Any = pack(pruned(nn.LSTM(IN, HIDDEN)))
    h = torch.zeros(1, 2, HIDDEN)
    weights = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    run = recurrent.HANDLERS[torch.lstm]
    with torch.no_grad(), pytest.raises(ValueError, match=r"h: expected shape \(3, 19\); got \(2, 19\)"):
        run(torch.zeros(4, 3, IN), (h, h), weights, True, 1, 0.0, False, False, False)
    wrong = [layer.weight_ih_l0, layer.weight_ih_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    h = torch.zeros(1, 3, IN)
    c = torch.zeros(1, 3, HIDDEN)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="weights: expected those of one layer with 4 gates"),
    ):
        run(torch.zeros(4, 3, IN), (h, c), wrong, True, 1, 0.0, False, False, False)
