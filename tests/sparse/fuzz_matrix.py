"""Mutates saved matrices and loads them: each must be refused with a ValueError, or multiply.

    python tests/sparse/fuzz_matrix.py --n 100000

Not collected by pytest. CI runs it for a minute on a core with sanitizers and checks of ranges, where a file
that gets as far as a kernel and makes it read out of bounds is found out. Prints what it did; any other
exception ends it with a traceback and the seed of the mutation, a crash just ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["SPARSAM_CALIBRATION"] = "off"

import ml_dtypes
import numpy as np

import sparsam
from sparsam import SparseMatrix
from sparsam.sparse import matmul

SIZES = (0, 1, 2, 8, 16, 28, 32, 255, 256, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
DTYPES = ("F32", "F16", "BF16", "F64", "U8", "I8", "I64", "U64", "BOOL", "F8_E4M3", "X")


def seeds(folder: Path) -> list[bytes]:
    """Small files of different shapes and dtypes, so that mutations hit what matters."""
    rng = np.random.default_rng(0)
    files = []
    for shape in ((2, 9), (1, 64), (5, 65), (8, 40), (0, 7), (7, 0), (300, 3)):
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            w = rng.standard_normal(shape) * (rng.random(shape) < 0.4)
            SparseMatrix.from_dense(w.astype(dtype)).save(folder / "seed")
            files.append((folder / "seed").read_bytes())
        for name in ("int8", "int4"):
            SparseMatrix.from_dense(w, dtype=name).save(folder / "seed")
            files.append((folder / "seed").read_bytes())
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, bytes, cuts, repeats, or the header rewritten with its length set right."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((flip, overwrite, cut, repeat, rewrite, rewrite, resize))(data, rng)
    return data


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    word = rng.choice((rng.randbytes(8), rng.choice(SIZES).to_bytes(8, "little")))
    return data[:at] + word + data[at + 8 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 9) :] if rng.random() < 0.5 else data[:at]


def repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[max(0, at - rng.randrange(1, 17)) :]


def rewrite(data: bytes, rng: random.Random) -> bytes:
    """Changes what the header says, so that the file gets past the library's own checks more often."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        entry = header[rng.choice(("shape", "bits", "values", "scales", "levels"))]
        what = rng.randrange(5)
        if what == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 1:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice((*SIZES, rng.randrange(400)))
        elif what == 2:
            entry["data_offsets"][rng.randrange(2)] += rng.randint(-9, 9)
        elif what == 3:
            entry["shape"] = rng.choice(
                ([], [0], [1, *entry["shape"]], entry["shape"][::-1], entry["shape"][:1])
            )
        else:
            header[rng.choice(("shape", "bits", "values", "scales", "levels", "more"))] = entry
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def resize(data: bytes, rng: random.Random) -> bytes:
    """Changes the stored shape, which the library knows nothing of."""
    try:
        size = int.from_bytes(data[:8], "little")
        start, _ = json.loads(data[8 : 8 + size])["shape"]["data_offsets"]
        at = 8 + size + start + rng.choice((0, 8))
        old = int.from_bytes(data[at : at + 8], "little")
        new = rng.choice((*SIZES, old + rng.randint(-9, 9), rng.randrange(400))) % (1 << 64)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return data
    return data[:at] + new.to_bytes(8, "little") + data[at + 8 :]


def survives(file: Path) -> bool:
    """Whether the file loads; what loads is then multiplied with, in every way, and must be of one piece."""
    try:
        matrix = SparseMatrix.load(file)
    except ValueError:
        return False
    rows, cols = matrix.shape
    dense = matrix.to_dense()
    assert dense.shape == matrix.shape
    assert matrix.nnz >= np.count_nonzero(dense)
    kernels = matmul.kernels_of(matrix._state.forms.weight)
    if cols <= 1 << 20 and rows <= 1 << 20:
        for batch in (1, 5, 20):
            x = np.ones((batch, cols), np.float32)
            for kernel in kernels:
                matrix.prepare(batch, kernel=kernel)
                assert matrix.linear(x).shape == (batch, rows)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="mutated files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, if sooner")
    parser.add_argument("--seed", type=int, default=0, help="the first mutation's; the next has the next")
    arguments: Any = parser.parse_args()
    memory = Path("/dev/shm")
    done, loaded, start = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        file = Path(name) / "mutated"
        originals = seeds(Path(name))
        for seed in range(arguments.seed, arguments.seed + arguments.n):
            if time.perf_counter() - start > arguments.seconds:
                break
            done += 1
            rng = random.Random(seed)
            file.write_bytes(mutate(rng.choice(originals), rng))
            try:
                loaded += survives(file)
            except BaseException:
                sys.stderr.write(f"mutation {seed}: run again with --seed {seed} --n 1\n")
                raise
    seconds = time.perf_counter() - start
    sys.stdout.write(
        f"{done} mutated files on {sparsam.isa()}: {loaded} still loaded and multiplied, "
        f"{done - loaded} were refused; {seconds:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
