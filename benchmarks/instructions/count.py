"""Instructions that kernels execute on AArch64 beside those on x86-64 with AVX2: counted, not timed.

    apt-get install g++-aarch64-linux-gnu qemu-user valgrind
    pip install cmake ninja
    python benchmarks/instructions/count.py
    python benchmarks/instructions/count.py --only panels

A Markdown table: instructions of each row for an element (selection) or for a weight that is kept and a row
of inputs (products), and NEON's over AVX2's. Each call runs once and twice, so that what start-up takes
cancels. Valgrind counts those of AVX2, a plugin of qemu (plugin.c) those of NEON. Counts are the same each
time but for a few instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SYSROOT = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
SELECTION = ("count", "bracket", "mark", "apply")
AIMS = {True: 1.5, False: 2.0}  # of selection, and of products


def run(command: Sequence[str | Path]) -> str:
    """What a command writes; where it fails, that and an error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        msg = f"{command[0]} failed:\n{done.stdout}"
        raise SystemExit(msg)
    return done.stdout


def build(folder: Path, compiler: str, *options: str) -> Path:
    """The program of calls, built in a folder."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    run([*configure, "-DSPARSAM_PYTHON=OFF", "-DSPARSAM_OPENMP=OFF", *options])
    run(["cmake", "--build", folder, "--target", "sparsam_core", "--parallel", "2"])
    calls = folder / "calls"
    include = [f"-I{ROOT / 'cpp' / 'include'}", f"-I{ROOT / 'cpp' / 'kernels'}"]
    sources = [str(HERE / "calls.cpp"), str(folder / "libsparsam_core.a")]
    run([compiler, "-std=c++17", "-O2", *include, *sources, "-pthread", "-ldl", "-o", str(calls)])
    return calls


def build_plugin(folder: Path, calls: Path) -> Path:
    """The plugin, for the version of the interface that the qemu at hand takes."""
    plugin = folder / "plugin.so"
    said = ""
    for version in range(1, 10):
        run(["gcc", "-shared", "-fPIC", "-O2", f"-DVERSION={version}", HERE / "plugin.c", "-o", plugin])
        command = ["qemu-aarch64", "-plugin", str(plugin), "-d", "plugin", "-L", SYSROOT, str(calls)]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        if "instructions:" in said:
            return plugin
    msg = f"qemu-aarch64 takes no version of the plugin:\n{said}"
    raise SystemExit(msg)


class Counter:
    """Counts the instructions of one run of a call."""

    def __init__(self, folder: Path) -> None:
        self.x86 = build(folder / "x86", "g++")
        arm = "aarch64-linux-gnu-g++"
        self.arm = build(folder / "arm", arm, "--toolchain", str(ROOT / ".ci" / "aarch64.cmake"))
        self.plugin = build_plugin(folder, self.arm)
        lines = run([self.x86]).splitlines()
        self.elements = {name: int(n) for name, n in (line.split("\t") for line in lines)}

    def of_process(self, isa: str, int8_isa: str, name: str, times: int, *, arm: bool) -> int:
        counted: list[str | Path] = [self.x86, isa, int8_isa, name, str(times)]
        command: list[str | Path] = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        line = r"Collected : (\d+)"
        if arm:
            counted[0] = self.arm
            command = ["qemu-aarch64", "-plugin", self.plugin, "-d", "plugin", "-L", SYSROOT]
            line = r"instructions: (\d+)"
        found = re.search(line, run([*command, *counted]))
        if found is None:
            msg = f"{command[0]} gave no count of {name}"
            raise SystemExit(msg)
        return int(found[1])

    def __call__(self, isa: str, int8_isa: str, name: str, *, arm: bool) -> float:
        """Instructions for each element."""
        once, twice = (self.of_process(isa, int8_isa, name, times, arm=arm) for times in (1, 2))
        return (twice - once) / self.elements[name]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="calls whose names begin so")
    parser.add_argument("--build", type=Path, help="a folder to build in, which stays; else a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        counter = Counter(args.build or Path(temporary))
        print("| call | AVX2 | NEON | over AVX2 | aim |")
        print("| --- | --- | --- | --- | --- |")
        for name in counter.elements:
            if not name.startswith(args.only):
                continue
            avx2 = counter("avx2", "avx2", name, arm=False)
            aim = AIMS[name.startswith(SELECTION)]
            rows = {"": "neon"}
            if name.startswith("int8"):
                rows = {", without sdot": "neon", ", with sdot": "neondot"}
            if name.startswith("int4"):  # which take the best row that the machine has
                rows = {", with sdot": "neondot"}
            for suffix, int8_isa in rows.items():
                neon = counter("neon", int8_isa, name, arm=True)
                print(f"| {name}{suffix} | {avx2:.2f} | {neon:.2f} | {neon / avx2:.2f} | {aim} |", flush=True)


if __name__ == "__main__":
    main()
