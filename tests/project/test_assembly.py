"""The machine code of the kernels: sums of inner loops stay in registers.

A vector that lives on the stack makes every step wait until its store can be forwarded to the next load, and
no test of results would notice.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Unit -> the functions whose inner loops are looked at, an instruction that tells the loops that matter, and
# how many of these there are at least: one for each number of rows of x that a kernel takes at once.
KERNELS = {
    "avx2": (r"::slots<float>", "vpermps", 8),
    "avx512": (r"::slots<float>", "vpermps", 8),
    "int8_avx2": ("", "vpmaddubsw", 22),
    "int8_avxvnni": ("", "{vex} vpdpbusd", 8),
    "int8_avx512vnni": ("", "vpdpbusd", 16),
}
STACK_VECTOR = re.compile(r"\(%r[sb]p[,)].*%[yz]mm|%[yz]mm\d+(\{%k\d\})?,\S*\(%r[sb]p[,)]")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)")


def functions(disassembly: str) -> Iterator[tuple[str, dict[int, str]]]:
    """Each function's name and its instructions by address."""
    for part in re.split(r"^[0-9a-f]+ <", disassembly, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(">:\n")
        found = (LINE.match(line) for line in body.splitlines())
        yield name, {int(match[1], 16): match[2] for match in found if match}


def inner_loops(code: dict[int, str]) -> Iterator[list[str]]:
    """The instructions of loops with no loop inside: from the target of a jump back to that jump."""
    back = []
    for at, text in code.items():
        if (match := JUMP.match(text)) and (to := int(match[1], 16)) in code and to <= at:
            back.append((to, at))
    for to, at in back:
        if not any((to, at) != other and to <= other[0] and other[1] <= at for other in back):
            yield [text for where, text in code.items() if to <= where <= at]


def test_the_parser_sees_loops_and_stack_vectors() -> None:
    text = """
0000000000000010 <f::slots<float>()>:
  10:\tvmovaps %ymm0,-0x20(%rsp)
  14:\tvfmadd231ps 0x40(%rsp),%ymm1,%ymm2
  18:\tvmovups %zmm3{%k1},0x8(%rbp,%rax,4)
  1c:\tvmovups (%rsi),%ymm4
  20:\tjne    14 <f+0x4>
  24:\tjne    10 <f>
"""
    ((name, code),) = functions(text)
    assert name == "f::slots<float>()"
    (loop,) = inner_loops(code)
    assert [bool(STACK_VECTOR.search(line)) for line in loop] == [True, True, False, False]
    assert STACK_VECTOR.search(code[0x10])


@pytest.mark.parametrize("unit", KERNELS)
def test_inner_loops_touch_no_vector_on_the_stack(build: Path, unit: str) -> None:
    objects = [*build.glob(f"CMakeFiles/sparsam_{unit}.dir/cpp/kernels/*/target_{unit}.cpp.o")]
    if not objects:
        pytest.skip(f"this machine builds no {unit}")
    if shutil.which("objdump") is None:
        pytest.skip("this machine has no objdump")
    command = ("objdump", "-d", "-C", "--no-show-raw-insn", "-M", "att", str(objects[0]))
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function, instruction, least = KERNELS[unit]
    loops = [
        (name, loop)
        for name, code in functions(text)
        if re.search(function, name)
        for loop in inner_loops(code)
        if any(line.startswith(instruction) for line in loop)
    ]
    assert len(loops) >= least
    assert not [(name, line) for name, loop in loops for line in loop if STACK_VECTOR.search(line)]
