"""What reads the memory of a packed weight gets the dense numbers or an error, and never crashes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import torch as safetensors
from torch_cases import mlp, packed, pruned

import torch
from sparsam.torch import PackedTensor, accelerate, pack, restore
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pair() -> tuple[Any, Tensor]:
    """A packed weight, and its dense numbers."""
    layer: Any = pruned(nn.Linear(8, 6))
    dense = layer.weight.detach().clone()
    return pack(layer).weight, dense


SHAPES: dict[str, Callable[[Any], Any]] = {
    "the Parameter": lambda w: w,
    "its data": lambda w: w.detach(),
    "a view": lambda w: w.detach()[2:],
    "its transpose": lambda w: w.detach().T,
}

COPIES: dict[str, Callable[[Any], Any]] = {
    "torch.from_dlpack": torch.from_dlpack,  # type: ignore[attr-defined]
    "np.from_dlpack": lambda w: torch.from_numpy(np.from_dlpack(w).copy()),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "np.array": lambda w: torch.from_numpy(np.array(w)),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)).to_dense(),
    "copy": lambda w: copy.copy(w).to_dense(),
    "set_": lambda w: torch.empty(0).set_(w),
    "Tensor": torch.Tensor,
    "clone": torch.clone,
    "stack": lambda w: torch.stack([w])[0],
    "out": lambda w: torch.add(w, 0, out=torch.empty(w.shape)),
    "foreach": lambda w: torch._foreach_add([w], 0)[0],
    "apply_": lambda w: w.detach().apply_(lambda x: x).to_dense(),
    "as_subclass": lambda w: w.as_subclass(Tensor).clone(),
    "_make_subclass": lambda w: Tensor._make_subclass(Tensor, w.detach()).clone(),
    "flattened": lambda w: torch._utils._flatten_dense_tensors([w]).view(w.shape),  # type: ignore[no-untyped-call]
    "nested": lambda w: torch.nested.nested_tensor([w.detach()])[0],
    "mkldnn": lambda w: w.to_mkldnn().to_dense(),
}

REFUSED: dict[str, Callable[[Any], Any]] = {
    "data_ptr": lambda w: w.data_ptr(),
    "Tensor.data_ptr": Tensor.data_ptr,
    "to_dlpack": torch.utils.dlpack.to_dlpack,  # type: ignore[attr-defined]
    "address of the storage": lambda w: w.untyped_storage().data_ptr(),
    "numbers of the storage": lambda w: w.untyped_storage()[0],
    "changes of the storage": lambda w: w.untyped_storage().fill_(0),
    "safetensors": lambda w: safetensors.save({"weight": w}),
    "a buffer": memoryview,
    "another shape": lambda w: w.detach().resize_(2, 2),
    "data of a dense tensor": lambda w: setattr(torch.zeros(w.shape), "data", w),
    "data of a Parameter": lambda w: setattr(nn.Parameter(torch.zeros(w.shape)), "data", w),
    "set_data": lambda w: Tensor.data.__set__(torch.zeros(w.shape), w),  # type: ignore[attr-defined]
    "an axis more": lambda w: w.detach().unsqueeze_(0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_have_the_dense_numbers(how: str, shape: str) -> None:
    weight, dense = pair()
    with torch.no_grad():
        found = COPIES[how](SHAPES[shape](weight))
    assert torch.equal(found, SHAPES[shape](dense))
    assert torch.equal(weight.to_dense(), dense)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # which safetensors reads
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", REFUSED)
def test_memory_that_is_not_there_is_refused(how: str, shape: str) -> None:
    weight, dense = pair()
    with pytest.raises((RuntimeError, IndexError, TypeError)), torch.no_grad():
        REFUSED[how](SHAPES[shape](weight))
    assert torch.equal(weight.to_dense(), dense)
    assert weight.shape == dense.shape


def test_the_storage_is_empty() -> None:
    weight, dense = pair()
    storage = weight.untyped_storage()
    assert (storage.nbytes(), len(storage), storage.tolist()) == (0, 0, [])
    assert torch.empty(0).set_(storage).numel() == 0
    storage.share_memory_()
    assert torch.equal(weight.to_dense(), dense)


def test_errors_say_what_to_do() -> None:
    weight, _ = pair()
    with pytest.raises(RuntimeError, match=r"weight: expected a dense tensor, .* got a packed one; use"):
        weight.data_ptr()
    with pytest.raises(RuntimeError, match=r"aten.t_.default: expected a change of numbers .* use to_dense"):
        weight.detach().t_()
    assert weight.shape == (6, 8)


def test_numbers_are_shown() -> None:
    weight, dense = pair()
    element = weight.detach()[0, 0]
    assert f"{element:.3f}" == f"{dense[0, 0]:.3f}"
    assert f"{weight}" == repr(weight) != repr(dense)
    assert repr(weight.detach()[:2]) == repr(dense[:2])


def test_changes_by_apply() -> None:
    weight, dense = pair()
    weight.detach().apply_(lambda x: 2 * x)
    weight.detach()[3:].apply_(lambda x: 2 * x)
    dense.mul_(2)[3:].mul_(2)
    assert torch.equal(weight.to_dense(), dense)


COLLECTIVES = """
import sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from sparsam.torch import pack

warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
layer = nn.Linear(8, 6)
with torch.no_grad():
    layer.weight[:, ::2] = 0
dense = layer.weight.detach().clone()
weight, out = pack(layer).weight, torch.zeros(6, 8)
with torch.no_grad():
    dist.broadcast(weight, 0)
    dist.all_reduce(weight.data)
    dist.reduce(weight, 0)
    dist.all_reduce_coalesced([weight])
    dist._broadcast_coalesced(dist.group.WORLD, [weight, weight.detach()], 1000, 0)
    dist.scatter(weight, [dense])
    for gather in (
        lambda: dist.all_gather([out], weight),
        lambda: dist.all_gather_into_tensor(out, weight),
        lambda: dist.gather(weight, [out]),
        lambda: dist.reduce_scatter_tensor(out, weight),
        lambda: dist.all_to_all_single(out, weight),
    ):
        gather()
        assert torch.equal(out.clone(), dense)
        out.zero_()
    dist.all_gather([weight], 2 * dense)
    assert torch.equal(weight.to_dense(), 2 * dense)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), layer))
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), nn.functional.linear(model.module[0](x), 2 * dense, layer.bias))
try:
    dist.scatter(out, [weight])
except RuntimeError as error:
    assert "data pointer" in str(error)
else:
    raise AssertionError("numbers from nowhere")
dist.destroy_process_group()
"""


def test_collectives(tmp_path: Path) -> None:
    """In a process of their own, which they would have ended."""
    command = [sys.executable, "-c", COLLECTIVES, str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_memory(shape: str) -> None:
    weight, dense = pair()
    SHAPES[shape](weight).share_memory_()
    assert weight.is_shared()
    assert torch.equal(weight.to_dense(), dense)
    with torch.no_grad():
        weight.mul_(2)  # new bytes, which only this process has
    assert not weight.is_shared()


@pytest.mark.parametrize("shape", SHAPES)
def test_sent_to_another_process(shape: str) -> None:
    weight, dense = pair()
    found = ForkingPickler.loads(bytes(ForkingPickler.dumps(SHAPES[shape](weight))))  # as its queues do
    assert torch.equal(found.to_dense(), SHAPES[shape](dense))
    assert not weight.is_shared()


def test_saved_weights() -> None:
    weight, dense = pair()
    for kind in SHAPES.values():
        file = io.BytesIO()
        torch.save(kind(weight), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False).to_dense(), kind(dense))


def test_a_state_in_a_dense_model_is_packed_again() -> None:
    first, second, plain = mlp(), mlp(), mlp()
    x = torch.randn(5, 24)
    plain.load_state_dict(first.state_dict())
    accelerate(first, x, verbose=False)
    kept = first.state_dict()
    second.load_state_dict(kept, assign=True)
    weights = {name: id(parameter) for name, parameter in second.named_parameters()}
    report = accelerate(second, x, verbose=False)
    assert [row.reason for row in report.layers if not row.swapped] == []
    assert isinstance(packed(second, "0").weight, PackedTensor)
    torch.testing.assert_close(second(x), plain(x))
    with torch.no_grad():
        second.get_parameter("0.weight").mul_(2)  # a weight of its own now
    assert torch.equal(first.get_parameter("0.weight").to_dense(), plain.get_parameter("0.weight"))
    restore(second)
    assert {name: id(parameter) for name, parameter in second.named_parameters()} == weights
    assert torch.equal(second.get_parameter("0.weight"), 2 * plain.get_parameter("0.weight"))
