from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsam
from cost_models import KEY, made
from messages import FORM
from sparsam.sparse import blas, cost_model
from sparsam.sparse.cost_model import CostModel, Costs, Key, Weight

DENSE = replace(KEY, library="numpy")


def write(costs: Costs) -> Path:
    file = cost_model.cache_file(costs.key)
    file.write_text(costs.to_json())
    cost_model.forget()
    return file


# Estimates


def test_estimates_by_hand() -> None:
    expected = made().expect(Weight(2, 3, 4, "float32"))
    assert (expected.settings, expected.source) == (("isa", 2), str(made()))

    def us(kernel: str, batch: int) -> float:
        return 1e6 * expected.seconds(kernel, batch)

    for batch in (1, 2, 3, 8, 12, 500, 512, 513, 4096):  # of the grid, between, and beyond it
        assert us("panels", batch) == pytest.approx(4 * batch)
        assert us("bitmask", batch) == pytest.approx(4 * batch)
        assert us("dense", batch) == pytest.approx(6 * batch)


def test_blocks_have_their_own_costs() -> None:
    weight, costs = Weight(8, 8, 32, "float32"), made(blocks=0.5)
    blocked, plain = costs.expect(replace(weight, blocked=True)), costs.expect(weight)
    assert blocked.seconds("panels", 4) == plain.seconds("panels", 4) / 2
    assert blocked.seconds("bitmask", 4) == plain.seconds("bitmask", 4)


def test_features_by_hand() -> None:
    mib = 1 << 20
    assert cost_model.features("dense", Weight(2, 3, 4, "float32")) == (1, 2, 3, 6, 0, 0, 0)
    assert cost_model.features("dense", Weight(1024, 1024, 4, "float32"))[5:] == (2 * mib, 0)
    assert cost_model.features("bitmask", Weight(4096, 4096, 4 * mib, "bfloat16"))[5:] == (8 * mib, 0)
    assert cost_model.features("panels", Weight(4096, 4096, 8 * mib, "float32"))[5:] == (38 * mib, 8 * mib)


@given(st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 1), st.integers(1, 1 << 40), st.booleans())
def test_default_costs_are_times(rows: int, cols: int, density: float, batch: int, blocked: bool) -> None:
    for isa in ("avx512", "avx2", "generic"):
        for dtype in cost_model.DTYPES:
            key = Key("cpu", isa, "1", dtype, 2)
            model = CostModel(cost_model.shipped(key), cost_model.shipped(DENSE), "")
            expected = model.expect(Weight(rows, cols, int(density * rows * cols), dtype, blocked))
            times = expected.times(batch, ("dense", "bitmask", "panels", "slots"))
            assert all(0 <= seconds < math.inf for seconds in times.values())


def test_default_costs_exist_for_every_row_and_share_work_among_more_threads() -> None:
    for library in ("avx512", "avx2", "generic", "neon"):
        one = cost_model.shipped(Key("", library, "", "float32", 1))
        two, eight = (cost_model.shipped(Key("", library, "", "float32", n)) for n in (2, 8))
        weight = Weight(3072, 768, 400_000, "float32")
        of_512 = [costs.curve("panels", weight)[-1] for costs in (one, two, eight)]
        assert of_512[0] > of_512[1] > 3 * of_512[2]
    for library in ("numpy", "torch"):
        found = cost_model.shipped(Key("", library, "", "float32", 2))
        assert found.curve("dense", Weight(3072, 768, 0, "float32"))[cost_model.BATCHES.index(128)] > 1e-5
    assert cost_model.shipped(Key("", "torch", "", "bfloat16", 1)).fits.keys() == {"dense"}


def test_buckets() -> None:
    bucket = cost_model.bucket
    assert [bucket(n) for n in range(17)] == list(range(17))
    assert [bucket(n) for n in (17, 18, 19, 31, 33, 36, 37, 97, 100, 104, 105, 512, 513)] == [
        18, 18, 20, 32, 36, 36, 40, 104, 104, 104, 112, 512, 576,
    ]  # fmt: skip
    assert all(n <= bucket(n) < 1.125 * n for n in range(1, 5000))
    assert len({bucket(n) for n in range(1, 513)}) == 56


# What costs depend on


def test_keys_name_what_costs_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cost_model.kernel_key("float32")
    assert (first.library, first.threads) == (sparsam.isa(), sparsam.num_threads())
    keys = {first, cost_model.kernel_key("bfloat16"), cost_model.dense_key(), cost_model.dense_key("torch")}
    sparsam.set_num_threads(3)
    keys.add(cost_model.kernel_key("float32"))
    sparsam.set_num_threads(None)
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            keys.add(cost_model.kernel_key("float32"))
    monkeypatch.setattr(cost_model, "KERNEL_REVISION", 1_000_000)
    keys.add(cost_model.kernel_key("float32"))
    monkeypatch.setattr(cost_model, "numpy_blas", lambda: ("another BLAS", 1))
    keys.add(cost_model.dense_key())
    assert len(keys) == 6 + len(sparsam.available_isas())
    assert len({cost_model.cache_file(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_blas_of_numpy(threads: int) -> None:
    code = "from sparsam.sparse.blas import numpy_blas; print(*numpy_blas())"
    variables = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads))
    words = subprocess.check_output(
        [sys.executable, "-c", code], env=os.environ | variables, text=True
    ).split()
    assert int(words[-1]) == threads
    assert blas.numpy_blas()[0] == " ".join(words[:-1])


def test_a_calibration_is_used_for_its_key_only(cache: Path) -> None:
    key = cost_model.kernel_key("float32")
    assert cost_model.current_costs("float32").source == "default costs"
    costs = Costs(fits=made().kernels.fits, **asdict(key))
    write(costs)
    found = cost_model.current_costs("float32")
    assert (found.source, found.kernels) == ("calibrated costs", costs)
    assert cost_model.current_costs("bfloat16").source == "default costs"
    sparsam.set_num_threads(3)
    assert cost_model.current_costs("float32").source == "default costs"
    sparsam.set_num_threads(None)
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            assert (cost_model.current_costs("float32").source == "calibrated costs") == (name == key.library)


def test_few_costs_are_kept_in_memory(cache: Path) -> None:
    for threads in range(1, 300):
        cost_model.lookup(replace(KEY, threads=threads))
    assert len(cost_model._known) <= cost_model._KNOWN


def test_the_environment_turns_calibrations_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Costs(fits=made().kernels.fits, **asdict(cost_model.kernel_key("float32"))))
    monkeypatch.setenv("SPARSAM_CALIBRATION", "off")
    assert cost_model.current_costs("float32").source == "default costs"
    cost_model.forget()
    monkeypatch.setenv("SPARSAM_CALIBRATION", "never")
    with pytest.raises(ValueError, match="SPARSAM_CALIBRATION: expected on or off; got 'never'"):
        cost_model.current_costs("float32")


# Damaged calibrations


def damage(content: dict[str, Any], how: str) -> Any:
    panels = content["fits"]["panels"]
    changes: dict[str, Any] = {
        "other version": lambda: content.update(sparsam_costs=1),
        "other machine": lambda: content.update(threads=99),
        "no threads": lambda: content.update(threads=0),
        "a kernel is missing": lambda: content["fits"].pop("panels"),
        "an unknown kernel": lambda: content["fits"].update(more=panels),
        "dense among kernels": lambda: content["fits"].update(dense=panels),
        "a batch is missing": panels.pop,
        "a coefficient is missing": panels[0].pop,
        "negative": lambda: panels[0].__setitem__(3, -1.0),
        "NaN": lambda: panels[0].__setitem__(3, math.nan),
        "1e308": lambda: [row.__setitem__(3, 1e308) for row in panels],
        "infinite": lambda: panels[0].__setitem__(3, math.inf),
        "all zero": lambda: panels.__setitem__(0, [0.0] * 7),
        "text": lambda: panels.__setitem__(0, "0000000"),
        "null": lambda: panels.__setitem__(0, None),
        "a field too many": lambda: content.update(more=1),
    }
    changes[how]()
    return content


DAMAGE = ("other version", "other machine", "no threads", "a kernel is missing", "an unknown kernel", "NaN",
          "dense among kernels", "a batch is missing", "a coefficient is missing", "negative", "1e308",
          "infinite", "all zero", "text", "null", "a field too many")  # fmt: skip


def multiplies() -> None:
    """With whatever is in the cache, products run by the default costs."""
    cost_model.forget()
    assert cost_model.current_costs("float32").source == "default costs"
    matrix = sparsam.SparseMatrix.from_dense([[0.0, 1.0], [2.0, 0.0]])
    assert matrix.linear([[3.0, 4.0]]).tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_calibration_is_ignored(cache: Path, how: str) -> None:
    file = write(Costs(fits=made().kernels.fits, **asdict(cost_model.kernel_key("float32"))))
    file.write_text(json.dumps(damage(json.loads(file.read_text()), how)))
    multiplies()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "a kernel is missing",
            "field fits: expected those of bitmask, slots, panels, blocks, dense; got those of ",
        ),
        (
            "a batch is missing",
            "field fits.panels: expected 10 rows of coefficients, none of them all 0; got 9",
        ),
        ("all zero", "field fits.panels: expected 10 rows of coefficients, none of them all 0; got 10"),
        ("an unknown kernel", "field fits.more: expected no rows of coefficients"),
        ("no threads", "field threads: expected int >= 1; got 0"),
        ("a field too many", "field more: expected no such field; got one"),
    ],
)
def test_errors_name_the_field(how: str, says: str) -> None:
    content = damage(json.loads(made().kernels.to_json()), how)
    with pytest.raises(ValueError, match=re.escape(f"costs.json: {says}")) as caught:
        Costs.from_json(json.dumps(content), "costs.json", "measure anew")
    assert FORM.fullmatch(str(caught.value))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"1e999"])
def test_no_json(cache: Path, content: bytes) -> None:
    cost_model.cache_file(cost_model.kernel_key("float32")).write_bytes(content)
    multiplies()


@pytest.mark.parametrize("what", ["folder", "fifo", "device", "loop"])
def test_no_file(cache: Path, what: str) -> None:
    file = cost_model.cache_file(cost_model.kernel_key("float32"))
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if what == "device" else file)
    multiplies()


def test_no_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    multiplies()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as the specification says, ignored

    def no_home() -> Path:
        msg = "no home"
        raise RuntimeError(msg)

    monkeypatch.setattr(Path, "home", no_home)
    multiplies()


def mutate(text: bytes, rng: random.Random) -> bytes:
    """JSON with a few places changed: extreme numbers, other bytes, parts left out or there twice."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        end = min(at + rng.randint(1, 12), len(data))
        what = rng.randrange(5)
        if what == 0:
            data[at:end] = rng.choice([b"1e308", b"-1", b"null", b"[]", b"1e999", b'""', b"NaN", b"9" * 400])
        elif what == 1:
            del data[at:end]
        elif what == 2:
            data[at] = rng.randrange(256)
        elif what == 3:
            data[at:at] = data[at:end]
        else:
            number = [m for m in range(at, len(data)) if data[m : m + 1].isdigit()][:1]
            data[number[0] if number else at : end] = rng.choice([b"1e308", b"5e-324", b"0", b"-0.0", b"2"])
    return bytes(data)


def test_mutated_calibrations_give_costs_or_none(cache: Path) -> None:
    """MUTATIONS=50000 in the environment for a longer run."""
    key = cost_model.kernel_key("float32")
    text = Costs(fits=cost_model.shipped(key).fits, **asdict(key)).to_json().encode()
    file, rng, weight = cost_model.cache_file(key), random.Random(0), Weight(9000, 9000, 10**7, "float32")
    used = 0
    for _ in range(int(os.environ.get("MUTATIONS", "300"))):
        file.write_bytes(mutate(text, rng))
        if (costs := cost_model.calibrated(key)) is not None:
            used += 1
            for kind in ("bitmask", "slots", "panels", "blocks"):
                assert all(0 < seconds < math.inf for seconds in costs.curve(kind, weight))
    assert used > 0
