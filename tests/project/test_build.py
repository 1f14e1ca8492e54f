"""Checks of the compiled code itself: what the ISA objects export, and that the stub matches the binary."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sparsam

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_version_has_one_place() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version
    assert cited
    assert version[1] == cited[1] == sparsam.__version__ == sparsam.build_info().version
    assert metadata.version("sparsam") == version[1]


def test_isa_objects_export_their_row_and_nothing_else(build: Path) -> None:
    objects = sorted(build.glob("CMakeFiles/sparsam_*.dir/cpp/kernels/*/target_*.cpp.o"))
    units = [re.search(r"target_(\w+)\.cpp", path.name)[1] for path in objects]  # type: ignore[index]
    assert sum(not unit.startswith("int8_") for unit in units) == len(sparsam.build_info().compiled_isas)
    for path, unit in zip(objects, units, strict=True):
        int8, name = unit.startswith("int8_"), unit.removeprefix("int8_")
        row = f"sparsam::int8_rows::{name}" if int8 else f"sparsam::{name}::table"
        defined, undefined = [], []
        for line in run("nm", "-C", str(path)).splitlines():
            kind, name = line[17:18], line[19:]
            if kind in "Uwv":
                undefined.append(name)
            elif kind.isupper() or kind in "uV":
                defined.append(name)
            # Lower case is local: nobody else can be given it. Anything weak (W, V, u) would be shared.
        assert defined == [row], path
        assert set(undefined) <= {
            "memcpy",
            "memset",
            "memmove",
            "_GLOBAL_OFFSET_TABLE_",
            "__stack_chk_fail",
        }, path


def test_isa_objects_run_nothing_on_load(build: Path) -> None:
    for path in build.glob("CMakeFiles/sparsam_*.dir/cpp/kernels/*/target_*.cpp.o"):
        assert ".init_array" not in run("readelf", "-S", str(path))


def test_stub_matches_the_binary() -> None:
    pytest.importorskip("mypy")
    # The settings of the project are what lets SciPy, PyTorch and others have no stubs.
    options = ("--mypy-config-file", str(ROOT / "pyproject.toml"))
    allowed = ("--allowlist", str(Path(__file__).with_name("stubtest_allowlist.txt")))
    command = (sys.executable, "-m", "mypy.stubtest", "sparsam._core")
    run(*command, *options, *allowed, MYPYPATH=str(ROOT / "python"))


def test_only_threads_cpp_knows_openmp() -> None:
    for path in (ROOT / "cpp").rglob("*.[ch]pp"):
        if path.name != "threads.cpp":
            assert not re.search(r"omp_|#pragma omp|GOMP", path.read_text()), path


def test_intrinsics_stay_in_their_files() -> None:
    for path in (ROOT / "cpp").rglob("*.[ch]pp"):
        if not path.name.startswith(("vec_", "floats_", "quads_", "int8_", "int4_", "slot_lanes_")):
            assert not re.search(r"_mm\d*_|immintrin", path.read_text()), path
