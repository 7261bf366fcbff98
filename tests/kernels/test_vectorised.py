"""Every rule's loops are turned into packed instructions. One condition in a form the compiler cannot turn into a select
costs a factor of four and changes no result, so nothing else would show it."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from optim_ext import _C

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++").split()

# A family's translation unit with one rule only: its loops for every instruction set.
ONE_RULE = """
#include "rules/all_rules.h"
#include "kernels/cpu/program-inl.h"
template const optim_ext::RuleProgram& optim_ext::program_of<optim_ext::rules::{rule}>();
"""


def line_of_loop(function):
    lines = (CSRC / "kernels/cpu/sweep-inl.h").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if f"void {function}(" in line)
    return 1 + next(i for i in range(first, len(lines)) if "OPTIM_EXT_FOR(" in lines[i])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(COMPILER[0]) is None or "clang" in COMPILER[0],
    reason="reads what GCC reports about x86-64 loops",
)
@pytest.mark.parametrize("rule", _C.rules())
def test_loops_are_vectorised(rule):
    flags = (CSRC / "compile_flags.txt").read_text().split()
    command = [*COMPILER, *flags, f"-I{CSRC}", "-fopt-info-vec-optimized", "-x", "c++", "-c", "-", "-o", os.devnull]
    done = subprocess.run(command, input=ONE_RULE.format(rule=rule), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def loops(function, register_bytes):
        place = rf"sweep-inl\.h:{line_of_loop(function)}:\d+"
        return len(re.findall(rf"{place}: optimized: loop vectorized using {register_bytes} byte", done.stderr))

    for isa, register_bytes in (("avx2", 32), ("avx512", 64)):
        assert loops("apply", register_bytes) >= 2, f"{rule} on {isa}: in float or in double one element at a time"
        assert loops("apply_to_bf16", register_bytes) >= 1, f"{rule} on {isa}: bf16 one element at a time"
