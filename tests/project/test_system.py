"""One Python file and one C++ file know the operating system; what the system lacks is done without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = r"fcntl|\bimport resource|/proc/|/sys/|sched_|posix_fadvise|\bos\.(fork|O_|pipe2|sendfile)|msvcrt"
CPP = r"<(dlfcn|pthread|sched|unistd|windows|link|sys/\w+|malloc)\.h>|__linux__|_WIN32|__APPLE__|/proc/|/sys/"

ELSEWHERE = """
import os, random, sys
sys.modules |= {"fcntl": None, "resource": None}  # what then imports them gets an ImportError
for name in ("sched_getaffinity", "posix_fadvise", "register_at_fork"):
    delattr(os, name)
import pathlib
read = pathlib.Path.read_text
def no_proc(path, *rest, **named):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return read(path, *rest, **named)
pathlib.Path.read_text = no_proc
import sparsam
from sparsam import checkpoint
from sparsam.inputs import system
from sparsam.sparse import blas
import numpy as np
assert (system.available_memory(), system.processor_fields(), system.loaded_libraries()) == (None, {}, set())
assert (system.usable_cpus(), system.interruptions()) == (os.cpu_count(), 0)
assert blas.numpy_blas()[1] >= 1
weights = {"a": np.arange(64.0).reshape(8, 8)}
checkpoint.save(sys.argv[1] + "/a.safetensors", weights)
config = sparsam.PruningConfig(0.5, scope="global")
checkpoint.prune_files(sys.argv[1] + "/a.safetensors", sys.argv[1] + "/out", config)
assert np.count_nonzero(dict(checkpoint.stream(sys.argv[1] + "/out"))["a"]) == 32
packed = sparsam.SparseMatrix.from_dense(np.eye(64, dtype=np.float32))
assert (packed @ np.ones(64, np.float32) == 1).all()
print("done")
"""


@pytest.mark.parametrize(
    ("folder", "endings", "words", "knows"),
    [
        ("python/sparsam", ("py",), PYTHON, "inputs/system.py"),
        ("cpp", ("hpp", "cpp"), CPP, "src/system.cpp"),
    ],
)
def test_one_file_knows_the_system(folder: str, endings: tuple[str, ...], words: str, knows: str) -> None:
    files = [file for ending in endings for file in sorted((ROOT / folder).rglob(f"*.{ending}"))]
    found = {
        file.relative_to(ROOT / folder).as_posix() for file in files if re.search(words, file.read_text())
    }
    assert found == {knows}


@pytest.mark.skipif(sys.platform != "linux", reason="this machine lacks what is taken away here")
def test_what_works_without_linux(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.stdout == "done\n", done.stderr
