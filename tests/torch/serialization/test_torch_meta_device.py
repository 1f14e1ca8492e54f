"""Models without memory of their own, and weights that are pruned but not packed in memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate as hugging_face_accelerate
import pytest
import safetensors.torch
from torch.nn import utils
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch_cases import conv_net, count_packed, mlp, pruned
from transformers import GPT2Config, GPT2LMHeadModel

import torch
from sparsam.torch import accelerate, load, pack, restore, save
from sparsam.torch.acceleration.memory import parameter_bytes
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

NAME = "sparsam.safetensors"


class Everything(nn.Module):
    """An embedding tied to a head, an LSTM, attention, experts in one Parameter, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.inner = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.register_buffer("positions", torch.arange(16.0), persistent=False)
        self.head = nn.Linear(16, 40)
        self.head.weight = self.embedding.weight
        self.steps = nn.Parameter(torch.tensor(3), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        y = self.lstm(self.embedding(x))[0] + self.get_buffer("positions")
        y = self.attention(y, y, y)[0] + self.inner(y)
        y = torch.einsum("eio,bti->bto", self.experts, y) * self.get_buffer("scale") * self.steps
        return self.head(self.norm(y))


def everything() -> tuple[nn.Module, Tensor]:
    return pruned(Everything()), torch.randint(0, 40, (2, 5))


def gpt2() -> tuple[nn.Module, Tensor]:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return pruned(GPT2LMHeadModel(config)), torch.randint(0, 50, (2, 5))


def computed() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(8, 8), nn.ReLU())
    prune.random_unstructured(model[1], "weight", 0.5)  # type: ignore[no-untyped-call]
    return model.eval(), torch.randn(2, 4, 10)


def hooked() -> tuple[nn.Module, Tensor]:
    """Weights that hooks compute before each call, as weight norm and spectral norm were before PyTorch 2."""
    spectral = utils.spectral_norm(nn.Linear(8, 8))
    masked = prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5)  # type: ignore[no-untyped-call]
    model = nn.Sequential(utils.weight_norm(nn.Conv1d(4, 8, 3)), spectral, masked, nn.Linear(8, 8))
    return pruned(model), torch.randn(2, 4, 10)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(), torch.randn(3, 24)),
    "conv net": lambda: (conv_net(), torch.randn(2, 3, 8, 8)),
    "everything": everything,
    "gpt2": gpt2,
    "computed": computed,
    "hooked": hooked,
}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    logits: Tensor = getattr(y, "logits", y)
    return logits


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("place", ["meta", "empty weights"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_on_the_meta_device_gets_everything_from_the_file(
    build: Callable[[], tuple[nn.Module, Tensor]], place: str, *, packed: bool, tmp_path: Path
) -> None:
    model, x = build()
    if build is computed and packed:
        pack(model[0])  # type: ignore[index]
        pack(model[1], activation=None)  # type: ignore[index]
    elif packed:
        accelerate(model, x, verbose=False)
    assert count_packed(model) > 0 or not packed
    save(model, tmp_path)
    with torch.device("meta") if place == "meta" else hugging_face_accelerate.init_empty_weights():
        fresh = build()[0]
    assert load(tmp_path, fresh) == count_packed(model)
    assert not any(isinstance(t, Tensor) and t.is_meta for m in fresh.modules() for t in vars(m).values())
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    assert {type(p) for p in fresh.parameters()} == {type(p) for p in model.parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in fresh.named_parameters()} == flags
    assert parameter_bytes(fresh) <= parameter_bytes(model)
    copies = [copy.deepcopy(fresh)]
    if build is not computed:  # torch pickles no parametrizations
        copies.append(pickle.loads(pickle.dumps(fresh)))
    for other in copies:
        assert torch.equal(outputs(other, x), outputs(model, x))
    assert restore(fresh) == restore(model)
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))
    for (name, one), other in zip(fresh.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_tied_on_the_meta_device_stays_tied(tmp_path: Path) -> None:
    model, x = gpt2()
    accelerate(model, x, verbose=False)
    save(model, tmp_path)
    with torch.device("meta"):
        fresh: Any = gpt2()[0]
    load(tmp_path, fresh)
    assert restore(fresh) == 9
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_loading_onto_the_meta_device_makes_no_dense_copy(tmp_path: Path) -> None:
    """What torch allocates while it loads is far below a dense weight."""
    model = pruned(nn.Sequential(nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False)), 0.9)
    accelerate(model, torch.randn(3, 512), verbose=False)
    save(model, tmp_path)
    dense = 4 * 512 * 2048
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False))
    with torch.profiler.profile(profile_memory=True) as profile:
        load(tmp_path, fresh)
    grown = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert max(grown, default=0) < dense // 2
    assert parameter_bytes(fresh) < dense // 2


def test_tensors_that_no_file_can_give(tmp_path: Path) -> None:
    class Odd(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.table = torch.ones(4)

    save(pruned(Odd()), tmp_path)
    with torch.device("meta"):
        fresh = Odd()
    with pytest.raises(
        ValueError, match="table: expected a tensor with numbers, or a buffer of the file; got one"
    ):
        load(tmp_path, fresh)
    assert fresh[0].weight.is_meta
    with pytest.raises(
        ValueError, match=r"0.weight: expected a tensor with numbers; got one on the meta device"
    ):
        save(fresh, tmp_path / "other")


# --- every pruned weight


def test_every_pruned_weight_is_packed_swapped_or_not(tmp_path: Path) -> None:
    model, x = everything()
    wanted = outputs(model, x)
    dense = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    save(model, tmp_path)
    found = safetensors.torch.load_file(tmp_path / NAME)
    assert {name.removesuffix("_bits") for name in found if name.endswith("_bits")} == {
        "embedding.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "experts",
        "inner.weight",
    }
    assert (tmp_path / NAME).stat().st_size < 0.55 * dense + 4000  # 1 bit and a quarter of 32, and the header
    fresh = Everything()
    assert load(tmp_path, fresh) == 0
    assert torch.equal(outputs(fresh, x), wanted)
    for (name, one), other in zip(fresh.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_tensor_comes_back_to_the_last_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(9, 13), "b": nn.Embedding(3, 5), "c": nn.Embedding(4, 4)}).to(
        dtype
    )
    with torch.no_grad():
        weight: Tensor = model["a"].get_parameter("weight")
        weight.zero_()
        weight[0, 0], weight[1, 3], weight[8, 12] = -0.0, torch.nan, torch.inf
        model["b"].get_parameter("weight").zero_()
    save(model, tmp_path)
    names = safetensors.torch.load_file(tmp_path / NAME).keys()
    assert names == {"a.weight", "a.weight_bits", "b.weight", "b.weight_bits", "c.weight"}
    fresh = nn.ModuleDict({"a": nn.Embedding(9, 13), "b": nn.Embedding(3, 5), "c": nn.Embedding(4, 4)}).to(
        dtype
    )
    load(tmp_path, fresh)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert one.detach().view(torch.uint8).equal(other.detach().view(torch.uint8))


def test_weights_that_differ_are_not_tied(tmp_path: Path) -> None:
    """A packed head that was changed, or rounded, is no longer the embedding that it was tied to."""
    for dtype, change in ((torch.bfloat16, 1.0), (None, 2.0)):
        model, x = gpt2()
        head: Any = model.get_submodule("lm_head")
        pack(head, dtype=dtype)
        with torch.no_grad():
            head.weight.mul_(change)
        save(model, tmp_path)
        fresh: Any = gpt2()[0]
        assert load(tmp_path, fresh) == 1
        assert torch.equal(outputs(fresh, x), outputs(model, x))
        packed_outputs = head.weight.to_dense()
        restore(fresh)
        assert torch.equal(fresh.lm_head.weight, packed_outputs)
        assert not torch.equal(fresh.lm_head.weight, fresh.transformer.wte.weight)


# --- files of others


def test_files_that_save_did_not_write_are_left_alone(tmp_path: Path) -> None:
    model, x = gpt2()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    wanted = outputs(model, x)
    with torch.no_grad():
        model.get_submodule("lm_head").get_parameter("weight").mul_(2)
    save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*before, NAME}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    again = GPT2LMHeadModel.from_pretrained(tmp_path)  # the dense one, as it was
    assert torch.equal(outputs(again, x), wanted)
    save(model, tmp_path)  # its own file is replaced


def test_transformers_refuses_a_folder_that_has_only_our_file(tmp_path: Path) -> None:
    model, _ = gpt2()
    model.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    save(model, tmp_path)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["other tensors", "a matrix", "text", "nothing"])
def test_a_file_of_our_name_that_is_not_ours(content: str, tmp_path: Path) -> None:
    file = tmp_path / NAME
    if content == "other tensors":
        safetensors.torch.save_file({"a": torch.ones(2)}, file)
    elif content == "a matrix":
        safetensors.torch.save_file({"a": torch.ones(2)}, file, {"sparsam": "SparseMatrix 1"})
    else:
        file.write_text(content if content == "text" else "")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"expected a file that save\(\) wrote, to replace it; got another"):
        save(mlp(), tmp_path)
    assert file.read_bytes() == before
