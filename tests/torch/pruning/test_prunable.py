"""Which weights of real classes can be pruned, and why others stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sparsam.torch
import torch
from sparsam.torch import pack
from sparsam.torch.pruning.prunable import prunable_weights
from torch import Tensor, nn


def found(model: nn.Module, **options: Any) -> dict[str, tuple[str, bool, int]]:
    weights, dense = prunable_weights(model, **options)
    state = model.state_dict()
    matrices = {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.ndim > 1}
    for weight in weights:
        assert weight.parameter is model.get_parameter(weight.name)
        assert weight.module._parameters[weight.attribute] is weight.parameter
        assert weight.name in state
    names = [weight.name for weight in weights]
    assert len(set(names)) == len(names)
    assert set(names).isdisjoint(dense)
    assert {*names, *dense} >= matrices - {name for name in matrices if "bias" in name}
    return {weight.name: (weight.kind, weight.transposed, weight.groups) for weight in weights}


def test_linear_layers_and_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv1d(8, 4, 3),
        nn.Linear(4, 2),
    )
    assert found(model) == {
        "0.weight": ("convolution", False, 1),
        "2.weight": ("convolution", False, 4),
        "3.weight": ("convolution", False, 1),
        "4.weight": ("linear", False, 1),
    }


def test_other_kinds_stay_dense_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 2)
            self.pairs = nn.Bilinear(3, 4, 5)
            self.experts = nn.Parameter(torch.zeros(4, 3, 3))
            self.positions = nn.Parameter(torch.zeros(4, 3))
            self.table = nn.Embedding(7, 3)
            self.bag = nn.EmbeddingBag(7, 3)
            self.rnn = nn.LSTM(4, 6, proj_size=2)
            self.empty = nn.Linear(1, 1)
            self.empty.weight = nn.Parameter(torch.zeros(0, 1))
            self.norm = nn.LayerNorm((2, 3))

    weights, dense = prunable_weights(Odd())
    assert [weight.name for weight in weights] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert dense == {
        "positions": "parameter of Odd, which is no linear layer or convolution",
        "experts": "4 matrices in one Parameter",
        "up.weight": "no method for ConvTranspose2d",
        "pairs.weight": "5 matrices in one Parameter",
        "table.weight": "embedding",
        "bag.weight": "embedding",
        "rnn.weight_hr_l0": "weight_hr_l0 of LSTM: the inputs of a projection of hidden states are not seen",
        "empty.weight": "no weights",
        "norm.weight": "parameter of LayerNorm, which is no linear layer or convolution",
    }


def test_attention() -> None:
    assert found(nn.MultiheadAttention(8, 2)) == {
        "in_proj_weight": ("attention", False, 1),
        "out_proj.weight": ("attention", False, 1),
    }
    names = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert found(nn.MultiheadAttention(8, 2, kdim=4, vdim=6)).keys() == names
    assert set(found(nn.TransformerEncoderLayer(8, 2, 16))) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    }  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    names = [f"weight_{what}_l{i}{end}" for i in (0, 1) for end in ("", "_reverse") for what in ("ih", "hh")]
    recurrent = ("recurrent", False, 1)
    assert found(kind(4, 6, num_layers=2, bidirectional=True)) == dict.fromkeys(names, recurrent)
    assert found(nn.LSTMCell(4, 6)) == {"weight_ih": recurrent, "weight_hh": recurrent}


def test_bert() -> None:
    sizes: Any = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 512,
    }
    config = BertConfig(**sizes, vocab_size=64, max_position_embeddings=512)
    names = set(found(BertForSequenceClassification(config)))
    assert len(names) == 2 * 6 + 2
    assert {"bert.pooler.dense.weight", "classifier.weight"} < names
    assert "bert.encoder.layer.1.intermediate.dense.weight" in names  # of the shape of the positions
    _, dense = prunable_weights(BertForMaskedLM(config))
    head = dense["cls.predictions.decoder.weight"]
    assert head == "shared with the embedding bert.embeddings.word_embeddings"
    assert dense["bert.embeddings.position_embeddings.weight"] == "embedding"


def test_gpt2_is_transposed() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=64, n_positions=32))
    weights = found(model)
    assert set(weights.values()) == {("linear", True, 1)}
    assert len(weights) == 2 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_heads_of_language_models(tied: bool) -> None:
    sizes: Any = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, intermediate_size=24, vocab_size=64, tie_word_embeddings=tied
    )
    weights, dense = prunable_weights(LlamaForCausalLM(config))
    assert len(weights) == 2 * 7
    embedding = "shared with the embedding model.embed_tokens"
    assert dense["lm_head.weight"] == (embedding if tied else "head of a language model")


def test_a_head_of_a_model_that_does_not_say_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 50), nn.Linear(50, 8)])
            self.out = nn.Linear(8, 50)

    weights, dense = prunable_weights(Model())
    assert [weight.name for weight in weights] == ["layers.0.weight", "layers.1.weight"]
    assert dense["out.weight"] == "head of a language model"


def test_t5() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    weights, dense = prunable_weights(T5ForConditionalGeneration(config))
    assert len(weights) == 2 * 6 + 2 * 10
    assert all("relative_attention_bias" not in weight.name for weight in weights)
    assert dense["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == "embedding"


def test_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[3] = model[0]
    weights, dense = prunable_weights(model)
    assert [weight.name for weight in weights] == ["0.weight"]
    assert dense == {"2.weight": "the same as 0.weight"}


def test_exclude() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    assert set(found(model, exclude=("head", "body.0.weight"))) == {"body.1.weight"}
    assert set(found(model, exclude=("body.*",))) == {"head.weight"}
    with pytest.warns(UserWarning, match=r"exclude: expected names .*; got 'nose', which matches none"):
        prunable_weights(model, exclude=("nose",))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def packed_layer() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight.data[np.random.default_rng(0).random((16, 16)) < 0.8] = 0
    return pack(layer)


def parametrized_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def sparse_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to_sparse())
    return layer


def integer_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def old_norm(name: str, layer: nn.Module, weight: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch prefers parametrizations
        result: nn.Module = getattr(nn.utils, name)(layer, weight)
    return result


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "packed": (packed_layer, "a packed one; call sparsam.torch.restore"),
    "parametrized": (parametrized_layer, "one computed by a parametrization; call torch.nn.utils"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "one computed by a parametrization",
    ),
    "torch's pruning": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),  # type: ignore[no-untyped-call]
        r"one that torch.nn.utils.prune computes; call torch.nn.utils.prune.remove\(module, 'weight'\)",
    ),
    "weight norm by a hook": (
        lambda: old_norm("weight_norm", nn.Linear(4, 4)),
        r"one that torch.nn.utils.weight_norm computes; call torch.nn.utils.remove_weight_norm\(module, 'we",
    ),
    "spectral norm by a hook": (
        lambda: old_norm("spectral_norm", nn.Linear(4, 4)),
        r"one that torch.nn.utils.spectral_norm computes; call torch.nn.utils.remove_spectral_norm\(modul",
    ),
    "sparse": (sparse_layer, "one of the layout sparse_coo; make it dense"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "one on the meta device, which has no values"),
    "lazy": (lambda: nn.LazyLinear(4), "one without a shape; run the model once"),
    "integers": (integer_layer, "one of int8; convert it"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_pruned_as_it_is(case: str) -> None:
    make, wanted = OBSTACLES[case]
    model = nn.Sequential(make(), nn.Linear(4, 4))
    got = f"weight '0.weight': expected a dense floating-point Parameter; got {wanted}"
    with pytest.raises(ValueError, match=got):
        prunable_weights(model)
    weights, dense = prunable_weights(model, exclude=("0",))
    assert [weight.name for weight in weights] == ["1.weight"]
    assert dense["0.weight"] == "excluded"


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_advice_on_norms_by_hooks_works(name: str) -> None:
    for layer, weight in (
        (nn.Linear(4, 6), "weight"),
        (nn.Conv1d(4, 6, 3), "weight"),
        (nn.LSTM(4, 6), "weight_hh_l0"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
    ):
        plain = {*found(nn.Sequential(layer))}
        module = old_norm(name, layer, weight)
        with pytest.raises(
            ValueError, match=rf"call torch.nn.utils.remove_{name}\(module, '{weight}'\) first"
        ):
            prunable_weights(nn.Sequential(module))
        getattr(nn.utils, f"remove_{name}")(module, weight)
        assert {*found(nn.Sequential(module))} == plain


@pytest.mark.parametrize("call", [prunable_weights, sparsam.torch.prune, sparsam.torch.find_smallest])
def test_a_state_dict_is_no_model(call: Any) -> None:
    options = {"eval_fn": len, "max_drop": 0.1} if call is sparsam.torch.find_smallest else {}
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got OrderedDict"):
        call(nn.Linear(4, 4).state_dict(), **options)
