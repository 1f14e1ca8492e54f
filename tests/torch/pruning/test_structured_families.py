"""`shrink` on encoder-decoders, and on models with layers that keep their size."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import torch
from sparsam.config import PruningConfig
from sparsam.torch import shrink
from torch import Tensor, nn


@pytest.mark.parametrize("gated", [False, True])
def test_t5_loses_neurons_and_keeps_heads_with_a_bias_of_their_own(gated: bool) -> None:
    torch.manual_seed(0)
    make: Any = transformers.T5Config
    config = make(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    model: Any = transformers.T5ForConditionalGeneration(config)
    model.eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "decoder_input_ids": torch.randint(0, 50, (2, 5))}
    before = sum(p.numel() for p in model.parameters())
    report = shrink(model, 0.5, inputs, seconds=0)
    assert [row.name.rpartition(".")[2] for row in report.structures] == ["wi_0" if gated else "wi"] * 4
    assert {row.after for row in report.structures} == {24}
    assert sum(p.numel() for p in model.parameters()) == before - 4 * 24 * 32 * (3 if gated else 2)
    reasons = dict(report.left)
    for name in ("encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"):
        assert reasons[name] == "its mask or position bias differs from head to head"
    assert model(**inputs).logits.shape == (2, 5, 50)
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[0] == 2


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm = nn.Linear(16, 20), nn.LSTM(20, 24, batch_first=True)
        self.middle, self.after = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(torch.relu(self.before(x)))
        result: Tensor = self.after(torch.relu(self.middle(states)))
        return result


def test_recurrent_layers_keep_their_size_and_say_so() -> None:
    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(2, 7, 16)
    report = shrink(model, 0.5, x, seconds=0)
    assert [(row.name, row.after) for row in report.structures] == [("middle", 16)]
    assert dict(report.left)["before"] == "lstm (LSTM) reads them, which is not cut"
    message = r"model: expected neurons to cut; got none \(before: lstm .LSTM. reads them, which is not cut"
    with pytest.raises(ValueError, match=message):
        shrink(Tagger().eval(), PruningConfig(0.5, exclude="middle"), x, kinds=("neurons",), seconds=0)
