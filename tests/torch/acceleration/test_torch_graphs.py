"""Graphs of models with packed layers own their weights, and run in another process."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch_cases import pruned

import torch
from sparsam.torch import pack
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning"),
]

RUN = """
import sys
import torch
import sparsam.torch
x, expected = torch.load(sys.argv[2])
load = {"export": lambda file: torch.export.load(file).module(), "trace": torch.jit.load}[sys.argv[1]]
with torch.no_grad():
    torch.testing.assert_close(load(sys.argv[3])(x), expected)
"""


class Net(nn.Module):
    """Convolutions with groups and unequal padding, a fused activation, a product by another way."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(4, 6, 3)
        self.signals = nn.Conv1d(6, 6, 2, padding="same", groups=2)
        self.first = nn.Linear(6 * 36, 40)
        self.last = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.signals(self.images(x).relu().flatten(2)).flatten(1)
        return self.last(self.first(x)) + self.last.weight.sum()  # type: ignore[no-any-return]


def nets() -> tuple[Any, Any]:
    """The net with packed layers, and one that computes the same."""
    dense: Any = pruned(Net())
    packed = copy.deepcopy(dense)
    for name, layer in packed.named_children():
        pack(layer, activation="relu" if name == "first" else None)
    dense.first = nn.Sequential(dense.first, nn.ReLU())
    return packed, dense


def run_elsewhere(kind: str, file: Path, x: Tensor, expected: Tensor) -> None:
    torch.save((x, expected), file.parent / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN, kind, str(file.parent / "expected.pt"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, tmp_path: Path) -> None:
    model, dense = nets()
    x, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("linear.default" in t or "conv" in t for t in targets if t.startswith("aten"))
    torch.export.save(program, tmp_path / "model.pt2")
    expected = dense(other).detach()
    torch.testing.assert_close(program.run_decompositions().module()(other), expected)
    del model, program
    run_elsewhere("export", tmp_path / "model.pt2", other, expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_traced(tmp_path: Path) -> None:
    model, dense = nets()
    x, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    traced.save(str(tmp_path / "model.pt"))
    expected = dense(other).detach()
    del model, traced
    run_elsewhere("trace", tmp_path / "model.pt", other, expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_a_compiled_graph_follows_the_weight() -> None:
    model, dense = nets()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x))  # type: ignore[no-untyped-call]
        model.last.weight.mul_(2)
        dense.last.weight.mul_(2)
        torch.testing.assert_close(compiled(x), dense(x))  # type: ignore[no-untyped-call]
    torch._dynamo.reset()


def test_a_damaged_weight_in_a_graph_is_refused() -> None:
    layer: Any = pack(nn.Linear(8, 6))
    data = layer.weight.packed_data.clone()
    torch.ops.sparsam.linear(torch.ones(1, 8), data, None, 6, "")
    for position in (0, 9, 17, 33, 97):
        damaged = layer.weight.packed_data.clone()
        damaged[position] ^= 255
        with pytest.raises(ValueError, match=r"packed weight|buffer|form"):
            torch.ops.sparsam.linear(torch.ones(1, 8), damaged, None, 6, "")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_a_trace_is_saved_with_its_parameters() -> None:
    """Those of layers that the example does not reach too."""
    model, dense = nets()
    model.idle = pack(pruned(nn.Linear(8, 6)))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded: Any = torch.jit.load(file)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loaded(x), dense(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        model.last.weight.mul_(2)  # packed still
        dense.last.weight.mul_(2)
    torch.testing.assert_close(model(x), dense(x))


def test_a_script_says_what_to_do() -> None:
    model, _ = nets()
    with pytest.raises(RuntimeError, match=r"torch.jit.script: .* call sparsam.torch.restore\(model\) first"):
        torch.jit.script(model)


def test_an_export_to_onnx_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = nets()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=r"ONNX: .* call sparsam.torch.restore\(model\) first"):
        torch.export.export(model, (torch.randn(2, 4, 8, 8),))


class Cut(nn.Module):
    """Signals as long as their numbers say, which an export cannot know; speech models do that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=1)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        here = torch.arange(x.shape[-1] * 2) < length
        cut = torch.cat([x, x], -1)[..., here.nonzero().squeeze(1)]
        return self.last(self.first(cut).transpose(1, 2))  # type: ignore[no-any-return]


def test_exported_with_lengths_that_depend_on_numbers() -> None:
    dense: Any = pruned(Cut())
    model = copy.deepcopy(dense)
    pack(model.first)
    pack(model.last)
    example = torch.randn(2, 4, 8), torch.tensor(5)
    with torch.no_grad():
        program = torch.export.export(model, example)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for length in (2, 5, 13):
            x = torch.randn(2, 4, 8), torch.tensor(length)
            torch.testing.assert_close(loaded(*x), dense(*x))
