from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels compiled as for a wheel, without Python and without OpenMP."""
    folder = tmp_path_factory.mktemp("build")
    options = ("-DSPARSAM_PYTHON=OFF", "-DSPARSAM_OPENMP=OFF", "-DSPARSAM_WERROR=ON")
    for command in (
        ("cmake", "-S", str(ROOT), "-B", str(folder), *options),
        ("cmake", "--build", str(folder), "--parallel", "2"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder
