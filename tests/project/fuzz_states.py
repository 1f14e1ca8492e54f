"""Mutates the JSON that the package reads back and loads it: each must work, or be refused in one form.

    python tests/project/fuzz_states.py --n 50000

`test_states.py` does some of it in every run. Prints how many mutations of each format were refused and how
many loaded; any other exception ends it with a traceback and the number of the mutation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np

import network
from cases import model
from cost_models import made
from messages import FORM
from sparsam import IterativePruner, Mask, PruningConfig, checkpoint, sensitivity
from sparsam.analysis.sensitivity_report import SensitivityReport
from sparsam.analysis.sweep_store import SweepStore
from sparsam.checkpoint.json_state import read
from sparsam.sparse import cost_model, matmul
from sparsam.sparse.cost_model import CostModel, Costs
from sparsam.sparse.dispatch import choose
from sparsam.torch.serialization.manifest import Layer, Manifest, Weight
from sparsam.training.run_identity import RunIdentity
from sparsam.training.saved_run import StateDir

Load = Callable[[bytes], object]

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "inf", "nan", "../x", "\ud800", [], [[]], {}, {"a": 1}, [1, 0.5, 1, 1]),
    *(0, -1, 1, 0.5, -1e25, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan),
    *(2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
)


def run(folder: Path) -> tuple[bytes, Load]:
    """`state.json` of an iterative run."""
    pruner = IterativePruner(num_iterations=3)
    whole, used = folder / "whole", folder / "used"
    pruner.run(model(), lambda w: float(np.count_nonzero(w["fc1.weight"])), state_dir=whole)
    dense = model()
    identity = RunIdentity.of(pruner.config, pruner.get_schedule(), dense)
    pruned = list(pruner.run(model(), lambda _: 0.0).masks)

    def load(data: bytes) -> None:
        if not (used / "sparsam-0003").exists():  # a state without history clears it
            shutil.rmtree(used, ignore_errors=True)
            shutil.copytree(whole, used)
        (used / "state.json").write_bytes(data)
        with StateDir(used, identity) as state:
            progress = state.load(dense, pruned)
            assert progress is not None
            state.save(progress)

    return (whole / "state.json").read_bytes(), load


def sweep(folder: Path) -> tuple[bytes, Load]:
    """The state of a sensitivity sweep."""
    file = folder / "sweep.json"
    weights = network.weights()
    sensitivity(weights, network.accuracy, (0.5, 0.9), state=file)
    seed = file.read_bytes()
    found = json.loads(seed)["identity"]
    config = PruningConfig(target_sparsity=None, schedule=None, num_iterations=None)
    store = SweepStore(file, RunIdentity.of(config, (), weights, found["groups"]))

    def load(data: bytes) -> None:
        file.write_bytes(data)
        store.save(store.load())

    load(seed)
    return seed, load


def report(_: Path) -> tuple[bytes, Load]:
    """A sensitivity report, and what is made of one."""

    def load(data: bytes) -> None:
        found = SensitivityReport.from_json(data)
        assert SensitivityReport.from_json(found.to_json()) == found
        assert str(found)
        found.predicted_loss(found.allocate(min(0.5, found.max_sparsity)))

    return sensitivity(network.weights(), network.accuracy, (0.25, 0.5, 0.9)).to_json().encode(), load


def manifest(_: Path) -> tuple[bytes, Load]:
    """The metadata of an accelerated model, as one JSON object of JSON texts."""
    both = ("bitmask", "panels")
    weights = {
        "0.weight": Weight((32, 24), "float32", transposed=False),
        "2.weight": Weight((8, 32), "bfloat16", transposed=True),
        "6.weight": Weight((4, 2, 3, 3), "float16", transposed=False),
    }
    layers = {
        "0": Layer(1, "relu", both, None),
        "2": Layer(1, None, ("bitmask",), None),
        "4": Layer(1, None, ("bitmask",), None),
        "6": Layer(2, "silu", ("panels",), None),
        "8": Layer(1, None, ("panels",), "bfloat16"),
    }
    tied = {"0.bias": "2.bias", "4.weight": "2.weight"}
    metadata = Manifest(weights, layers, {"1": ("0",)}, tied, ("positions",)).to_metadata()
    nested = {key: json.loads(text) if text[0] in "{[" else text for key, text in metadata.items()}

    def load(data: bytes) -> None:
        try:
            content = json.loads(data)
            texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in content.items()}
        except (ValueError, RecursionError):  # of broken bytes the library of the format makes such texts
            texts = metadata | {"layers": data.decode(errors="replace")}
        found = Manifest.from_metadata(texts)
        assert Manifest.from_metadata(found.to_metadata()) == found

    return json.dumps(nested).encode(), load


def index(folder: Path) -> tuple[bytes, Load]:
    """The index of a sharded checkpoint."""
    file = folder / checkpoint.INDEX_NAME
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    for shard in set(places.values()):
        names = [name for name, place in places.items() if place == shard]
        checkpoint.save(folder / shard, {name: np.ones(2, np.float32) for name in names})
    seed = json.dumps({"metadata": {"total_size": 24, "by": "us"}, "weight_map": places}).encode()

    def load(data: bytes) -> None:
        file.write_bytes(data)
        checkpoint.load(file)

    return seed, load


def calibration(folder: Path) -> tuple[bytes, Load]:
    """Measured costs of products, and choices made by them."""
    seed = made()
    file = folder / "costs.json"
    weights = [cost_model.Weight(0, 0, 0, "float32")]
    weights += [cost_model.Weight(768, 3072, 10**6, "bfloat16", blocked=True)]

    def load(data: bytes) -> None:
        file.write_bytes(data)
        costs = Costs.from_json(read(file, "measure anew"), str(file), "measure anew")
        assert Costs.from_json(costs.to_json(), str(file), "measure anew") == costs
        model = CostModel(seed.kernels, costs, "")
        if "dense" not in costs.fits:
            model = CostModel(costs, seed.dense, "")
        for weight, batch in itertools.product(weights, (1, 3, 10**6)):
            expected = model.expect(weight)
            seconds = list(expected.times(batch, matmul.KERNELS).values())
            assert all(0 <= value < math.inf for value in seconds), seconds
            assert choose(expected, batch, matmul.KERNELS).kernel

    return seed.kernels.to_json().encode(), load


def mask(_: Path) -> tuple[bytes, Load]:
    """Not JSON, but read back from the same folders."""

    def load(data: bytes) -> None:
        found = Mask.from_bytes(data)
        assert Mask.from_bytes(found.to_bytes()) == found

    return Mask.ones((3, 5)).to_bytes(), load


FORMATS: dict[str, Callable[[Path], tuple[bytes, Load]]] = {
    "run": run,
    "sweep": sweep,
    "report": report,
    "manifest": manifest,
    "index": index,
    "calibration": calibration,
    "mask": mask,
}


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """One to three changes of the JSON's values, or of its bytes."""
    data = seed
    if rng.random() < 0.7 and seed[:1] in b"{[":
        content = json.loads(seed)
        for _ in range(rng.choice((1, 1, 2, 3))):
            change_value(content, rng)
        data = json.dumps(content).encode()
    if data is seed or rng.random() < 0.1:
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = change_bytes(data, rng)
    return data


def change_value(content: Any, rng: random.Random) -> None:
    """Replaces, removes, adds or moves one value somewhere in the tree."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    if not places:
        return
    node, key = rng.choice(places)
    other, where = rng.choice(places)
    action = rng.choice(("replace", "replace", "replace", "remove", "add", "move"))
    if action == "remove":
        del node[key]
    elif action == "add" and isinstance(node, dict):
        node[rng.choice(("more", "", "\ud800", "a.b[0]"))] = copied(rng.choice(VALUES))
    elif action == "add":
        node.insert(key, copied(rng.choice(VALUES)))
    else:
        node[key] = copied(rng.choice(VALUES) if action == "replace" else other[where])


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips a bit, or cuts, repeats or overwrites a piece."""
    if not data:
        return b"{"
    at = rng.randrange(len(data))
    piece = data[at : at + rng.randint(1, 20)]
    if rng.random() < 0.5:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    replacement = rng.choice((b"", piece + piece, b"9" * len(piece), b'"', b"[" * 2000, b"\xff"))
    return data[:at] + replacement + data[at + len(piece) :]


def fuzz(name: str, n: int, folder: Path, first: int = 0) -> tuple[int, int]:
    """Loads n mutations of a format; returns how many were refused, and how many loaded."""
    seed, load = FORMATS[name](folder)
    load(seed)
    refused = 0
    for number in range(first, first + n):
        data = mutate(seed, random.Random(number))
        try:
            load(data)
        except ValueError as error:
            if not FORM.fullmatch(str(error)):
                msg = f"mutation {number} of {name}: expected one form of error; got {error}"
                raise AssertionError(msg) from error
            refused += 1
        except BaseException as error:
            error.args = (f"mutation {number} of {name}: {type(error).__name__}: {error}: {data!r:.2000}",)
            raise
    return refused, n - refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("formats", nargs="*", default=list(FORMATS))
    options = parser.parse_args()
    warnings.simplefilter("error")
    for name in options.formats:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            refused, loaded = fuzz(name, options.n, Path(folder), options.first)
        print(f"{name}: {refused} refused, {loaded} loaded, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
