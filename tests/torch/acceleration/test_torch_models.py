from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize, prune
from torch_cases import Clock, check_round_trip, mlp, packed, pruned, row, state
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import torch
from sparsam.torch import restore
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.fc.weight
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.fc(self.embedding(ids)).tanh()))  # type: ignore[no-any-return]


def test_tied_weights() -> None:
    model = pruned(Tied())
    ids = torch.randint(0, 20, (2, 5))
    assert check_round_trip(model, ids).swapped == 3
    report = accelerate(model, ids)
    fc, again, head = (packed(model, name) for name in ("fc", "again", "head"))
    assert fc.layer.weight is again.layer.weight
    assert fc.weight.original is not None
    assert fc.weight.original.numel() == 0  # freed
    assert head.weight.original is model.get_parameter("embedding.weight")
    assert model.get_parameter("embedding.weight").shape == (20, 16)  # not freed
    embedding, biases = 4 * 20 * 16, 2 * 4 * 16
    assert report.weights_before == embedding + 4 * 16 * 16 + biases
    assert report.weights_after == embedding + biases + fc.packed.nbytes + head.packed.nbytes
    model.load_state_dict(model.state_dict())
    restore(model)
    assert model.get_submodule("fc").weight is model.get_submodule("again").weight


def test_a_tied_layer_that_stays_dense_keeps_the_weight(clock: Clock) -> None:
    model = pruned(Tied())
    clock.gains = {"again": 1.0}
    check_round_trip(model, torch.randint(0, 20, (2, 5)))
    accelerate(model, torch.randint(0, 20, (2, 5)))
    assert model.get_parameter("again.weight").shape == (16, 16)


def test_a_weight_that_something_else_holds_is_not_freed() -> None:
    model = mlp()
    optimizer = torch.optim.SGD([model.get_parameter("2.weight")])
    report = accelerate(model, torch.randn(5, 24))
    first, second = packed(model, "0"), packed(model, "2")
    assert first.weight.original.numel() == 0  # type: ignore[union-attr]
    assert second.weight.original.numel() == 32 * 16  # type: ignore[union-attr]
    sizes = first.packed.nbytes + second.packed.nbytes
    assert report.weights_after == sizes + 4 * (32 + 32 * 16 + 16)
    assert len(optimizer.param_groups) == 1


def test_freed_weights_are_freed() -> None:
    model = mlp()
    storages: list[Any] = [
        StorageWeakRef(model.get_parameter(f"{i}.weight").untyped_storage())  # type: ignore[no-untyped-call]
        for i in (0, 2)
    ]
    assert not any(storage.expired() for storage in storages)
    accelerate(model, torch.randn(5, 24))
    assert all(storage.expired() for storage in storages)


def test_weights_pruned_by_torch() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    for name in ("0", "2"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.8)  # type: ignore[no-untyped-call]
    prune.random_unstructured(model.get_submodule("2"), "bias", 0.5)  # type: ignore[no-untyped-call]
    x = torch.randn(5, 24)
    with torch.no_grad():
        dense = model(x)
        hooks = [id(hook) for hook in model[0]._forward_pre_hooks.values()]
        before = {name: id(p) for name, p in model.named_parameters()}
        report = accelerate(model, x)
        assert report.swapped == 2
        assert report.layers[0].density == pytest.approx(0.2, abs=0.01)
        assert float(difference(model(x), dense) or 0) < 1e-5
        restored = copy.deepcopy(model)
        for other in (restored, model):
            assert restore(other) == 2
            assert torch.equal(other(x), dense)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [id(hook) for hook in model[0]._forward_pre_hooks.values()] == hooks
    model(x).sum().backward()
    assert model.get_parameter("0.weight_orig").grad is not None
    assert accelerate(model).swapped == 2


def test_parametrized_weights() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.get_buffer("mask")

    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Conv1d(1, 4, 3))
    model.forward = lambda x: model[2](model[1](model[0](x))[:, None])  # type: ignore[method-assign]
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        mask = (torch.rand_like(layer.weight) > 0.7).float()  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", Masked(mask))
    x = torch.randn(5, 24)
    with torch.no_grad():
        dense = model(x)
        report = accelerate(model, x)
        assert [r.kind for r in report.layers] == ["Linear", "Conv1d"]
        assert report.swapped == 2
        assert float(difference(model(x), dense) or 0) < 1e-5
        restore(model)
        assert torch.equal(model(x), dense)
    assert parametrize.is_parametrized(model[0], "weight")


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu", norm_first=norm_first)
    model = pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    x = torch.randn(2, 6, 32)
    report = check_round_trip(model, x)
    assert [r.name for r in report.layers if r.swapped] == [
        f"layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn", "linear1", "linear2")
    ]
    attention = row(report, "layers.0.self_attn")
    assert (attention.kind, attention.shape) == ("MultiheadAttention", (96, 32))
    assert attention.inputs == (((2, 6, 32), 1),)
    assert attention.dense_bytes == 4 * 4 * 32 * 32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_with_padding() -> None:
    model = pruned(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    example = {"src": torch.randn(2, 6, 32), "src_key_padding_mask": padding}
    before = state(model)
    report = accelerate(model, example)
    assert state(model) == before
    assert "set_fastpath_enabled(False)" in report.summary
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert check_round_trip(model, example).swapped == 6
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    accelerate(model, example["src"])
    with torch.no_grad():
        assert model(**example).shape == (2, 6, 32)


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    return BertModel(config)


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "fused", "swapped"),
    [(bert, {"gelu": 2}, 13), (gpt2, {"gelu_tanh": 2}, 9), (llama, {"silu": 2}, 15)],
)
def test_hugging_face(build: Callable[[], nn.Module], fused: dict[str, int], swapped: int) -> None:
    model = pruned(build())
    ids = torch.randint(0, 50, (2, 7))
    report = check_round_trip(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert report.swapped == swapped
    found = [r.activation for r in report.layers if r.activation]
    assert {name: found.count(name) for name in set(found)} == fused


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_hugging_face_with_a_cache_that_grows() -> None:
    model = pruned(llama())
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        example = {"input_ids": ids[:, :1], "past_key_values": cache}
        report = accelerate(model, [example, {"input_ids": ids}])
        assert cache.get_seq_length() == 6
        ours = model(ids).logits
        restore(model)
        assert float(difference(ours, model(ids).logits) or 0) < 1e-5
    assert report.swapped == 15
    assert ((1, 1, 32), 1) in row(report, "model.layers.0.mlp.up_proj").inputs
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"got a DynamicCache that cannot .*no_grad"):
        accelerate(model, {"input_ids": ids[:, :1], "past_key_values": cache})
