"""What `save_pretrained` and `from_pretrained` refuse, and what a process without sparsam can read."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
from huggingface_models import NAME, accelerated, bert, outputs, save_bert
from transformers import (
    BertForMaskedLM,
)

import sparsam.torch.huggingface
import torch
from sparsam.torch import restore
from torch import Tensor

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    return save_bert(tmp_path)


def test_refused_options(saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, _, _ = saved
    with pytest.raises(
        ValueError, match="device_map: expected the CPU, where packed weights are; got 'disk'"
    ):
        BertForMaskedLM.from_pretrained(folder, device_map={"bert": "cpu", "cls": "disk"})
    with pytest.raises(ValueError, match="device_map: expected the CPU, where packed weights are; got 0"):
        BertForMaskedLM.from_pretrained(folder, device_map={"": 0})
    with pytest.raises(ValueError, match=r"and a dtype among float32, .*; got dtype=torch.float64"):
        BertForMaskedLM.from_pretrained(folder, dtype=torch.float64)
    dense = BertForMaskedLM(bert())
    dense.save_pretrained(folder / "dense")
    config = sparsam.torch.huggingface.SparsamConfig()
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        BertForMaskedLM.from_pretrained(folder / "dense", quantization_config=config)
    with pytest.raises(
        ValueError, match=r"expected version 'accelerated 3'; got 'accelerated 9'; save the model"
    ):
        sparsam.torch.huggingface.SparsamConfig(version="accelerated 9")


Change = Callable[[dict[str, Tensor], dict[str, str]], Any]


WEIGHT = "bert.encoder.layer.1.output.dense.weight"


DAMAGED: dict[str, tuple[Change, str]] = {
    "another version": (
        lambda _, metadata: metadata.update(sparsam="accelerated 9"),
        "expected what save_pretrained writes; got another: metadata: expected sparsam=",
    ),
    "no JSON": (lambda _, metadata: metadata.update(layers="{"), "metadata 'layers': expected JSON"),
    "no bits": (lambda t, _: t.pop(f"{WEIGHT}_bits"), f"weight '{WEIGHT}': expected values and bits"),
    "no values": (lambda t, _: t.pop(WEIGHT), f"weight '{WEIGHT}': values: expected one for each of"),
    "neither": (
        lambda t, _: (t.pop(WEIGHT), t.pop(f"{WEIGHT}_bits")),
        f"weight '{WEIGHT}': expected values and bits; got none; the folder lacks a file",
    ),
    "a value too few": (
        lambda t, _: t.update({WEIGHT: t[WEIGHT][1:].clone()}),
        f"weight '{WEIGHT}': values: expected one for each of",
    ),
    "other bits": (
        lambda t, _: t.update({f"{WEIGHT}_bits": t[f"{WEIGHT}_bits"][1:].clone()}),
        f"weight '{WEIGHT}': bits: expected uint8 (32, 8); got uint8 (31, 8)",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(case: str, saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, _, _ = saved
    change, message = DAMAGED[case]
    with safetensors.safe_open(folder / NAME, "pt") as handle:
        metadata = dict(handle.metadata())
    tensors = safetensors.torch.load_file(folder / NAME)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / NAME, metadata)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked
        BertForMaskedLM.from_pretrained(folder)
    assert message in str(caught.value)


def test_another_architecture(saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, _, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        ValueError, match=r"tensor 'bert.encoder.*': expected \(64, 32\) in the model; got \(48"
    ):
        BertForMaskedLM.from_pretrained(folder)


def test_a_config_that_promises_packed_weights_which_are_dense(tmp_path: Path) -> None:
    model, x = accelerated("BertForMaskedLM")
    config = copy.deepcopy(model.config)
    restore(model)
    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert not hasattr(loaded, "hf_quantizer")


LOAD = """
import sys
{imports}
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print(sum(type(p).__name__ == "PackedTensor" for p in model.parameters()))
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "imports", ["import sparsam.torch.huggingface", "import transformers\nimport sparsam.torch"]
)
def test_a_process_that_only_loads(imports: str, saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    done = run(LOAD.format(imports=imports), str(saved[0]))
    assert done.stdout == "12\n", done.stderr


def test_transformers_alone_refuses(saved: tuple[Path, Any, dict[str, Tensor]]) -> None:
    done = run(LOAD.format(imports=""), str(saved[0]))
    assert done.returncode == 1
    assert "Unknown quantization type, got sparsam" in done.stderr
    assert "RuntimeError" in done.stderr
    assert "MISMATCH" in done.stderr


def test_importing_sparsam_neither_imports_transformers_nor_minds_an_old_one() -> None:
    code = """
import sys, types
import sparsam.torch
print("transformers" in sys.modules)
sys.modules["transformers"] = types.ModuleType("transformers")
sys.modules["transformers"].__version__ = "4.57.6"
sparsam.torch.transformers_import.register()
import sparsam.torch.huggingface
"""
    done = run(code)
    assert done.stdout == "False\n"
    assert done.stderr.endswith(
        "ImportError: transformers: expected version 5 or newer; got 4.57.6; upgrade it\n"
    )
