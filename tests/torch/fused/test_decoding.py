"""Decoder layers that compute one position in two calls of the core, with the cache between them."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fused_models import counted, fused_names
from torch_cases import pruned
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

import torch
from sparsam import _core
from sparsam.torch import accelerate, load, restore, save
from sparsam.torch.fused import decoding_forward
from sparsam.torch.fused.installation import unfuse
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fusing", "one_thread")

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LAYERS = ("model.layers.0", "model.layers.1")
MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "all heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "one head of keys": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1})),
    "short heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 8})),  # PyTorch's attention
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 48})),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "attention_bias": True, "mlp_bias": True})),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "window of 4": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
}


def made(name: str = "Llama", positions: int = 1) -> tuple[Any, Any]:
    """A model that was accelerated with so many positions, and the same before."""
    torch.manual_seed(0)
    model = pruned(MODELS[name]())
    before = copy.deepcopy(model)
    accelerate(model, {"input_ids": torch.ones(1, positions, dtype=torch.int64)}, verbose=False)
    return model, before


def tokens(sequences: int, positions: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (sequences, positions), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decoded(model: Any, x: Tensor, prompt: int, cache: Any = None, **given: Any) -> list[Tensor]:
    """The logits of a prompt, and of each token after it."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [x[:, :prompt], *torch.split(x[:, prompt:], 1, dim=1)]
    return [model(input_ids=one, **{CACHE: cache}, **given).logits for one in parts]


def alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_layers_do(name: str, sequences: int) -> None:
    model, before = made(name)
    assert set(LAYERS) <= {*fused_names(model)}
    x = tokens(sequences, 12)
    with counted() as calls:
        found = decoded(model, x, 5)
    alike(found, decoded(before, x, 5))
    assert calls.computed > 0
    if "window" not in name:  # tokens after that have a mask
        # Each layer and the last norm for a token; for the prompt the norms and MLPs in the layers.
        assert calls.called - calls.computed == 2
        assert calls.computed == 7 * 3 + 7
    with torch.no_grad():
        lines = [one.generate(x[:, :4], max_new_tokens=8, do_sample=False) for one in (model, before)]
    assert torch.equal(*lines)


def test_attention_is_that_of_the_core_as_far_as_scores_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = made()
    x, seen = tokens(2, 12), []
    attend = _core.attention_at

    def noted(*arguments: Any) -> None:
        seen.append(arguments[0][3])
        attend(*arguments)

    monkeypatch.setattr(_core, "attention_at", noted)
    monkeypatch.setattr(decoding_forward, "_LONGEST", 9)
    alike(decoded(model, x, 5), decoded(before, x, 5))
    assert seen == [n for n in range(6, 10) for _ in LAYERS]


def test_values_that_are_rounded() -> None:
    torch.manual_seed(0)
    model = pruned(MODELS["Llama"]())
    one = {"input_ids": torch.ones(1, 1, dtype=torch.int64)}
    accelerate(model, one, values="int8", tolerance=1.0, verbose=False)
    x = tokens(2, 12)
    assert set(LAYERS) <= {*fused_names(model)}
    found = decoded(model, x, 5)
    unfuse(model)
    for a, b in zip(found, decoded(model, x, 5), strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_prompts_alone_fuse_no_layer() -> None:
    model, _ = made(positions=5)
    assert not set(LAYERS) & {*fused_names(model)}
    assert "model.layers.0.mlp" in fused_names(model)


def test_any_cache_is_updated_by_itself() -> None:
    class Doubling(DynamicCache):
        """Shows all keys and values twice, the second time in memory of another order."""

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(*args, **kwargs)
            twice = (torch.cat((one, one), dim=2) for one in (keys, values))
            first, second = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in twice)
            return first, second

    model, before = made()
    for sequences in (1, 2):
        x = tokens(sequences, 9)
        caches: list[Callable[[], Any]] = [
            lambda: Doubling(config=model.config),
            lambda: StaticCache(config=model.config, max_cache_len=16),
        ]
        for cache in caches:
            alike(decoded(model, x, 4, cache()), decoded(before, x, 4, cache()))


def test_padding_is_left_to_the_layers() -> None:
    model, before = made()
    x, cache = tokens(2, 9), [DynamicCache(config=model.config) for _ in range(2)]
    seen = torch.ones(2, 9, dtype=torch.int64)
    seen[1, :3] = 0
    parts = [(0, 5), *((i, i + 1) for i in range(5, 9))]
    for begin, end in parts:
        given = {"input_ids": x[:, begin:end], "attention_mask": seen[:, :end]}
        with torch.no_grad():
            found, wanted = (
                m(**given, **{CACHE: c}).logits for m, c in zip((model, before), cache, strict=True)
            )
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def hook(layer: Any) -> None:
    layer.self_attn.o_proj.register_forward_hook(lambda _, __, y: 2 * y)


def patch(layer: Any) -> None:
    layer.mlp.forward = lambda x: x


def replace(layer: Any) -> None:
    layer.post_attention_layernorm = nn.Identity()


def rescale(layer: Any) -> None:
    layer.self_attn.scaling *= 2


def renorm(layer: Any) -> None:
    layer.input_layernorm.weight.data *= 2


def repack(layer: Any) -> None:
    with torch.no_grad():
        layer.self_attn.v_proj.weight *= 2


@pytest.mark.parametrize("change", [hook, patch, replace, rescale, renorm, repack])
def test_what_is_changed_counts(change: Callable[[Any], None]) -> None:
    model, before = made()
    x = tokens(2, 8)
    decoded(model, x, 3)
    for one in (model, before):
        change(one.model.layers[1])
    alike(decoded(model, x, 3), decoded(before, x, 3))


def test_options_of_a_call_count() -> None:
    model, before = made()
    x = tokens(1, 8)
    shown: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    alike(decoded(model, x, 3, **shown), decoded(before, x, 3, **shown))
    with torch.no_grad():
        found, wanted = (m(input_ids=x[:, :1], use_cache=False).logits for m in (model, before))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    for one in (model, before):
        one.set_attn_implementation("eager")
    alike(decoded(model, x, 3), decoded(before, x, 3))


def test_gradients_are_left_to_the_layers() -> None:
    model, _ = made()
    x = torch.randn(1, 1, 64, requires_grad=True)
    found = model(inputs_embeds=x).logits
    assert found.requires_grad
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=x, **{CACHE: cache})
    layer: Any = cache.layers[0]
    layer.keys.requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = model(inputs_embeds=x.detach(), **{CACHE: cache}).logits
    assert found.requires_grad


def test_saved_copied_and_undone(tmp_path: Path) -> None:
    model, before = made()
    x = tokens(2, 9)
    wanted, names = decoded(model, x, 4), fused_names(model)
    save(model, tmp_path)
    model.save_pretrained(tmp_path / "folder")
    loaded = copy.deepcopy(before)
    load(tmp_path, loaded)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    read: nn.Module = LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    others.append(read.eval())
    for one in others:
        assert fused_names(one) == names
        with counted() as calls:
            found = decoded(one, x, 4)
        assert calls.called - calls.computed == 2
        assert all(map(torch.equal, found, wanted))
        restore(one)
        assert fused_names(one) == ()
        alike(decoded(one, x, 4), decoded(before, x, 4))
