"""`import sparsam.torch` registers the packed form with transformers, whichever of the two comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch_cases import count_packed
from torch_cases import pruned as _pruned
from transformers import BertConfig, BertModel, BertTokenizer

import torch
from sparsam.torch import accelerate

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

SENTENCES = ["a cat sat", "two dogs ran in the sun"]
LOAD = """
import sys
import sparsam.torch
assert "transformers" not in sys.modules
assert sum(type(finder).__name__ == "_WaitForModels" for finder in sys.meta_path) == 1
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
assert not any(type(finder).__name__ == "_WaitForModels" for finder in sys.meta_path)
model = AutoModel.from_pretrained(sys.argv[1])
print(sum(type(p).__name__ == "PackedTensor" for p in model.parameters()))
loaded = SentenceTransformer(sys.argv[1], device="cpu")
print(sum(type(p).__name__ == "PackedTensor" for p in loaded.parameters()))
import numpy
numpy.save(sys.argv[2], loaded.encode(sys.argv[3:]))
"""


def test_sparsam_first_then_transformers_and_sentence_transformers(tmp_path: Path) -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    dense, packed, file = tmp_path / "dense", tmp_path / "packed", tmp_path / "embeddings.npy"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(dense)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48, max_position_embeddings=64)  # fmt: skip
    _pruned(BertModel(config)).save_pretrained(dense)  # type: ignore[operator]
    vectors = Transformer(str(dense))
    model = SentenceTransformer(modules=[vectors, Pooling(32)], device="cpu")
    accelerate(vectors.auto_model, dict(vectors.tokenize(SENTENCES)), verbose=False)
    model.save(str(packed))
    command = [sys.executable, "-c", LOAD, str(packed), str(file), *SENTENCES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(count_packed(model))] * 2
    np.testing.assert_allclose(np.load(file), model.encode(SENTENCES), atol=1e-5)
