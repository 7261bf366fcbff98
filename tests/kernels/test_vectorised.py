"""Every rule's loop is turned into packed instructions. One condition in a form the compiler cannot turn into a select
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

# One rule for one instruction set: the file that compiles everything for it, with the lists cut to that rule.
INSTRUCTION_SET = (CSRC / "kernels/cpu/isa_avx2.cpp").read_text().replace('#include "history-inl.h"\n', "")
ONE_RULE = """
#include "kernels/cpu/kernels.h"
#undef OPTIM_EXT_FOR_EACH_RULE
#define OPTIM_EXT_FOR_EACH_RULE(X) X({rule})
#undef OPTIM_EXT_FOR_EACH_REDUCTION
#define OPTIM_EXT_FOR_EACH_REDUCTION(X)
#undef OPTIM_EXT_FOR_EACH_FIBER_REDUCTION
#define OPTIM_EXT_FOR_EACH_FIBER_REDUCTION(X)
"""


def line_of_loop():
    lines = (CSRC / "kernels/cpu/sweep-inl.h").read_text().splitlines()
    apply = next(i for i, line in enumerate(lines) if "void apply(" in line)
    return 1 + next(i for i in range(apply, len(lines)) if "OPTIM_EXT_FOR(" in lines[i])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(COMPILER[0]) is None or "clang" in COMPILER[0],
    reason="reads what GCC reports about x86-64 loops",
)
@pytest.mark.parametrize("rule", RULES)
def test_loop_is_vectorised(rule, tmp_path):
    flags = (CSRC / "compile_flags.txt").read_text().split()
    include = [f"-I{CSRC}", f"-I{CSRC / 'kernels/cpu'}"]
    command = [*COMPILER, *flags, *include, "-fopt-info-vec-optimized", "-x", "c++", "-c", "-", "-o", os.devnull]
    done = subprocess.run(command, input=ONE_RULE.format(rule=rule) + INSTRUCTION_SET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loops = re.findall(rf"sweep-inl\.h:{line_of_loop()}:\d+: optimized: loop vectorized using 32 byte", done.stderr)
    assert len(loops) >= 2, f"in float or in double {rule} is computed one element at a time"
