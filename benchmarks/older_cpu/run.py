"""A command on this CPU as if it were one with AVX2 and nothing newer: no AVX-512, AVX-VNNI or AMX.

    python benchmarks/older_cpu/run.py sparsam bench matmul --values int8

No library of the command sees more than AVX2, whether or not it can be told so: ONNX Runtime cannot. This
needs Linux on x86-64, a CPU whose CPUID can be made to fault (the flag cpuid_fault in /proc/cpuinfo), and a C
compiler (CC, or cc). What the command ends with, this ends with. A thread that asks for CPUID must not block
all signals.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


def reason_against() -> str | None:
    """Why features cannot be hidden here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"expected Linux on x86-64; got {sys.platform} on {platform.machine()}"
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    if "cpuid_fault" not in flags:
        return "expected the flag cpuid_fault in /proc/cpuinfo; got none: CPU or kernel cannot hide features"
    return None


def build(folder: Path) -> Path:
    """The library that hides them, compiled into a folder."""
    library = folder / "hide.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    options = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden"]
    # The first to be initialised, so that libraries that the program itself is linked with see less, too.
    command = [*compiler, *options, "-Wl,-z,initfirst", str(Path(__file__).with_name("hide.c")), "-ldl"]
    try:
        done = subprocess.run([*command, "-o", library], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        msg = f"CC: expected a C compiler; got {compiler[0]!r}, which is not there; set CC or install one"
        raise SystemExit(msg) from None
    if done.returncode != 0:
        msg = f"{compiler[0]} failed:\n{done.stderr}"
        raise SystemExit(msg)
    return library


def run(command: list[str]) -> int:
    """What the command returns, or 128 and the number of the signal that ended it, as shells have it."""
    with tempfile.TemporaryDirectory() as folder:
        others = os.environ.get("LD_PRELOAD", "")
        preload = f"{build(Path(folder))}:{others}" if others else str(build(Path(folder)))
        code = subprocess.run(command, env={**os.environ, "LD_PRELOAD": preload}, check=False).returncode
    return code if code >= 0 else 128 - code


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    command = parser.parse_args().command
    if not command:
        parser.error("expected a command")
    why = reason_against()
    if why is not None:
        parser.error(why)
    try:
        sys.exit(run(command))
    except FileNotFoundError:
        parser.error(f"expected a command; got {command[0]!r}, which is not there")


if __name__ == "__main__":
    main()
