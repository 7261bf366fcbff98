"""Every rule's loops are turned into packed instructions. One condition in a form the compiler cannot turn into a select
costs a factor of four and changes no result, so nothing else would show it."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
LISTED = (CSRC / "rules/all_rules.h").read_text().split("FOR_EACH_RULE(X)")[1].split("FOR_EACH_REDUCTION(X)")[0]
RULES = re.findall(r"X\((\w+(?:<[^>]*>)?)\)", LISTED)
COMPILER = os.environ.get("CXX", "g++").split()

REGISTER_BYTES = {"avx2": 32, "avx512": 64}
# A compile of several seconds each, so AVX-512 has the same loops checked for one rule only.
COMPILED = [*(("avx2", rule) for rule in RULES), ("avx512", "Adam<false>")]

# One rule for one instruction set: the file that compiles everything for it, with the lists cut to that rule.
ONE_RULE = """
#include "kernels/cpu/kernels.h"
#undef OPTIM_EXT_FOR_EACH_RULE
#define OPTIM_EXT_FOR_EACH_RULE(X) X({rule})
#undef OPTIM_EXT_FOR_EACH_REDUCTION
#define OPTIM_EXT_FOR_EACH_REDUCTION(X)
#undef OPTIM_EXT_FOR_EACH_FIBER_REDUCTION
#define OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(X)
"""


def line_of_loop(function):
    lines = (CSRC / "kernels/cpu/sweep-inl.h").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if f"void {function}(" in line)
    return 1 + next(i for i in range(first, len(lines)) if "OPTIM_EXT_FOR(" in lines[i])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(COMPILER[0]) is None or "clang" in COMPILER[0],
    reason="reads what GCC reports about x86-64 loops",
)
@pytest.mark.parametrize(("isa", "rule"), COMPILED)
def test_loops_are_vectorised(isa, rule):
    flags = (CSRC / "compile_flags.txt").read_text().split()
    include = [f"-I{CSRC}", f"-I{CSRC / 'kernels/cpu'}"]
    command = [*COMPILER, *flags, *include, "-fopt-info-vec-optimized", "-x", "c++", "-c", "-", "-o", os.devnull]
    instruction_set = (CSRC / f"kernels/cpu/isa_{isa}.cpp").read_text().replace('#include "history-inl.h"\n', "")
    done = subprocess.run(command, input=ONE_RULE.format(rule=rule) + instruction_set, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def loops(function):
        place = rf"sweep-inl\.h:{line_of_loop(function)}:\d+"
        return len(re.findall(rf"{place}: optimized: loop vectorized using {REGISTER_BYTES[isa]} byte", done.stderr))

    assert loops("apply") >= 2, f"in float or in double {rule} is computed one element at a time"
    assert loops("apply_to_bf16") >= 1, f"on bf16 {rule} is computed one element at a time"
