from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BFLOAT16, write_raw
from sparsam import PruningConfig, allocation, checkpoint, prune
from sparsam.checkpoint.locks import locked
from sparsam.checkpoint.plan import parse_size
from sparsam.checkpoint.ranking_passes import Counts, Ranking, find_threshold
from sparsam.patterns import NM, Block, Slices, Tied, Unstructured
from sparsam.scores import Magnitude

CONFIGS = {
    "layer": {},
    "row": {"scope": "row", "target_sparsity": 0.7},
    "global": {"scope": "global"},
    "nothing": {"scope": "global", "target_sparsity": 0.0},
    "everything": {"scope": "global", "target_sparsity": 1.0},
    "nm": {"pattern": NM(2, 4)},
    "global nm": {"pattern": NM(2, 4), "scope": "global"},
    "channels": {"pattern": NM(1, 4, "channels"), "overrides": {"l3*": 0.75}},
    "global blocks": {"pattern": Block(4, 4), "scope": "global", "method": Magnitude(2)},
    "global slices": {"pattern": Slices(0), "scope": "global", "transposed": "l1*"},
    "erk": {"allocation": "erk", "target_sparsity": 0.9},
    "lamp": {"allocation": "lamp", "target_sparsity": 0.9},
    "allocation global": {"allocation": "global", "overrides": {"l1.*": 0.9, "bias": 0.5}, "exclude": "l2*"},
    "global lamp": {"scope": "global", "method": "lamp", "transposed": "l*"},
    "global random": {"scope": "global", "method": "random"},
}


def tensors() -> dict[str, Any]:
    """Mixed dtypes with many ties and zeros; integers, a vector and an empty tensor among them."""
    rng = np.random.default_rng(3)
    kinds = [np.float32, BFLOAT16, np.float16, np.float64]
    weights: dict[str, Any] = {
        f"l{i}.weight": (rng.standard_normal((24, 32)) * (1 + i)).astype(kinds[i % 4]) for i in range(6)
    }
    weights["l0.weight"][:8] = 0
    weights["l3.weight"] = np.round(rng.standard_normal((8, 8, 3, 3)), 1)
    return weights | {
        "bias": rng.standard_normal(8).astype(np.float32),
        "ids": np.arange(12).reshape(3, 4),
        "none": np.zeros((0, 4), np.float32),
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards, one of dtypes that NumPy lacks, and what lies beside them."""
    folder = tmp_path / "model"
    weights = tensors()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    placed = {name: names[i % 2] for i, name in enumerate(weights)} | {"f8": names[2], "odd": names[2]}
    for file in names[:2]:
        part = {name: array for name, array in weights.items() if placed[name] == file}
        (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder / file, part, {"format": "pt"})
    header = (
        b'{"odd":{"dtype":"X_99","shape":[3,5],"data_offsets":[6,17]},'
        b'"f8":{"dtype":"F8_E4M3","shape":[2,3],"data_offsets":[0,6]}}'
    )
    write_raw(folder / names[2], header, 17)
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": placed}
    (folder / checkpoint.INDEX_NAME).write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", ".hidden", "pytorch_model.bin"):
        (folder / name).write_text(f"{{}} {name}")
    return folder


def dense(folder: Path) -> dict[str, Any]:
    return {
        name: array
        for file in sorted(folder.glob("model-*[12]-of-*"))
        for name, array in checkpoint.load(file).weights.items()
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_the_bits_are_those_of_pruning_in_memory(shards: Path, tmp_path: Path, fields: Any) -> None:
    config = PruningConfig(**fields)
    before = content(shards)
    report = checkpoint.prune_files(shards, tmp_path / "out", config)
    known = dense(shards)
    expected = prune(dict(sorted(known.items())), config)
    pruned = dense(tmp_path / "out")
    assert {name: array.tobytes() for name, array in pruned.items()} == {
        name: array.tobytes() for name, array in expected.weights.items()
    }
    assert [row for row in report.layers if row.name in known] == list(expected.report.layers)
    assert [
        (row.dtype, row.total_params, row.dense_bytes) for row in report.layers if row.name not in known
    ] == [
        ("f8_e4m3", 6, 6),
        ("x_99", 15, 11),
    ]
    # Headers, index, unknown dtypes and what is no weight: byte for byte. Weights of other kinds stay behind.
    after = content(tmp_path / "out")
    assert content(shards) == before
    assert before.keys() - after.keys() == {".hidden", "pytorch_model.bin"}
    for name in after:
        same = len(before[name])
        if name.startswith(("model-00001", "model-00002")):
            same = 8 + int.from_bytes(before[name][:8], "little")
        assert after[name][:same] == before[name][:same]
        assert len(after[name]) == len(before[name])
    assert not list(tmp_path.glob(".*"))


def test_executors_and_little_memory_change_nothing(shards: Path, tmp_path: Path) -> None:
    config = PruningConfig(0.8, scope="global")
    report = checkpoint.prune_files(shards, tmp_path / "serial", config)
    seen: list[tuple[str, int, int]] = []
    with ThreadPoolExecutor(2) as threads:
        again = checkpoint.prune_files(
            shards,
            tmp_path / "threads",
            config,
            executor=threads,
            memory=9000,
            progress=lambda *args: seen.append(args),
        )
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        checkpoint.prune_files(shards, tmp_path / "processes", config, executor=processes)
    assert again == report
    assert content(tmp_path / "serial") == content(tmp_path / "threads") == content(tmp_path / "processes")
    assert {what for what, *_ in seen} == {"sampling", "counting", "pruning"}
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]


def test_one_file_to_a_file_or_a_directory_and_over_itself(tmp_path: Path) -> None:
    source = tmp_path / "dense.safetensors"
    checkpoint.save(source, tensors(), {"format": "pt"})
    for target, written in [("a.safetensors", "a.safetensors"), ("new", "new/model.safetensors")]:
        checkpoint.prune_files(source, tmp_path / target)
        assert checkpoint.load(tmp_path / written).metadata == {"format": "pt"}
    checkpoint.prune_files(source, tmp_path / "new")
    wanted = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "new/model.safetensors").read_bytes() == wanted
    checkpoint.prune_files(source, source)
    assert source.read_bytes() == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"dense.safetensors", "a.safetensors", "new"}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, -2.0, 1e30, math.inf]), max_size=40),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_thresholds_by_counting(values: list[list[float]], sparsity: float, room: int) -> None:
    kinds = [np.float32, np.float64, np.float16, BFLOAT16]
    with np.errstate(over="ignore"):
        arrays = {
            f"t{i}": np.array(v, np.float64).clip(-6e4, math.inf).astype(kinds[i])
            for i, v in enumerate(values)
        }
    sizes = {name: array.size for name, array in arrays.items()}
    together = np.sort(np.concatenate([np.abs(a.astype(np.float64)) for a in arrays.values()]))
    k = round(sparsity * together.size)
    ranking = Ranking(Magnitude(), Unstructured(), True, frozenset())

    def count(low: float, high: float) -> dict[str, Counts]:
        return {name: ranking.count(name, array, low, high, room) for name, array in arrays.items()}

    # Samples that mislead cost passes, and nothing else.
    found = find_threshold(k, sizes, lambda attempt: together[attempt::7], count)
    assert found.value == (together[k - 1] if k else 0.0)
    cuts = found.cuts(k, arrays)
    pruned = sum(ranking.apply(name, array, cuts[name])[0] for name, array in arrays.items())
    assert pruned == k


def test_what_cannot_be_done_is_said_at_once(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for config, options, message in [
        (
            PruningConfig(),
            {"memory": "1KiB"},
            r"memory: expected at least 1MiB, for tensor .l3\.weight. and the work",
        ),
        (
            PruningConfig(),
            {"memory": "much"},
            "memory: expected a number of bytes, such as 2GiB; got 'much'; write",
        ),
        (
            PruningConfig(ties=Tied({"l0.weight": Slices(0)})),
            {},
            "ties: expected none, .* got some; use sparsam.prune",
        ),
        (PruningConfig(allocation=allocation.OWL({})), {}, "allocation: expected one that needs no weights"),
        (PruningConfig(pattern=NM(2, 5)), {}, "expected a multiple of 5 weights in a row; got 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint.prune_files(shards, out, config, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tensor 'f8': expected one of the dtypes .*; got F8_E4M3; exclude"):
        checkpoint.prune_files(shards, out, PruningConfig(overrides={"f8": 0.5}))
    with pytest.raises(ValueError, match="expected a directory, for several shards; got a file's name"):
        checkpoint.prune_files(shards, tmp_path / "a.safetensors")
    checkpoint.save(tmp_path / "nan.safetensors", {"w": np.array([[1, math.nan]], np.float32)})
    for scope in ("layer", "global"):
        with pytest.raises(
            ValueError, match=r"tensor 'w': expected numbers to rank; got NaN at index \(0, 1\)"
        ):
            checkpoint.prune_files(tmp_path / "nan.safetensors", out, PruningConfig(scope=scope))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "nan.safetensors"}


def test_folders_that_could_not_be_read_afterwards_are_left_alone(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.save(other / "model.safetensors", {"w": np.ones((2, 2), np.float32)})
    before = content(other)
    with pytest.raises(ValueError, match=r"expected a folder without model\.safetensors, since"):
        checkpoint.prune_files(shards, other)
    assert content(other) == before
    linked = tmp_path / "linked"
    linked.mkdir()
    for i in (1, 2):
        (linked / f"model-0000{i}-of-00003.safetensors").symlink_to(tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"expected a file for each shard; got links to one, .*; unlink them"
    ):
        checkpoint.prune_files(shards, linked)
    assert {path.name for path in linked.iterdir()} == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2)}
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("1.5 KiB", 1536), ("3MB", 3_000_000), (7, 7)])
def test_sizes(text: Any, size: int) -> None:
    assert parse_size("memory", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", 0, True, "1 XB", "2GiBs", None])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="memory: expected a number of bytes"):
        parse_size("memory", text)


KILLED = """
import os, signal, sys
from sparsam import PruningConfig, checkpoint
from sparsam.checkpoint import shard_passes
shard_passes._MARK, shard_passes.PIECE = 1 << 12, 1 << 11
calls = []
def progress(what, done, total):
    calls.append(what)
    if what == sys.argv[3] and calls.count(what) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.prune_files(sys.argv[1], sys.argv[2], PruningConfig(0.8, scope="global"), memory=30_000,
    progress=progress)
"""


def test_a_killed_run_shows_nothing_and_goes_on(shards: Path, tmp_path: Path) -> None:
    config = PruningConfig(0.8, scope="global")
    checkpoint.prune_files(shards, tmp_path / "whole", config)
    out, old = tmp_path / "out", tmp_path / "old"
    checkpoint.prune_files(shards, old, PruningConfig(0.1))
    before = content(old)
    codes = []
    moments = [(out, "counting", 2), (out, "pruning", 5), (out, "pruning", 2), (old, "pruning", 9)]
    for target, what, call in moments:
        command = [sys.executable, "-c", KILLED, str(shards), str(target), what, str(call)]
        codes.append(subprocess.run(command, check=False).returncode)
        assert not out.exists()
        assert {name: data for name, data in content(old).items() if not name.startswith(".")} == before
    assert codes == [-signal.SIGKILL] * 4
    (staging,) = tmp_path.glob(".sparsam-*.partial")
    kept = [path for path in (staging / "files").iterdir() if path.suffix != ".mark"]
    assert kept, "expected shards, whole or in part, to go on with"
    seen: list[str] = []
    for target in (out, old):
        checkpoint.prune_files(shards, target, config, progress=lambda what, *_: seen.append(what))
        assert content(target) == content(tmp_path / "whole")
    assert set(seen) == {"pruning"}, "the threshold was kept too"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "out", "old"}


def test_another_run_clears_what_a_killed_one_left(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(shards), str(tmp_path / "out"), "pruning", "5"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    checkpoint.prune_files(shards, tmp_path / "out", PruningConfig(0.3))
    checkpoint.prune_files(shards, tmp_path / "again", PruningConfig(0.3))
    assert content(tmp_path / "out") == content(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "again"}


def test_a_move_that_was_interrupted_is_ended(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    checkpoint.prune_files(shards, out, PruningConfig(0.1))
    checkpoint.prune_files(shards, tmp_path / "whole", PruningConfig(0.9))
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.parent == out and target.name.startswith("model-00002"):
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune_files(shards, out, PruningConfig(0.9))
    assert not (out / checkpoint.INDEX_NAME).exists(), "new and old shards are no checkpoint"
    checkpoint.prune_files(shards, out, PruningConfig(0.9))
    assert content(out) == content(tmp_path / "whole")


def test_one_run_at_a_time(shards: Path, tmp_path: Path) -> None:
    def progress(*_: object) -> None:
        with pytest.raises(ValueError, match="expected a target of one run; got one that another run writes"):
            checkpoint.prune_files(shards, tmp_path / "out")

    checkpoint.prune_files(shards, tmp_path / "out", progress=progress)


def test_a_lock_ends_with_the_process_that_took_it(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom sparsam.checkpoint.locks import locked\n"
        "with locked(Path(sys.argv[1])) as free:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        time.sleep(60)\n"
        "    print(child, free, flush=True)\n    os._exit(0)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(file)]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child, free = done.stdout.readline().split()
    done.wait()
    try:
        assert free == "True"
        with locked(file) as again:
            assert again
            with locked(file) as twice:
                assert not twice
    finally:
        os.kill(int(child), signal.SIGKILL)
        done.stdout.close()


MEASURED = """
import sys
from sparsam import PruningConfig, checkpoint
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
before = peak()
checkpoint.prune_files(sys.argv[1], sys.argv[2], PruningConfig(0.8, scope=sys.argv[3]), memory=sys.argv[4])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this machine has no /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((3072, 2048), dtype=np.float32) for i in range(10)}
    checkpoint.save(tmp_path / "large.safetensors", weights)
    assert (tmp_path / "large.safetensors").stat().st_size > 240 << 20
    for scope in ("layer", "global"):
        out = tmp_path / f"{scope}.safetensors"
        command = [
            sys.executable,
            "-c",
            MEASURED,
            str(tmp_path / "large.safetensors"),
            str(out),
            scope,
            "64MiB",
        ]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert peak <= 64 << 20
    expected = prune(weights, target_sparsity=0.8, scope="global", inplace=True).weights
    for name, array in checkpoint.stream(tmp_path / "global.safetensors"):
        assert np.array_equal(array, expected[name]), name
