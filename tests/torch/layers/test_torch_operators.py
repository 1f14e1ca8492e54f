"""The registered operators: schema checks, compiled and traced programs."""

from __future__ import annotations

from typing import Any

import pytest
from packed_layers import packed_copy, pruned

import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "layer", [nn.Linear(20, 30), nn.Conv2d(20, 30, 3, 2, 1, groups=5), nn.Conv1d(20, 30, 3)]
)
def test_operator(layer: Any) -> None:
    sparse = packed_copy(pruned(layer))
    data, bias = sparse.weight.packed_data, sparse.bias.detach()
    if isinstance(layer, nn.Linear):
        arguments: tuple[Any, ...] = (torch.randn(4, 20), data, bias, 30, "gelu")
        torch.library.opcheck(torch.ops.sparsam.linear.default, arguments)
        torch.library.opcheck(torch.ops.sparsam.unpack.default, (data, 30, 20, torch.float32))
    else:
        x = torch.randn(4, 20, 9, 8)
        geometry = [sparse.kernel_size, sparse.stride, sparse.padding, sparse.dilation]
        if isinstance(layer, nn.Conv1d):
            geometry = [(1, *size) if size != (0,) else (0, 0) for size in geometry]
        torch.library.opcheck(torch.ops.sparsam.conv2d.default, (x, data, bias, 30, *geometry, "gelu"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str) -> None:
    model = nn.Sequential(
        packed_copy(pruned(nn.Conv2d(4, 6, 3))),
        nn.ReLU(),
        nn.Flatten(),
        packed_copy(pruned(nn.Linear(6 * 36, 70)), activation="gelu"),
        packed_copy(pruned(nn.Linear(70, 3))),
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 5, 7):
        x = torch.randn(batch, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    torch._dynamo.reset()


def test_graphs_are_known_by_everything_but_the_numbers() -> None:
    def key(ins: int, outs: int, dtype: torch.dtype = torch.float32) -> str:
        weight: Any = packed_copy(pruned(nn.Linear(ins, outs)).to(dtype)).weight
        known: str = weight._stable_hash_for_caching()
        return known

    assert key(70, 40) == key(70, 40)
    assert len({key(70, 40), key(40, 70), key(70, 40, torch.bfloat16)}) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_graphs_of_any_batch() -> None:
    model = nn.Sequential(
        packed_copy(pruned(nn.Linear(70, 40))), nn.ReLU(), packed_copy(pruned(nn.Linear(40, 3)))
    )
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(model, (torch.randn(8, 70),), dynamic_shapes=(sizes,)).module()
    for batch in (8, 3, 17):
        x = torch.randn(batch, 70)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(exported(x), model(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_tracing_and_autocast() -> None:
    model: Any = nn.Sequential(packed_copy(pruned(nn.Linear(20, 30)), activation="silu"))
    x, other = torch.randn(3, 20), torch.randn(3, 20)
    jit: Any = torch.jit
    for traced in (jit.trace(model, x), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(traced(other), model(other))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(other), model(other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype == torch.float16
