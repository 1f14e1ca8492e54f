"""sparsam.torch: packed layers and their operators against PyTorch's own."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from torch.nn import functional

import torch
from sparsam import _core
from sparsam.torch import PackedTensor, pack, restore
from sparsam.torch.layers.packed_weight import PackedWeight
from sparsam.torch.layers.packing import PackedLayer
from torch import Tensor, nn

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


def packed_copy(layer: Any, **options: Any) -> Any:
    """A packed copy of the layer, the layer itself left as it is."""
    return pack(copy.deepcopy(layer), **options)


def fix(layer: Any, *forms: str, **options: Any) -> Any:
    """A packed copy of the layer, in those forms."""
    twin = packed_copy(layer, **options)
    twin.weight._content.data = twin.weight.packed.with_forms(forms)
    assert twin.weight.packed.forms == forms
    return twin


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel", ["bitmask", "panels"])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 70), (2, 5, 70), (130, 70), (0, 70)])
def test_linear(isa: str, threads: int, kernel: str, shape: tuple[int, ...]) -> None:
    linear, x = pruned(nn.Linear(70, 300)), torch.randn(shape)
    y = fix(linear, kernel)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, linear(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["bitmask", "panels"])
def test_linear_dtypes(isa: str, dtype: torch.dtype, values: torch.dtype | None, kernel: str) -> None:
    linear = pruned(nn.Linear(65, 129)).to(dtype)
    layer = fix(linear, kernel, dtype=values)
    assert layer.weight.packed.dtype == (values or dtype)
    x = torch.randn(5, 65).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    # The exact product of what is stored, rounded once; the bias may have been rounded before that.
    exact = x.double() @ layer.weight.to_dense().double().T + linear.bias.double()
    eps = torch.finfo(dtype).eps
    limit = 2 * eps * (x.double().abs() @ layer.weight.to_dense().double().abs().T + 1)
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", ["bitmask", "panels"])
def test_activations(isa: str, name: str, kernel: str) -> None:
    linear, x = pruned(nn.Linear(64, 48)), 5 * torch.randn(7, 64)
    y = fix(linear, kernel, activation=name)(x)
    torch.testing.assert_close(y, ACTIVATIONS[name](linear(x)).detach(), rtol=1e-5, atol=1e-5)


def test_strides_and_bfloat16_rounding(isa: str) -> None:
    linear = pruned(nn.Linear(64, 48))
    x = torch.randn(64, 7).T
    torch.testing.assert_close(packed_copy(linear)(x), linear(x).detach(), rtol=1e-5, atol=1e-5)
    # The identity returns each bfloat16, NaN, infinities and denormals included; sums are rounded to even.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    eye = nn.Linear(1, 1, bias=False)
    nn.init.ones_(eye.weight)
    layer = fix(eye.bfloat16(), "panels")
    y = layer(every[:, None])[:, 0]
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
    half = fix(pruned(nn.Linear(1, 1), 0.0), "panels")
    half.bias = nn.Parameter(torch.tensor([1 / 512]))
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
    layer = packed_copy(conv, activation="relu")
    expected = functional.relu(conv(x)).detach()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_conv_of_many_images(threads: int) -> None:
    conv = pruned(nn.Conv2d(64, 96, 3, padding=1), 0.9)  # padded images of more than the 4 MiB held at a time
    x = torch.randn(9, 64, 60, 61)
    y = packed_copy(conv)(x)
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
    layer = packed_copy(conv)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_infinities_do_not_reach_pruned_weights() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 1.0
    x = torch.randn(1, 2, 20, 20)
    x[0, 1] = torch.inf
    y = packed_copy(conv)(x)
    assert torch.equal(y[0, 0], x[0, 0])
    assert torch.equal(y[0, 1], torch.zeros(20, 20))


def test_the_form_follows_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pruned(nn.Linear(64, 48))
    for seconds, batches, forms in (
        ({"bitmask": 1.0, "panels": 2.0}, [4], ("bitmask",)),
        ({"bitmask": 2.0, "panels": 1.0}, [4], ("panels",)),
        ({"bitmask": 1.0, "panels": 2.0}, [1, 8, 16], ("bitmask",)),
        ({"bitmask": 1.0, "panels": 2.0}, [1, 8, 100], ("panels",)),  # memory holds one
        ({"bitmask": 1.0, "panels": 2.0}, [17], ("panels",)),
    ):
        monkeypatch.setattr(PackedWeight, "_seconds", lambda _, form, __, s=seconds: s[form])
        layer = packed_copy(linear, batches=batches)
        assert layer.weight.packed.forms == forms
        assert layer.weight.nbytes == sum(part.nbytes for part in layer.weight.packed.parts)
        for batch in (1, 16, 17, 300):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
            assert layer.weight.packed.kernel(batch) == forms[0]
        assert layer.weight.packed.forms == forms  # products build nothing


def test_preparing_measures_the_weight() -> None:
    layer = packed_copy(pruned(nn.Linear(256, 256)))
    for batches in (1, [1, 64], range(1, 4)):
        layer.weight.prepare(batches)
        assert set(layer.weight.packed.forms) <= {"bitmask", "panels"}
        x = torch.randn(5, 256)
        torch.testing.assert_close(layer(x), x @ layer.weight.to_dense().T + layer.bias, rtol=1e-4, atol=1e-4)
    for batches in (0, [], [3, -1]):
        with pytest.raises(ValueError, match="batches: expected numbers of at least 1"):
            layer.weight.prepare(batches)


def test_products_write_no_memory_that_stays() -> None:
    """Neither choices nor forms grow with the shapes that were seen."""
    layer, conv = packed_copy(pruned(nn.Linear(64, 48))), packed_copy(nn.Conv1d(2, 3, 3))
    before = [pickle.dumps(vars(one.weight.packed)["_kernels"]) for one in (layer, conv)]
    sizes = [one.weight.nbytes for one in (layer, conv)]
    for length in range(8, 72):
        layer(torch.randn(length, 64))
        conv(torch.randn(1, 2, length))
    assert [pickle.dumps(vars(one.weight.packed)["_kernels"]) for one in (layer, conv)] == before
    assert [one.weight.nbytes for one in (layer, conv)] == sizes


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.8), (0.8, 0.4), (0.9, 0.22)])
def test_bytes(sparsity: float, most: float) -> None:
    linear = pruned(nn.Linear(768, 3072), sparsity)
    layer = packed_copy(linear, batches=[1, 8, 128])
    assert layer.weight.nbytes <= most * 4 * linear.weight.numel()


def test_state() -> None:
    linear = pruned(nn.Linear(20, 30))
    layer = packed_copy(linear, activation="relu").eval()
    x = torch.randn(3, 20)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (twin, pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)  # bit for bit
        assert torch.equal(other.weight.to_dense(), linear.weight)
        assert isinstance(other, nn.Linear)
        assert isinstance(other.weight, nn.Parameter)
        assert not other.training
        assert other(x).min() == 0  # the activation
    assert twin.weight.packed_data is layer.weight.packed_data
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    state = layer.state_dict()
    assert {name: type(tensor) for name, tensor in state.items()} == {"weight": Tensor, "bias": Tensor}
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    plain = nn.Linear(20, 30)
    plain.load_state_dict(state)
    assert torch.equal(plain.weight, linear.weight)

    new = pruned(nn.Linear(20, 30), 0.5, seed=1)
    layer.load_state_dict(new.state_dict())
    torch.testing.assert_close(layer(x), functional.relu(new(x)).detach())
    assert layer.weight.packed.nnz == new.weight.count_nonzero()
    assert torch.equal(twin(x), expected)
    layer.load_state_dict(linear.state_dict(), assign=True)  # the very tensors: dense, and still activated
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer(x), functional.relu(linear(x)))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        twin.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(30)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        twin.load_state_dict({"bias": torch.zeros(30)})


def test_release_and_restore() -> None:
    linear = pruned(nn.Linear(20, 30))
    before, parameter = linear.weight.detach().clone(), linear.weight
    layer = PackedLayer.find(pack(linear))
    assert layer is not None
    assert layer.release()
    assert layer.release()
    assert parameter.nelement() == 0
    twin: Any = copy.deepcopy(linear).eval()
    assert restore(linear) == 1
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)
    assert restore(twin) == 1
    assert twin.weight is not parameter
    assert not twin.training
    assert torch.equal(twin.weight, before)
    rounded = PackedLayer.find(pack(linear, dtype=torch.bfloat16))
    assert rounded is not None
    assert not rounded.release()
    assert restore(linear) == 1
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)


def test_moves() -> None:
    linear = pruned(nn.Linear(20, 30))
    parameter = linear.weight
    model: Any = nn.Sequential(packed_copy(linear))
    x = torch.randn(3, 20)
    weight = model[0].weight
    model.bfloat16()
    assert model[0].weight is weight
    assert weight.dtype == weight.packed.dtype == model[0].bias.dtype == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.float()
    torch.testing.assert_close(model(x), linear(x).detach(), rtol=2e-2, atol=2e-2)
    for move in (lambda: model.to("meta"), model.double):
        with pytest.raises(RuntimeError, match=r"it cannot go to .*; call sparsam.torch.restore"):
            move()
    torch.testing.assert_close(model(x), linear(x).detach(), rtol=2e-2, atol=2e-2)
    model.share_memory()
    assert weight.is_shared()
    restore(model)
    assert torch.equal(model[0].weight, parameter.bfloat16().float())


def test_gradients_are_refused() -> None:
    for layer, shape in (
        (packed_copy(pruned(nn.Linear(5, 4))), (3, 5)),
        (packed_copy(nn.Conv2d(5, 4, 1)), (1, 5, 2, 2)),
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
        with pytest.raises(RuntimeError, match=r"no gradient; call sparsam\.torch\.restore"):
            layer.requires_grad_(requires_grad=True)


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


def test_errors() -> None:
    layer = packed_copy(pruned(nn.Linear(20, 30)))
    conv = packed_copy(nn.Conv2d(4, 6, 3))
    empty = torch.empty(0, dtype=torch.uint8)
    for call, error, text in (
        (lambda: layer(torch.ones(3, 21)), ValueError, r"x: expected shape \(..., 20\); got \(3, 21\)"),
        (lambda: layer(torch.tensor(1.0)), ValueError, "x: expected shape"),
        (
            lambda: layer(torch.ones(3, 20, dtype=torch.float64)),
            TypeError,
            "x: expected one of .*; got torch.float64",
        ),
        (
            lambda: layer(torch.ones(3, 20, device="meta")),
            ValueError,
            "x: expected a tensor on the CPU.*; got one on meta",
        ),
        (lambda: conv(torch.ones(4, 8)), ValueError, "expected 3 axes, or 4 with a batch"),
        (lambda: conv(torch.ones(2, 5, 8, 8)), ValueError, r"expected shape \(n, 4, height, width\)"),
        (lambda: conv(torch.ones(2, 4, 2, 8)), ValueError, "at least the size of the kernel"),
        (
            lambda: pack(nn.Bilinear(1, 1, 1)),
            TypeError,
            "expected a torch.nn.Linear, Conv1d or Conv2d; got a",
        ),
        (lambda: pack(layer), TypeError, "layer: expected a dense one; got a packed Linear"),
        (lambda: PackedTensor.pack(layer.weight), TypeError, "weight: expected a dense tensor; got a Packed"),
        (
            lambda: PackedTensor.pack(torch.eye(3).to_sparse()),
            TypeError,
            "weight: expected a dense tensor; got torch.sparse_coo",
        ),
        (lambda: pack(nn.Linear(2, 2).double()), TypeError, "weight: expected .*; got torch.float64"),
        (lambda: pack(nn.Linear(2, 2), dtype=torch.int8), TypeError, "dtype: expected .*; got torch.int8"),
        (lambda: pack(nn.Linear(2, 2, device="meta")), ValueError, "weight: expected .*; got one on meta"),
        (lambda: pack(nn.Linear(2, 2), activation="tanh"), ValueError, "activation: expected None .*'tanh'"),
        (
            lambda: torch.ops.sparsam.linear(torch.ones(1, 2), empty, None, 3, ""),
            ValueError,
            "packed weight: expected whole forms; got 0 bytes",
        ),
    ):
        with pytest.raises(error, match=text):
            call()


def test_no_weights() -> None:
    linear = nn.Linear(6, 5)
    nn.init.zeros_(linear.weight)
    assert torch.equal(packed_copy(linear)(torch.ones(2, 6)), linear.bias.detach().expand(2, 5))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 5)
    assert torch.equal(packed_copy(empty)(torch.ones(2, 0)), empty.bias.detach().expand(2, 5))
    assert repr(pack(nn.Conv2d(1, 2, 3))) == repr(nn.Conv2d(1, 2, 3))
    assert repr(pack(nn.Conv2d(1, 2, 3)).weight) == "PackedTensor(2x1x3x3, density=1, dtype=torch.float32)"


THREADS = """
import sys
{imports}
import sparsam.torch
linear = torch.nn.Linear(1024, 1024)
layer = sparsam.torch.pack(__import__('copy').deepcopy(linear))
torch.set_num_threads(1)
assert sparsam.num_threads() == 1, sparsam.num_threads()
torch.set_num_threads(2)
assert sparsam.num_threads() == min(2, len(__import__("os").sched_getaffinity(0)))
sparsam.set_num_threads(3)
assert sparsam.num_threads() == 3
x = torch.randn(64, 1024)
with torch.no_grad():
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)
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
