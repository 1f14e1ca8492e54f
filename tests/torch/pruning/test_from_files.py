"""`prune_files` of torch: one block in memory at a time, and the bits of `prune`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_models import check_same, from_files, in_memory, on_meta, rows, saved
from pruning_models import model_and_batches
from safetensors.torch import load_file, save_file

import torch
from sparsam.allocation import OWL
from sparsam.patterns import NM
from sparsam.reconstruction.sequential import LayerFit, LayerProblem, fit_layer
from sparsam.torch import prune_files
from sparsam.torch.pruning import layer_fits
from sparsam.torch.pruning.from_files import parts_in_turn
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("bert", "gpt2", "llama", "t5", "vit", "resnet")
OPTIONS: dict[str, dict[str, Any]] = {
    "admm": {"target_sparsity": 0.6},
    "obs": {"target_sparsity": 0.6, "method": "obs"},
    "own": {"target_sparsity": 0.6, "method": "obs", "targets": "own"},
    "wanda": {"target_sparsity": 0.5, "method": "wanda", "scope": "row"},
    "magnitude": {"target_sparsity": 0.5, "method": "magnitude"},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("albert", {"target_sparsity": 0.5}),  # its layer is used again and again
    "neox": ("neox", {"target_sparsity": 0.5}),  # two branches in parallel
    "attention": ("encoder", {"target_sparsity": 0.5}),  # nn.MultiheadAttention
    "convnet": ("convnet", {"target_sparsity": 0.5}),  # blocks that are layers
    "conv1d": ("conv1d", {"target_sparsity": 0.5}),
    "int8": ("llama", {"target_sparsity": 0.5, "values": "int8"}),
    "2:4": ("gpt2", {"target_sparsity": 0.5, "pattern": NM(2, 4), "method": "obs"}),
    "erk": ("bert", {"target_sparsity": 0.5, "allocation": "erk"}),
    "a block in between stays dense": ("llama", {"target_sparsity": 0.5, "exclude": ["model.layers.0"]}),
    "few samples": ("llama", {"target_sparsity": 0.5, "calibration_samples": 8}),
}
FILE = "model.safetensors"


@pytest.mark.parametrize("method", ["admm", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_prune(family: str, method: str, tmp_path: Path) -> None:
    compare(family, OPTIONS[method], tmp_path)


@pytest.mark.parametrize("method", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_the_bits_of_other_methods(family: str, method: str, tmp_path: Path) -> None:
    compare(family, OPTIONS[method], tmp_path)


@pytest.mark.parametrize(("family", "options"), OTHERS.values(), ids=OTHERS)
def test_the_bits_of_prune_in_other_cases(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    compare(family, options, tmp_path)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_files_keep_their_dtype(kind: torch.dtype, tmp_path: Path) -> None:
    compare("llama", {"target_sparsity": 0.5}, tmp_path, kind)


def compare(family: str, options: dict[str, Any], folder: Path, kind: torch.dtype | None = None) -> None:
    model, batches = model_and_batches(family, 8)
    state = saved(model, folder / FILE, kind)
    wanted, report = in_memory(model, state, batches, **options)
    found = from_files(model, folder / FILE, folder / "out", batches, **options)
    check_same(folder / "out" / FILE, wanted)
    assert rows(found) == rows(report)
    assert (found.calibration, found.warnings) == (report.calibration, report.warnings)
    assert sorted(path.name for path in folder.iterdir()) == [FILE, "out"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The part that comes into memory, and how many are there then, each time one comes."""
    found: list[tuple[str, int]] = []
    whole = parts_in_turn.PartsInTurn._open

    def watched(self: Any, gate: Any) -> None:
        was_open = gate.open
        whole(self, gate)
        if not was_open:
            name = next(name for name, held in self._held.items() if held.gate is gate)
            found.append((name, sum(held.gate.open for held in self._held.values())))

    monkeypatch.setattr(parts_in_turn.PartsInTurn, "_open", watched)
    return found


@pytest.mark.parametrize("targets", ["dense", "own"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "neox", "vit", "resnet", "convnet"])
def test_one_part_is_in_memory_at_a_time(
    family: str, targets: str, tmp_path: Path, opened: list[tuple[str, int]]
) -> None:
    model, batches = model_and_batches(family, 8)
    saved(model, tmp_path / FILE)
    from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5, targets=targets)
    assert {count for _, count in opened} == {1}
    times = [name for name, _ in opened]
    assert max(map(times.count, times)) == 3  # to see what is called, to prune, to write
    assert not any("lm_head" in name for name in times)


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    """The state in three files under an index, tensors in turn."""
    folder.mkdir()
    places = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(state)}
    for file in sorted(set(places.values())):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        save_file(part, folder / file, {"format": "pt", "of": file})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    (folder / "config.json").write_text("{}")
    return folder


def test_shards_keep_names_order_metadata_and_what_is_not_pruned(tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    pruned = saved(model, tmp_path / FILE)
    state = pruned | {"extra": torch.arange(5), "bytes": torch.zeros(0, 3)}
    source = sharded(tmp_path / "in", state)
    wanted, _ = in_memory(model, pruned, batches, target_sparsity=0.5)
    from_files(model, source, tmp_path / "out", batches, target_sparsity=0.5)
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        old, new = (source / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        if name.endswith(".json"):
            assert new == old
        else:
            length = 8 + int.from_bytes(old[:8], "little")
            assert (new[:length], len(new)) == (old[:length], len(old))
            for key, tensor in load_file(tmp_path / "out" / name).items():
                assert torch.equal(tensor, wanted.get(key, state[key])), key


@pytest.mark.parametrize("add", [True, False])
def test_a_prefix_that_only_one_side_has(add: bool, tmp_path: Path) -> None:
    model, batches = model_and_batches("bert", 8)
    state = saved(model, tmp_path / FILE)
    wanted, _ = in_memory(model, state, batches, target_sparsity=0.5)

    def other(name: str) -> str:
        return f"bert.{name}" if add else name

    model.base_model_prefix = "bert"
    save_file({other(name): tensor for name, tensor in state.items()}, tmp_path / FILE)
    from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    check_same(tmp_path / "out" / FILE, {other(name): tensor for name, tensor in wanted.items()})


class Stop(BaseException):
    pass


@pytest.mark.parametrize("family", ["llama", "resnet", "t5"])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_stopped_run_goes_on(
    family: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches(family, 8)
    state = saved(model, tmp_path / FILE)
    wanted, _ = in_memory(model, state, batches, target_sparsity=0.5)
    fits: list[str] = []

    def counted(problem: LayerProblem) -> LayerFit:
        if len(fits) == after:
            raise Stop
        fits.append(problem.name)
        return fit_layer(problem)

    monkeypatch.setattr(layer_fits, "fit_layer", counted)
    with pytest.raises(Stop):
        from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    assert not (tmp_path / "out").exists()
    again: list[str] = []

    def recorded(problem: LayerProblem) -> LayerFit:
        again.append(problem.name)
        return fit_layer(problem)

    monkeypatch.setattr(layer_fits, "fit_layer", recorded)
    from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    check_same(tmp_path / "out" / FILE, wanted)
    assert len(set(fits) & set(again)) <= (4 if after == 6 else 2)  # of the group in which it was stopped
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "out"]


def test_all_fitted_and_stopped_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches("resnet", 8)
    state = saved(model, tmp_path / FILE)
    wanted, _ = in_memory(model, state, batches, target_sparsity=0.5)

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("sparsam.torch.pruning.from_files.shard_writing.prune_shard", stop)
        with pytest.raises(Stop):
            from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    monkeypatch.setattr(layer_fits, "fit_layer", stop)
    from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    check_same(tmp_path / "out" / FILE, wanted)


class Plain(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = inner or nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.blocks[1].weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Outside(nn.Module):
    """A block's weight that is used without calling the block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](x) @ self.blocks[1].weight
        return result


def lacking(model: nn.Module, file: Path) -> None:
    state = saved(model, file)
    state.pop("layers.0.linear1.weight")
    save_file(state, file)


def reshaped(model: nn.Module, file: Path) -> None:
    state = saved(model, file)
    state["layers.0.linear1.weight"] = torch.zeros(48, 31)
    save_file(state, file)


def eight_bits(model: nn.Module, file: Path) -> None:
    state = saved(model, file)
    state["layers.0.linear1.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    save_file(state, file)


def encoder() -> nn.Module:
    made: nn.Module = model_and_batches("encoder", 1)[0]
    return made


def meta_buffers() -> nn.Module:
    made = encoder()
    made.register_buffer("scale", torch.empty(2, device="meta"), persistent=False)
    return made


Save = Callable[[nn.Module, Path], Any]
REFUSED: list[tuple[Callable[[], nn.Module], Save, dict[str, Any], str]] = [
    (Plain, saved, {}, "model: expected blocks in a list of modules .*; got none in Plain; load it, and"),
    (Shared, saved, {}, "weight 'blocks.0.weight': .* single block .*; got one that is also 'blocks.1.w"),
    (Outside, saved, {}, "calibration: expected inputs that reach every weight .*; got none for 'blocks.1"),
    (encoder, lacking, {}, "tensor 'layers.0.linear1.weight': expected it in the files; got none of that"),
    (encoder, reshaped, {}, r"tensor 'layers.0.linear1.weight': expected the shape \[48, 32\] in .*; got"),
    (encoder, eight_bits, {}, "tensor 'layers.0.linear1.weight': expected one of F16, .*; got I8; convert"),
    (meta_buffers, saved, {}, "model: expected buffers on the CPU, .*; got \"?'scale' on meta"),
    (encoder, saved, {"scope": "global", "method": "magnitude"}, "config: .* layer by layer, .*; got sc"),
    (encoder, saved, {"allocation": "lamp"}, "allocation: expected one that needs no weights; got 'lamp'"),
    (encoder, saved, {"allocation": OWL({})}, "allocation: expected one that needs no weights; got OWL"),
    (encoder, saved, {"memory": "20kiB"}, "memory: expected a number of bytes"),
    (encoder, saved, {"memory": "20KiB"}, "memory: expected at least 1MiB, for 'layers.1' and the work on"),
    (encoder, saved, {"targets": "both"}, "targets: expected 'dense' or 'own'; got 'both'"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "save", "options", "message"), REFUSED)
def test_what_is_refused(
    build: Callable[[], nn.Module], save: Save, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    save(model, tmp_path / FILE)
    size = 4 if isinstance(model, (Plain, Shared, Outside)) else 32
    batches = [torch.randn(4, 3, size) for _ in range(4)]
    with pytest.raises(ValueError, match=message):
        from_files(model, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5, **options)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


class Words(nn.Module):
    """A table of 4 MiB, and a small block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1 << 16, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](self.table(ids))
        return result


def test_tables_do_not_count_as_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words().eval()
    state = saved(model, tmp_path / FILE, torch.bfloat16)
    batches = [torch.arange(40 * i, 40 * (i + 1)).reshape(4, 10) for i in range(8)]
    wanted, _ = in_memory(model, state, batches, target_sparsity=0.5)
    options = {"target_sparsity": 0.5, "memory": "1MiB"}
    from_files(model, tmp_path / FILE, tmp_path / "out", batches, **options)
    check_same(tmp_path / "out" / FILE, wanted)


def test_a_model_with_its_values_is_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches("encoder", 2)
    saved(model, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"model: expected weights on the meta device, .*; got"):
        prune_files(model, tmp_path / FILE, tmp_path / "out", batches)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model, batches = model_and_batches("resnet", 4)
    saved(model, tmp_path / FILE)
    empty = on_meta(model)
    before = {name: buffer.clone() for name, buffer in empty.named_buffers()}
    prune_files(empty, tmp_path / FILE, tmp_path / "out", batches, target_sparsity=0.5)
    assert all(one.is_meta for one in empty.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in empty.named_buffers())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in empty.modules())
