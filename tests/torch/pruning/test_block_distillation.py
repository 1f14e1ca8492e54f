"""`prune_files` with training: block by block towards the dense network's; zeros stay zero."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from file_models import check_same, from_files, on_meta, saved
from pruning_models import model_and_batches
from safetensors.torch import load_file

import torch
from sparsam.torch import distill, prune_files
from sparsam.torch.pruning.from_files import block_distillation
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "model.safetensors"
OBS: dict[str, Any] = {"target_sparsity": 0.6, "method": "obs"}
TRAINED = OBS | {"distill_steps": 30}


def hidden(model: nn.Module, state: dict[str, Tensor], batches: Any) -> list[Tensor]:
    """The last hidden states of a model with some weights."""
    other = copy.deepcopy(model)
    other.load_state_dict(state, strict=False)
    with torch.no_grad():
        return [other(**batch, output_hidden_states=True).hidden_states[-1] for batch in batches]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    pairs = list(zip(some, others, strict=True))
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(
        float(b.square().sum()) for _, b in pairs
    )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_outputs_come_nearer_and_zeros_stay(family: str, tmp_path: Path) -> None:
    model, given = model_and_batches(family, 16)
    batches, fresh = given[:12], given[12:]
    state = saved(model, tmp_path / FILE)
    plain = from_files(model, tmp_path / FILE, tmp_path / "plain", batches, **OBS)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    pruned, trained = load_file(tmp_path / "plain" / FILE), load_file(tmp_path / "out" / FILE)
    wanted = hidden(model, state, fresh)
    assert distance(hidden(model, trained, fresh), wanted) < distance(hidden(model, pruned, fresh), wanted)
    weights = [row.name for row in report.pruned]
    assert weights
    for name in weights:
        assert torch.equal(trained[name] == 0, pruned[name] == 0), name
    assert [row.sparsity for row in report.layers] == [row.sparsity for row in plain.layers]
    blocks = [block.name for block in report.distilled]
    assert len(blocks) == 2
    assert all(block.steps == 30 and block.improved for block in report.distilled)
    # Norms and biases of blocks are trained too; what is outside of blocks is as it was, byte for byte.
    same = {name for name in state if torch.equal(trained[name], pruned[name])}
    assert same == {name for name in state if not name.startswith(tuple(f"{block}." for block in blocks))}
    assert plain.distilled == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "out", "plain"]


def test_the_errors_are_those_of_the_blocks_on_batches_that_are_not_trained_with(tmp_path: Path) -> None:
    """Each block in the network of the new weights of all blocks before it, computed in memory."""
    model, batches = model_and_batches("llama", 12)
    state = saved(model, tmp_path / FILE)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    trained = load_file(tmp_path / "out" / FILE)
    first = report.distilled[0]
    new, old = copy.deepcopy(model), copy.deepcopy(model)
    new.load_state_dict(trained, strict=False)
    old.load_state_dict(state, strict=False)
    found: list[Tensor] = []
    for network in (new, old):
        block = network.get_submodule(first.name)
        handle = block.register_forward_hook(lambda _, __, output: found.append(output))
        with torch.no_grad():
            network(**batches[5])  # of twelve, the sixth
        handle.remove()
    rows = batches[5]["attention_mask"].bool() if "attention_mask" in batches[5] else slice(None)
    a, b = (one[rows].double() for one in found)
    assert first.after == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_same_bits_each_time_and_after_a_stop(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE, dtype)
    from_files(model, tmp_path / FILE, tmp_path / "once", batches, **TRAINED)
    whole = distill
    for after in (0, 1):
        target = tmp_path / f"stopped-{after}"
        calls = itertools.count()

        def stop(*args: Any, calls: Any = calls, after: int = after, **options: Any) -> Any:
            if next(calls) == after:
                raise KeyboardInterrupt
            return whole(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(block_distillation, "distill", stop)
            with pytest.raises(KeyboardInterrupt):
                from_files(model, tmp_path / FILE, target, batches, **TRAINED)
        assert not target.exists()
        again: list[int] = []

        def counted(*args: Any, again: list[int] = again, **options: Any) -> Any:
            again.append(1)
            return whole(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(block_distillation, "distill", counted)
            report = from_files(model, tmp_path / FILE, target, batches, **TRAINED)
        assert len(again) == 2 - after, "a block that was done is not trained again"
        assert len(report.distilled) == 2
        check_same(target / FILE, load_file(tmp_path / "once" / FILE))


def test_stopped_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    once = from_files(model, tmp_path / FILE, tmp_path / "once", batches, **TRAINED)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsam.torch.pruning.from_files.shard_writing.prune_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    monkeypatch.setattr(block_distillation, "distill", stop)
    again = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    check_same(tmp_path / "out" / FILE, load_file(tmp_path / "once" / FILE))
    assert again.distilled == once.distilled


def test_a_block_that_is_not_better_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    from_files(model, tmp_path / FILE, tmp_path / "plain", batches, **OBS)
    whole = distill

    def spoilt(student: nn.Module, *args: Any, **options: Any) -> Any:
        report = whole(student, *args, **options)
        with torch.no_grad():
            for one in student.parameters():
                one.mul_(3)
        return report

    monkeypatch.setattr(block_distillation, "distill", spoilt)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    assert all(not block.improved and block.final == block.before for block in report.distilled)
    check_same(tmp_path / "out" / FILE, load_file(tmp_path / "plain" / FILE))
    assert "distilled: 0 of 2 blocks are better" in str(report)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_methods_that_fit_nothing(method: str, tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    options = {"target_sparsity": 0.5, "method": method, "targets": "own", "distill_steps": 20}
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **options)
    assert all(block.improved for block in report.distilled)
    assert report.pruned_sparsity == 0.5


def test_everything_pruned_stays_zero(tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    options = TRAINED | {"overrides": {"*.down_proj.weight": 1.0}, "method": "magnitude"}
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **options)
    found = load_file(tmp_path / "out" / FILE)
    names = [row.name for row in report.pruned if row.name.endswith("down_proj.weight")]
    assert len(names) == 2
    assert not any(found[name].any() for name in names)


def test_a_time_for_all_blocks(tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **OBS, distill_seconds=0.2)
    assert [block.steps > 0 for block in report.distilled] == [True, True]


def test_a_block_that_is_called_again_and_again_keeps_what_pruning_gave(tmp_path: Path) -> None:
    model, batches = model_and_batches("albert", 8)
    saved(model, tmp_path / FILE)
    from_files(model, tmp_path / FILE, tmp_path / "plain", batches, **OBS)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", batches, **TRAINED)
    assert report.distilled == ()
    assert any("expected blocks that each pass calls once; got 'encoder.alb" in w for w in report.warnings)
    check_same(tmp_path / "out" / FILE, load_file(tmp_path / "plain" / FILE))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"distill_steps": 0}, "distill_steps: expected an integer of at least 1; got 0"),
    ({"distill_seconds": 0.0}, "distill_seconds: expected a time above 0; got 0.0; raise it"),
    ({"distill_seconds": math.nan}, "distill_seconds: expected a time above 0; got nan"),
    ({"distill_seconds": True}, "distill_seconds: expected a time above 0; got True"),
    ({"distill_steps": 2, "values": "int8"}, "values: expected none with training, which changes them; got"),
    (
        {"distill_steps": 2, "exclude": "model.layers.*", "overrides": {"lm_head.weight": 0.5}},
        "model: expected blocks with weights to prune; got",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        from_files(model, tmp_path / FILE, tmp_path / "out", batches, **(OBS | options))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_model_in_half_precision_is_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches("llama", 8)
    saved(model, tmp_path / FILE, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"model: expected one in float32, to be trained; got 'model\.layers"
    ):
        prune_files(on_meta(model.bfloat16()), tmp_path / FILE, tmp_path / "out", batches, **TRAINED)


class Block(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


class Blocks(nn.Module):
    """Two blocks, with one norm or two, through which a pass goes once or twice in turn."""

    def __init__(self, *, shared: bool, rounds: int) -> None:
        super().__init__()
        norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList([Block(norm), Block(norm if shared else nn.LayerNorm(16))])
        self.head, self.rounds = nn.Linear(16, 4), rounds

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks) * self.rounds:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def drawn(number: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 16) for _ in range(number)]


def test_blocks_that_are_called_in_turn_several_times_stay_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks(shared=False, rounds=2).eval()
    saved(model, tmp_path / FILE)
    plain: dict[str, Any] = {"target_sparsity": 0.5, "method": "wanda"}
    from_files(model, tmp_path / FILE, tmp_path / "plain", drawn(5), **plain)
    report = from_files(model, tmp_path / FILE, tmp_path / "out", drawn(5), distill_steps=5, **plain)
    assert "each pass calls once; got 'blocks.0' (and 1 others)" in report.warnings[-1]
    assert report.distilled == ()
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "plain" / FILE).read_bytes()


def test_what_several_blocks_share_is_not_trained(tmp_path: Path) -> None:
    """Each block would want other values, and only one could have them."""
    torch.manual_seed(0)
    model = Blocks(shared=True, rounds=1).eval()
    state = saved(model, tmp_path / FILE)
    report = from_files(
        model,
        tmp_path / FILE,
        tmp_path / "out",
        drawn(12),
        target_sparsity=0.5,
        method="wanda",
        distill_steps=40,
    )
    trained = load_file(tmp_path / "out" / FILE)
    assert all(block.improved for block in report.distilled)
    same = {name for name in state if torch.equal(trained[name], state[name])}
    assert same == {"blocks.0.norm.weight", "blocks.0.norm.bias", "head.bias"}
    other = copy.deepcopy(model)
    other.load_state_dict(trained, strict=False)
    with torch.no_grad():  # the error of the last block is that of what was written
        found, wanted = [one.blocks[1](one.blocks[0](drawn(12)[5])) for one in (other, model)]
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert report.distilled[1].after == pytest.approx(error, rel=1e-4)


def test_blocks_with_nothing_to_train_stay_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks(shared=True, rounds=1).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    state = saved(model, tmp_path / FILE)
    options: dict[str, Any] = {"target_sparsity": 1.0, "method": "wanda", "distill_steps": 3}
    report = from_files(model, tmp_path / FILE, tmp_path / "out", drawn(5), **options)
    assert [(block.steps, block.improved) for block in report.distilled] == [(0, False), (0, False)]
    found = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(found[name], state[name]) == ("norm" in name) for name in state)
