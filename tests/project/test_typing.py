"""Wrong fields and words are seen by a type checker, before anything runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEADER = """\
import numpy as np
import sparsam
from sparsam.config import PruningConfig
w = np.ones((4, 4))
d = {"a": w}
def train(a: object, b: object, c: object) -> None: ...
def score(a: object) -> float: return 1.0
"""

WRONG = [
    "sparsam.prune(w, target_sparsty=0.5)",
    'sparsam.prune(d, scope="globl")',
    'sparsam.prune(w, method="magnitud")',
    'sparsam.prune(w, allocation="er")',
    'sparsam.prune(w, schedule="cubical")',
    'sparsam.prune(w, overrides={"a": "2:4"})',
    'sparsam.prune(w, pattern="2:4")',
    "sparsam.prune(w, ties=3)",
    "sparsam.prune(w, transposed=1)",
    "sparsam.prune(w, inplce=True)",
    "PruningConfig(target_sparsty=0.5)",
    'PruningConfig(scope="globl")',
    'PruningConfig().with_changes(scope="globl")',
    "PruningConfig().with_changes(target_sparsty=0.5)",
    'sparsam.MagnitudePruner(scope="row")',
    "sparsam.MagnitudePruner({})",
    'sparsam.IterativePruner(schedule="cubical")',
    "sparsam.IterativePruner(final_sparsty=0.5)",
    'sparsam.IterativePruner(num_iterations="4")',
    "sparsam.find_ticket(d, train, score, config=0.5)",
    "sparsam.find_ticket(d, train, score, round=5)",
    'sparsam.find_smallest(d, score, 0.5, allocation="best")',
    "sparsam.find_smallest(d, score, 0.5, target_sparsity=0.5)",
    "sparsam.sensitivity(d, score, target_sparsity=0.5)",
    "sparsam.sensitivity(d, score, config={})",
    'sparsam.select(w, 0.5, scope="global")',
    'sparsam.select(w, 0.5, scop="row")',
    'sparsam.select_many(d, 0.5, scope="model")',
    'sparsam.allocate(d, 0.5, "er")',
    'sparsam.NM(2, 4, axis="in")',
]

RIGHT = [
    'sparsam.prune(w, target_sparsity=0.5, scope="global", allocation="uniform", schedule=None)',
    'sparsam.prune(d, PruningConfig(0.5, "lamp"), inplace=True, exclude="b*", num_iterations=None)',
    'sparsam.prune(d, overrides={"a": 0.5, "b": sparsam.NM(2, 4), "c": (0.5, sparsam.Slices(0))})',
    "sparsam.prune(d, allocation=sparsam.sensitivity(d, score))",
    'sparsam.prune(d, allocation={"a": 0.5}, transposed=["a"])',
    'PruningConfig(exclude=["a"], schedule=[0.5]).with_changes(scope="row", method=sparsam.Magnitude(2))',
    "sparsam.IterativePruner(schedule=lambda p: p / 2, config=PruningConfig())",
    "sparsam.MagnitudePruner(PruningConfig())",
    "sparsam.find_ticket(d, train, score, config=PruningConfig())",
    'sparsam.find_smallest(d, score, 0.5, allocation="erk")',
    'sparsam.select(w, 0.5, scope="row", transposed=True)',
    'sparsam.allocate(d, 0.5, {"a": 0.5})',
    'sparsam.NM(2, 4, axis="channels")',
]


def test_mypy_sees_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "snippets.py"
    file.write_text(HEADER + "\n".join(WRONG + RIGHT) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10", "--no-error-summary"]
    command += [
        "--hide-error-context",
        f"--cache-dir={tmp_path / 'cache'}",
        "--follow-imports=silent",
        str(file),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path).stdout
    errors = {int(line) for line in re.findall(r"snippets\.py:(\d+): error", printed)}
    first = HEADER.count("\n") + 1
    unseen = [code for line, code in enumerate(WRONG, first) if line not in errors]
    accused = [code for line, code in enumerate(RIGHT, first + len(WRONG)) if line in errors]
    assert not unseen, printed
    assert not accused, printed
    assert min(errors) >= first, printed
