"""The memory of packed weights, measured in processes of their own; threads and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from packed_forms import FORMS, only, weights
from sparsam._core import Packed

HEAD = """
import gc, sys
import numpy as np
from sparsam._core import Packed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

rng = np.random.default_rng(0)
"""


def run(code: str) -> str:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_forms_change_while_products_run() -> None:
    w = weights(300, 200, 0.8)
    packed = Packed.pack(w)
    x = np.ones((7, 200), np.float32)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    stop = threading.Event()
    wrong: list[object] = []

    def multiply() -> None:
        y = np.empty((7, 300), np.float32)
        while not stop.is_set():
            try:
                packed.linear("panels", x, None, "", y)
            except ValueError:  # the form is not there now
                continue
            if not np.allclose(y, expected, atol=1e-3):
                wrong.append(y)

    pool = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in pool:
        thread.start()
    for _ in range(200):
        packed.add("panels")
        packed.keep(["bitmask"])
    stop.set()
    for thread in pool:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this machine cannot fork")
def test_a_child_forked_while_forms_are_built_can_build_and_multiply() -> None:
    assert run("""
        import os, threading, time, warnings
        warnings.simplefilter("ignore")  # that forking with threads is dangerous is the point
        w = rng.standard_normal((700, 600), dtype=np.float32)
        w[rng.random(w.shape) < 0.7] = 0
        shared = Packed.pack(w)
        done = False
        def work():
            while not done:
                shared.add("panels")
                shared.keep(["bitmask"])
                Packed.pack(w)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads:
            t.start()
        for _ in range(40):
            child = os.fork()
            if child == 0:
                shared.add("panels")
                own = Packed.pack(w)
                own.add("panels")
                y = np.empty((20, 700), np.float32)
                for packed in (shared, own):
                    packed.linear("panels", np.ones((20, 600), np.float32), None, "", y)
                os._exit(0 if np.allclose(y[0], w.sum(axis=1), atol=1e-2) else 1)
            end = time.monotonic() + 30
            while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(0.002)
            assert found == (child, 0), found
        done = True
        for t in threads:
            t.join()
        print("fine")
    """) == "fine\n"  # fmt: skip
