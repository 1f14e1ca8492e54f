"""sparsam.torch: packed layers and their operators against PyTorch's own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from torch.nn import functional

import torch
from sparsam import _core
from sparsam.torch import SparseConv2d, SparseLinear
from sparsam.torch.layers.packed_weight import PackedWeight
from torch import nn

ACTIVATIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def pruned(layer: Any, sparsity: float = 0.8, seed: int = 0) -> Any:
    """The layer with that share of its weights zero, but for the first, which is not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) >= sparsity)
        layer.weight.view(-1)[0] = 1.0
    return layer


def fix(layer: Any, kernel: str) -> Any:
    """The layer, which uses that kernel whatever is fastest."""
    if kernel != "dense":
        for part in layer.packed.parts:
            part.add(kernel)
    layer.packed.kernel = lambda _: kernel
    return layer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel", ["dense", "bitmask", "panels"])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 70), (2, 5, 70), (130, 70), (0, 70)])
def test_linear(isa: str, threads: int, kernel: str, shape: tuple[int, ...]) -> None:
    linear, x = pruned(nn.Linear(70, 300)), torch.randn(shape)
    y = fix(SparseLinear(linear), kernel)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, linear(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["dense", "bitmask", "panels"])
def test_linear_dtypes(isa: str, dtype: torch.dtype, values: torch.dtype | None, kernel: str) -> None:
    linear = pruned(nn.Linear(65, 129)).to(dtype)
    layer = fix(SparseLinear(linear, dtype=values), kernel)
    assert layer.packed.value_dtype == (values or dtype)
    x = torch.randn(5, 65).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    # The exact product of what is stored, rounded once; the bias may have been rounded before that.
    exact = x.double() @ layer.packed.unpack().double().T + linear.bias.double()
    eps = torch.finfo(dtype).eps
    limit = 2 * eps * (x.double().abs() @ layer.weight.double().abs().T + 1)
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", ["dense", "bitmask", "panels"])
def test_activations(isa: str, name: str, kernel: str) -> None:
    linear, x = pruned(nn.Linear(64, 48)), 5 * torch.randn(7, 64)
    y = fix(SparseLinear(linear, activation=name), kernel)(x)
    torch.testing.assert_close(y, ACTIVATIONS[name](linear(x)).detach(), rtol=1e-5, atol=1e-5)


def test_strides_and_bfloat16_rounding(isa: str) -> None:
    linear = pruned(nn.Linear(64, 48))
    x = torch.randn(64, 7).T
    torch.testing.assert_close(SparseLinear(linear)(x), linear(x).detach(), rtol=1e-5, atol=1e-5)
    # The identity returns each bfloat16, NaN, infinities and denormals included; sums are rounded to even.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    eye = nn.Linear(1, 1, bias=False)
    nn.init.ones_(eye.weight)
    layer = fix(SparseLinear(eye.bfloat16()), "panels")
    y = layer(every[:, None])[:, 0]
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
    half = fix(SparseLinear(pruned(nn.Linear(1, 1, bias=False), 0.0), dtype=torch.float32), "panels")
    half.bias = torch.tensor([1 / 512])
    ties = (1 + torch.arange(64)[:, None] / 128).bfloat16()
    assert torch.equal(half(ties), (ties.float() + 1 / 512).bfloat16())


@pytest.mark.parametrize("seed", range(60))
def test_conv(isa: str, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 1, 2, 3]))
    channels, outs = (groups * int(n) for n in rng.integers(1, 24, 2))
    kernel, stride, padding, dilation = (
        (int(rng.integers(low, high)), int(rng.integers(low, high)))
        for low, high in ((1, 4), (1, 4), (0, 3), (1, 3))
    )
    if rng.random() < 0.3:
        kernel, stride, padding = (1, 1), (1, 1), (0, 0)
    if rng.random() < 0.1:
        outs *= 40
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height, width = (max(1, n) + int(rng.integers(0, 40)) for n in reach)
    conv = pruned(
        nn.Conv2d(channels, outs, kernel, stride, padding, dilation, groups, bias=bool(rng.random() < 0.5)),
        float(rng.choice([0.3, 0.8, 0.95])),
        seed,
    )
    x = torch.randn(int(rng.integers(1, 4)), channels, height, width)
    layer = fix(SparseConv2d(conv, activation="relu"), "panels")
    expected = functional.relu(conv(x)).detach()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fix(layer, "dense")(x), expected, rtol=1e-4, atol=1e-4)


def test_conv_of_many_images(threads: int) -> None:
    conv = pruned(nn.Conv2d(64, 96, 3, padding=1), 0.9)  # padded images of more than the 4 MiB held at a time
    x = torch.randn(9, 64, 60, 61)
    y = fix(SparseConv2d(conv), "panels")(x)
    torch.testing.assert_close(y, conv(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(6, 9, 3, padding="same", dilation=2), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, (2, 3), padding="same"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, 3, padding="valid"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, (3, 1), padding=(1, 0), padding_mode="reflect"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, 3, padding=2, padding_mode="circular"), (6, 15, 17)),
        (nn.Conv1d(6, 9, 5, padding=2, stride=3), (2, 6, 40)),
        (nn.Conv1d(6, 9, 4, padding="same", groups=3), (6, 40)),
        (nn.Conv2d(6, 6, 3, groups=6), (0, 6, 15, 17)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_conv_paddings(conv: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = pruned(conv)(x).detach()
    layer = fix(SparseConv2d(conv), "panels")
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fix(layer, "dense")(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_infinities_do_not_reach_pruned_weights() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 1.0
    x = torch.randn(1, 2, 20, 20)
    x[0, 1] = torch.inf
    y = fix(SparseConv2d(conv), "panels")(x)
    assert torch.equal(y[0, 0], x[0, 0])
    assert torch.equal(y[0, 1], torch.zeros(20, 20))


def test_choice_follows_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(pruned(nn.Linear(64, 48)))
    fastest = {4: "bitmask", 100: "dense", 300: "panels"}

    def choose(self: PackedWeight, dtype: torch.dtype, runs: dict[str, Any], dense: Any) -> str:
        for run in runs.values():
            run()
        assert dense(self.dense(dtype)).shape[1] == 48
        return fastest[dense(self.dense(dtype)).shape[0]]

    monkeypatch.setattr(PackedWeight, "_fastest", choose)
    for batch, kernel in fastest.items():
        x = torch.randn(batch, 64)
        torch.testing.assert_close(layer(x), layer.original(x).detach(), rtol=1e-5, atol=1e-5)
        assert layer.packed.kernel((batch, False)) == kernel
    layer(torch.randn(101, 64))  # in the bucket of 100, so nothing is timed
    assert layer.packed.kernel((101, False)) == "dense"


def test_losing_layouts_and_copies_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pruned(nn.Linear(256, 256), 0.5)
    times = {"dense": 1.0, "panels": 2.0, "bitmask": 3.0}

    def time(run: Any, **_: Any) -> float:
        run()
        kernel = run.args[0] if hasattr(run, "args") else "dense"
        return times[kernel]

    monkeypatch.setattr("sparsam.sparse.calibration.fastest", time)
    layer = SparseLinear(linear)
    packed = layer.packed.nbytes
    layer(torch.randn(8, 256))
    assert layer.packed.nbytes == packed + linear.weight.nbytes
    times["bitmask"] = 0.5
    layer = SparseLinear(linear)
    layer(torch.randn(8, 256))
    assert layer.packed.nbytes == packed


def test_state() -> None:
    linear = pruned(nn.Linear(20, 30))
    layer = SparseLinear(linear, activation="relu").eval()
    x = torch.randn(3, 20)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.packed is layer.packed
    again = pickle.loads(pickle.dumps(layer))
    for other in (twin, again):
        torch.testing.assert_close(other(x), expected)  # it may choose a kernel that rounds differently
        assert torch.equal(other.weight, linear.weight)
        assert not other.training
        assert other.activation == "relu"
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not list(layer.parameters())
    plain = nn.Linear(20, 30)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, linear.weight)

    new = pruned(nn.Linear(20, 30), 0.5, seed=1)
    layer.load_state_dict(new.state_dict())
    torch.testing.assert_close(layer(x), functional.relu(new(x)).detach())
    torch.testing.assert_close(twin(x), expected)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        layer.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(30)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": torch.zeros(30)})


def test_release_and_restored() -> None:
    linear = pruned(nn.Linear(20, 30))
    before, parameter = linear.weight.detach().clone(), linear.weight
    layer = SparseLinear(linear)
    assert layer.release()
    assert layer.release()
    assert linear.weight.nelement() == 0
    twin = copy.deepcopy(layer).eval()
    assert layer.restored() is linear
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)
    other: Any = twin.restored()
    assert other is not linear
    assert not other.training
    assert torch.equal(other.weight, before)
    rounded = SparseLinear(linear, dtype=torch.bfloat16)
    assert not rounded.release()
    assert rounded.restored() is linear
    assert torch.equal(linear.weight, before)


def test_moves() -> None:
    linear = pruned(nn.Linear(20, 30))
    model: Any = nn.Sequential(SparseLinear(linear))
    x = torch.randn(3, 20)
    model.bfloat16()
    assert model[0].packed.dtype == model[0].bias.dtype == linear.bias.dtype == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.float()
    torch.testing.assert_close(model(x), linear(x).detach())
    for move in (lambda: model.to("meta"), model.double):
        with pytest.raises(RuntimeError, match=r"it cannot go to .*; call sparsam.torch.restore"):
            move()
    torch.testing.assert_close(model(x), linear(x).detach())


def test_gradients_are_refused() -> None:
    for layer, shape in (
        (SparseLinear(pruned(nn.Linear(5, 4))), (3, 5)),
        (SparseConv2d(nn.Conv2d(5, 4, 1)), (1, 5, 2, 2)),
    ):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.requires_grad
        with pytest.raises(RuntimeError, match=r"restore\(model\) before training"):
            y.sum().backward()
        with torch.no_grad():
            assert not layer(x).requires_grad
        with torch.inference_mode():
            assert layer(x).is_inference()


@pytest.mark.parametrize(
    "layer", [nn.Linear(20, 30), nn.Conv2d(20, 30, 3, 2, 1, groups=5), nn.Conv1d(20, 30, 3)]
)
def test_operator(layer: Any) -> None:
    sparse: Any = SparseLinear(pruned(layer)) if isinstance(layer, nn.Linear) else SparseConv2d(pruned(layer))
    if isinstance(layer, nn.Linear):
        x = torch.randn(4, 20)
        arguments: tuple[Any, ...] = (x, sparse.packed.handle, sparse.bias, "gelu")
        torch.library.opcheck(torch.ops.sparsam.linear.default, arguments)
    else:
        x = torch.randn(4, 20, 9, 8)
        geometry = (sparse.stride, sparse.padding, sparse.dilation)
        arguments = (x, sparse.packed.handle, sparse.bias, *geometry, "gelu")
        torch.library.opcheck(torch.ops.sparsam.conv2d.default, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str) -> None:
    model = nn.Sequential(
        SparseConv2d(pruned(nn.Conv2d(4, 6, 3))),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear(pruned(nn.Linear(6 * 36, 70)), activation="gelu"),
        SparseLinear(pruned(nn.Linear(70, 3))),
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 5, 7):
        x = torch.randn(batch, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_tracing_and_autocast() -> None:
    model: Any = nn.Sequential(SparseLinear(pruned(nn.Linear(20, 30)), activation="silu"))
    x, other = torch.randn(3, 20), torch.randn(3, 20)
    jit: Any = torch.jit
    for traced in (jit.trace(model, x), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(traced(other), model(other))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(other), model(other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == model[0].original(x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype == torch.float16


def test_errors() -> None:
    layer = SparseLinear(pruned(nn.Linear(20, 30)))
    conv = SparseConv2d(nn.Conv2d(4, 6, 3))
    for call, error, text in (
        (lambda: layer(torch.ones(3, 21)), ValueError, r"x has shape \(3, 21\): expected \(..., 20\)"),
        (lambda: layer(torch.tensor(1.0)), ValueError, "x has shape"),
        (
            lambda: layer(torch.ones(3, 20, dtype=torch.float64)),
            TypeError,
            "x is torch.float64: expected one of",
        ),
        (lambda: layer(torch.ones(3, 20, device="meta")), ValueError, "x is on meta: expected the CPU"),
        (lambda: conv(torch.ones(4, 8)), ValueError, "expected 3 axes, or 4 with a batch"),
        (lambda: conv(torch.ones(2, 5, 8, 8)), ValueError, r"expected \(n, 4, height, width\)"),
        (lambda: conv(torch.ones(2, 4, 2, 8)), ValueError, "at least the size of the kernel"),
        (lambda: SparseLinear(nn.Conv2d(1, 1, 1)), TypeError, "expected a torch.nn.Linear; got Conv2d"),
        (lambda: SparseConv2d(nn.Linear(1, 1)), TypeError, "expected a torch.nn.Conv2d"),
        (lambda: SparseLinear(nn.Linear(2, 2).double()), TypeError, "weight is torch.float64"),
        (lambda: SparseLinear(nn.Linear(2, 2), dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (lambda: SparseLinear(nn.Linear(2, 2, device="meta")), ValueError, "weight is on meta"),
        (lambda: SparseLinear(nn.Linear(2, 2), activation="tanh"), ValueError, "activation='tanh': expected"),
        (lambda: torch.ops.sparsam.linear(torch.ones(1, 2), 0, None, ""), RuntimeError, "no packed weight 0"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_no_weights() -> None:
    linear = nn.Linear(6, 5)
    nn.init.zeros_(linear.weight)
    assert torch.equal(SparseLinear(linear)(torch.ones(2, 6)), linear.bias.detach().expand(2, 5))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 5)
    assert torch.equal(SparseLinear(empty)(torch.ones(2, 0)), empty.bias.detach().expand(2, 5))
    assert repr(SparseConv2d(nn.Conv2d(1, 2, 3))).startswith("SparseConv2d(1, 2, kernel_size=(3, 3)")


THREADS = """
import sys
{imports}
import sparsam.torch
layer = sparsam.torch.SparseLinear(torch.nn.Linear(1024, 1024))
torch.set_num_threads(1)
assert sparsam.num_threads() == 1, sparsam.num_threads()
torch.set_num_threads(2)
assert sparsam.num_threads() == min(2, len(__import__("os").sched_getaffinity(0)))
sparsam.set_num_threads(3)
assert sparsam.num_threads() == 3
x = torch.randn(64, 1024)
with torch.no_grad():
    torch.testing.assert_close(layer(x), layer.original(x), rtol=1e-4, atol=1e-4)
print(sparsam.build_info().threading)
"""


@pytest.mark.parametrize("imports", ["import torch, sparsam", "import sparsam, torch"])
def test_threads_are_those_of_pytorch(imports: str) -> None:
    run = [sys.executable, "-c", THREADS.format(imports=imports)]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert out.startswith("OpenMP")
    assert not _core.adopt_runtime("no-such-library.so")


def test_a_runtime_that_cannot_be_adopted_is_told_once() -> None:
    script = """
import warnings
import torch
from sparsam import _core
_core.adopt_runtime = lambda _: False
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sparsam.torch
    import sparsam.torch.layers
    import sparsam.torch
print([(w.category.__name__, "threads of its own" in str(w.message)) for w in caught
       if "sparsam" in str(w.message)])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[('RuntimeWarning', True)]"
