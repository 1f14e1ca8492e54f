"""Attention by the core in PyTorch, and as an attention of Hugging Face transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from huggingface_models import VOCABULARY, bert, gpt2, llama
from torch.nn import functional
from torch_cases import pruned
from transformers import AutoModel, BertModel, BloomConfig, GPT2LMHeadModel, LlamaForCausalLM

import torch
from sparsam.torch import pack
from sparsam.torch.layers import attention
from sparsam.torch.layers.attention import attend
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE: dict[str, Any] = {"atol": 2e-6, "rtol": 2e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(queries: int = 9, keys: int = 21, depth: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Of 2 sequences and 3 heads, as projections leave them."""
    return tuple(
        draw(2, n, 3, depth, seed=n + i).transpose(1, 2) for i, n in enumerate((queries, keys, keys))
    )  # type: ignore[return-value]


def masks(queries: int = 9, keys: int = 21) -> dict[str, Tensor | None]:
    kept = draw(2, 1, 1, keys) > 0
    none = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    none[:, :, 1] = False
    return {
        "none": None,
        "padding": kept,
        "each": draw(2, 3, queries, keys) > 0,
        "empty row": none,
        "added": draw(1, 3, queries, keys),
        "shifted": draw(2, 3, keys, queries).transpose(2, 3),
        "causal": torch.full((queries, keys), -torch.inf).triu(1)[None, None],
    }


@pytest.mark.parametrize("name", masks())
def test_is_what_pytorch_computes(name: str) -> None:
    q, k, v = tensors()
    mask = masks()[name]
    found = attend(q, k, v, mask)
    assert found is not None
    assert found.is_contiguous()
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found, wanted, **CLOSE)
    scaled = attend(q, k, v, mask, 0.5)
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(scaled, wanted, **CLOSE)


def test_any_memory() -> None:
    q, k, v = (x.contiguous() for x in tensors())
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    wanted = attend(q, k, v)
    assert torch.equal(attend(*turned), wanted)  # type: ignore[arg-type]


def test_what_it_leaves_to_pytorch() -> None:
    q, k, v = tensors()
    assert attend(q.double(), k.double(), v.double()) is None
    assert attend(q[..., :24], k[..., :24], v[..., :24]) is None
    assert attend(q, k[:, :1], v[:, :1]) is None  # groups of queries
    assert attend(q, k, v[..., :16]) is None
    assert attend(q[0], k[0], v[0]) is None
    assert attend(q, k, v, torch.ones(9, 21, dtype=torch.bool)) is None
    assert attend(q, k, v, torch.ones(2, 1, 1, 21, dtype=torch.int64)) is None
    assert attend(q.requires_grad_(), k, v) is None
    long = tensors(keys=attention._LONGEST + 1)
    assert attend(*long) is None
    q, k, v = tensors()
    with torch.autocast("cpu"):
        assert attend(q, k, v) is None

    def is_computed(x: Tensor) -> Tensor:
        return torch.zeros(()) if attend(x, k, v) is None else torch.ones(())

    mapped: Any = torch.vmap(is_computed)
    assert not mapped(q[None]).any()


def test_operator() -> None:
    q, k, v = tensors()
    for mask in masks().values():
        torch.library.opcheck(torch.ops.sparsam.attention, (q, k, v, mask, 0.5))


@pytest.mark.parametrize("masked", [False, True])
def test_packed_attention_layer_computes_with_it(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = pruned(nn.MultiheadAttention(32, 2, batch_first=True)).eval()
    x, padding = draw(3, 10, 32), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 6:] = masked
    options: dict[str, Any] = {"need_weights": False, "key_padding_mask": padding if masked else None}
    calls = []
    run = attention._attend

    def counted(*args: Any) -> Tensor:
        calls.append(0)
        return run(*args)

    monkeypatch.setattr(attention, "_attend", counted)
    with torch.no_grad():
        wanted = layer(x, x, x, **options)[0]
        assert not calls
        pack(layer)
        torch.testing.assert_close(layer(x, x, x, **options)[0], wanted, **CLOSE)
        assert len(calls) == 1
        layer(x, x, x)  # whose weights are asked for
        assert len(calls) == 1


def models() -> dict[str, Any]:
    return {
        "bert": BertModel(bert()),
        "gpt2": GPT2LMHeadModel(gpt2()),
        "llama": LlamaForCausalLM(llama()),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_models_of_transformers(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = models()[name].eval()
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    if padded:
        seen[1, 7:] = 0
    calls: list[Tensor | None] = []
    run = attention._attend

    def counted(*args: Any) -> Tensor:
        calls.append(args[3])
        return run(*args)

    monkeypatch.setattr(attention, "_attend", counted)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=seen)[0]
        assert not calls
        model.set_attn_implementation("sparsam_sdpa")
        copied = copy.deepcopy(model)
        for one in (model, copied):
            found = one(input_ids=ids, attention_mask=seen)[0]
            torch.testing.assert_close(found[seen.bool()], wanted[seen.bool()], atol=1e-5, rtol=1e-4)
    heads_fit = name != "llama"  # which has fewer heads of keys than of queries
    causal_alone = name == "gpt2" and not padded  # PyTorch's own causal attention needs no mask
    assert len(calls) == (4 if heads_fit and not causal_alone else 0)
    assert all((mask is not None) is padded for mask in calls)


def test_compiled_model_has_the_operator() -> None:
    torch.manual_seed(0)
    model: Any = BertModel(bert())
    model.eval()
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("sparsam_sdpa")
    with torch.no_grad():
        wanted = model(input_ids=ids).last_hidden_state
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids).last_hidden_state, wanted, **CLOSE)


def test_models_that_compute_more_than_attention_are_refused() -> None:
    """Bloom adds biases of its own to its scores, and takes no mask as PyTorch's function does."""
    make: Any = AutoModel.from_config  # not typed
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="BloomModel does not support an attention implementation through"):
        make(config, attn_implementation="sparsam_sdpa")


class Attends(nn.Module):
    """Attention between parts of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.projection(x).view(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4)
        found = attend(parts[0], parts[1], parts[2])
        return (
            functional.scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2)
            if found is None
            else found
        )


def exported(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        program: Any = torch.export.export(model, (x,))
    assert "sparsam.attention" in str(program.graph)
    return program.module()


def test_an_exported_program_runs_with_other_tensors_than_it_was_traced_with() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), draw(2, 9, 48)
    program = exported(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(program(x).float(), model(x).float(), atol=0.05, rtol=0.05)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        q, k, v = (part.to(dtype) for part in tensors())
        wanted = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(torch.ops.sparsam.attention(q, k, v, None, 32**-0.5), wanted)


def test_an_exported_program_has_no_silent_gradient() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), draw(2, 9, 48)
    with pytest.raises(RuntimeError, match="backward or forward-mode differentiation: expected dense layers"):
        exported(model, x)(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("masked", [False, True])
def test_export_with_a_length_that_varies(masked: bool) -> None:
    torch.manual_seed(0)
    layer = pruned(nn.MultiheadAttention(32, 2, batch_first=True)).eval()
    pack(layer)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            found: Tensor = self.layer(
                x, x, x, need_weights=False, key_padding_mask=padding if masked else None
            )[0]
            return found

    length = torch.export.Dim("length", min=2, max=4000)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, 15:] = True
    model = Masked().eval()
    with torch.no_grad():
        program: Any = torch.export.export(
            model, (draw(2, 20, 32), padding), dynamic_shapes=({1: length}, {1: length})
        )
        for n in (20, 33, 600):  # the last is computed by PyTorch
            x, more = draw(2, n, 32), torch.zeros(2, n, dtype=torch.bool)
            more[0, n // 2 :] = True
            torch.testing.assert_close(program.module()(x, more), model(x, more), **CLOSE)


def test_gradients_of_functions_that_are_compiled() -> None:
    q, k, v = tensors()

    def loss(query: Tensor) -> Tensor:
        found = attend(query, k, v)
        if found is None:
            found = functional.scaled_dot_product_attention(query, k, v).transpose(1, 2)
        return found.square().sum()

    gradient = torch.func.grad(loss)
    torch._dynamo.reset()
    compiled: Any = torch.compile(gradient, backend="eager", fullgraph=True)
    assert bool(gradient(q).abs().sum() > 0)
    torch.testing.assert_close(compiled(q), gradient(q), **CLOSE)
