"""If only one test file is run, as on each freshly built wheel, then this one."""

from __future__ import annotations

import numpy as np

import sparsam


def test_prune_on_every_isa() -> None:
    x = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    masks = []
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            masks.append(sparsam.select(x, 0.75))
    assert masks[0].count == 4096
    assert all(mask == masks[0] for mask in masks)
    assert np.count_nonzero(masks[0].apply(x)) == 4096
