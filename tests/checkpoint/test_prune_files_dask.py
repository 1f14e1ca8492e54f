"""Pruning files on a cluster of Dask's: the same bits as here, and a killed worker loses nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from sparsam import PruningConfig, checkpoint

SHARDS = 6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Shards of one matrix each."""
    rng = np.random.default_rng(9)
    weights = {f"l{i}.weight": rng.standard_normal((300, 400), dtype=np.float32) for i in range(SHARDS)}
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    texts = {shard: {"format": "pt"} for shard in weight_map.values()}
    cut = checkpoint.Shards(checkpoint.INDEX_NAME, {}, weight_map, texts)
    checkpoint.save(tmp_path / "model", weights, like=checkpoint.Checkpoint({}, {}, cut))
    return tmp_path / "model"


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_are_killed_lose_nothing(workers: int, model: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    config = PruningConfig(0.8, scope="global")
    report = checkpoint.prune_files(model, tmp_path / "here", config)
    killed: list[int] = []
    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):

        def kill_one(what: str, done: int, _: int) -> None:
            if (what, done) == ("pruning", 0):  # the tasks that come now find it gone
                killed.append(next(iter(cluster.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)

        again = checkpoint.prune_files(
            model, tmp_path / "there", config, executor=client.get_executor(), progress=kill_one
        )
    assert len(killed) == 1
    assert again == report
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob(".*"))
