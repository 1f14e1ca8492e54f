"""A pruned Hugging Face model, accelerated, saved packed, and loaded again without a dense copy.

Needs `pip install '.[torch]' 'transformers>=5'`. The model is small and random: nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoModel, BertConfig, BertModel

import sparsam
import sparsam.torch  # registers the packed form with transformers
import torch

torch.manual_seed(0)
config = BertConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, vocab_size=1000)
model = BertModel(config).eval()
with torch.no_grad():  # your pruned model; here by magnitude
    for name, weight in model.named_parameters():
        if name.startswith("encoder") and weight.ndim == 2:
            weight.copy_(torch.from_numpy(sparsam.prune(weight.numpy(), target_sparsity=0.8).weights))

inputs = {"input_ids": torch.randint(0, 1000, (4, 32))}
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/dense")
    report = sparsam.torch.accelerate(model, inputs, verbose=False)
    model.save_pretrained(f"{folder}/packed")  # model.safetensors with packed weights; config.json says so
    loaded = AutoModel.from_pretrained(f"{folder}/packed")
    sizes = {way: (Path(folder) / way / "model.safetensors").stat().st_size for way in ("dense", "packed")}

with torch.no_grad():
    before, after = (one(**inputs).last_hidden_state.numpy() for one in (model, loaded))
assert np.array_equal(before, after)  # to the last bit
assert sum(isinstance(p, sparsam.torch.PackedTensor) for p in loaded.parameters()) == report.swapped
print(f"{report.swapped} packed layers; weights {sizes['dense']:,} bytes before, {sizes['packed']:,} now")
