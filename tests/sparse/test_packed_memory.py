"""The memory of packed weights, measured in processes of their own."""

from __future__ import annotations

import pytest

from packed_forms import FORMS, only, run, weights
from sparsam._core import Packed


@pytest.mark.parametrize("form", FORMS)
def test_nbytes_is_what_the_process_holds(form: str) -> None:
    before, after, nbytes = map(int, run(f"""
        w = rng.standard_normal((6000, 3000), dtype=np.float32)
        w[rng.random(w.shape, dtype=np.float32) < 0.6] = 0
        small = Packed.pack(w[:100])
        small.add({form!r})
        del small
        gc.collect()
        before = resident()
        packed = Packed.pack(w)
        packed.add({form!r})
        packed.keep([{form!r}])
        print(before, resident(), packed.nbytes)
    """).split())  # fmt: skip
    assert abs(after - before - nbytes) <= 0.02 * nbytes


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.8), (0.8, 0.4), (0.9, 0.22)])
@pytest.mark.parametrize("form", FORMS)
def test_one_form_is_smaller_than_the_dense_weight(sparsity: float, share: float, form: str) -> None:
    for shape in ((3072, 768), (768, 3072), (384, 384), (1000, 1000)):
        w = weights(*shape, sparsity)
        assert only(Packed.pack(w), form).nbytes <= share * w.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_a_large_batch_leaves_nothing_behind(form: str) -> None:
    before, after = map(int, run(f"""
        w = rng.standard_normal((512, 1024), dtype=np.float32)
        w[rng.random(w.shape) < 0.7] = 0
        packed = Packed.pack(w)
        packed.add({form!r})
        x, y = np.zeros((16384, 1024), np.uint16), np.zeros((16384, 512), np.uint16)
        def product(batch):
            packed.linear_at({form!r}, x.ctypes.data, True, batch, 0, "", y.ctypes.data)
        product(1)
        x[:], y[:] = 0x3f80, 1
        before = resident()
        product(16384)
        print(before, resident())
    """).split())  # fmt: skip
    assert after - before < 10 << 20
