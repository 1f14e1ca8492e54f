"""Sentences of unequal length in one batch: however the model learns which tokens count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch_cases import count_packed, pruned
from transformers import BartConfig, BartModel, BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.utils import logging

import torch
from sparsam.torch import accelerate, prune
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
WORDS, WIDTH, LENGTHS = 50, 32, (3, 7, 5)


def bert() -> nn.Module:
    config = BertConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    return BertModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, pad_token_id=0)  # fmt: skip
    return LlamaModel(config)


def bart() -> nn.Module:
    config = BartConfig(vocab_size=WORDS, d_model=WIDTH, encoder_layers=1, decoder_layers=1, pad_token_id=0,
                        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                        decoder_ffn_dim=64, max_position_embeddings=16)  # fmt: skip
    return BartModel(config)


class Masking(nn.Module):
    """Takes tokens only, and finds out by itself which of them are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids, attention_mask=(input_ids != 0).long()).last_hidden_state
        return hidden


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "bart": bart}
CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a dict": lambda ids, mask: {"input_ids": ids, "attention_mask": mask},
    "by position": lambda ids, mask: (ids, mask),
    "booleans": lambda ids, mask: {"input_ids": ids, "attention_mask": mask.bool()},
    "by the model": lambda ids, _: (ids,),
}


def sentences() -> tuple[Tensor, Tensor]:
    """Tokens with zeros at the end, and which of them count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def hidden(model: nn.Module, inputs: Any) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", MODELS)
def test_accelerated(kind: str, call: str) -> None:
    torch.manual_seed(0)
    dense = pruned(MODELS[kind]())
    if call == "by the model":
        dense = Masking(dense).eval()
    model, (ids, mask) = copy.deepcopy(dense), sentences()
    inputs = CALLS[call](ids, mask)
    report = accelerate(model, inputs, verbose=False)
    assert report.swapped == count_packed(model) == len(report.layers) > 0
    together = hidden(model, inputs)
    torch.testing.assert_close(together[mask.bool()], hidden(dense, inputs)[mask.bool()])
    for row, length in enumerate(LENGTHS):  # as if it were alone, without padding
        alone = CALLS[call](ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], hidden(dense, alone)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pruned_whatever_is_in_the_padding(kind: str) -> None:
    ids, mask = sentences()
    junk = ids.where(mask != 0, 9)
    weights = {}
    calibrations: dict[str, list[Any]] = {
        "a dict": [{"input_ids": ids, "attention_mask": mask}],
        "by position": [(ids, mask)],
        "other padding": [(junk, mask)],
    }
    for what, calibration in calibrations.items():
        torch.manual_seed(0)
        model = MODELS[kind]()
        prune(model, None, calibration, target_sparsity=0.5, method="wanda", exclude="*embed*")
        weights[what] = {name: value for name, value in model.state_dict().items() if value.ndim == 2}
    for name, value in weights.pop("a dict").items():
        assert all(torch.equal(other[name], value) for other in weights.values()), name


def test_a_mask_that_only_the_model_knows() -> None:
    """Outputs are those that it should have, and are what pruning keeps; statistics count all tokens."""
    torch.manual_seed(0)
    model, (ids, mask) = Masking(bert()).eval(), sentences()
    with pytest.warns(UserWarning, match="calibration: expected"):
        report = prune(model, None, [(ids,)], target_sparsity=0.5, method="obs")
    assert report.pruned_sparsity == pytest.approx(0.5, abs=1e-3)
    whole = hidden(model, (ids,))
    for row, length in enumerate(LENGTHS):
        alone = hidden(model, (ids[row : row + 1, :length],))[0]
        torch.testing.assert_close(whole[row, :length], alone, rtol=1e-4, atol=1e-4)
    assert not mask.all()
