"""The C++ tests, and what the objects of the torch-free rooms are allowed to contain."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests/cpp").glob("*.cpp")))
def test_cpp(cpp_build, name):
    done = subprocess.run([cpp_build / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_device_code_runs_on_the_double(cpp_build):
    """Every kernel on a CPU, with the race detector, against the CPU kernels; and every planted fault is found."""
    ctest = shutil.which("ctest", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [
        ctest,
        "--test-dir",
        cpp_build,
        "-R",
        "cuda_double",
        "-j",
        "2",
        "--output-on-failure",
        "--no-tests=error",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Registers that only code of these instruction sets may use, in functions of their namespace.
OWNERS = {"ymm": ("isa_avx2", "isa_avx512"), "zmm": ("isa_avx512",)}
PACKED = ("sqrtps", "sqrtpd", "divps", "divpd")


@pytest.fixture(scope="module")
def functions(cpp_build, kernel_objects):
    """Every function of the kernels with what it does: the registers, packed instructions and contractions in its code."""
    objects = kernel_objects.glob("*.o") if kernel_objects else cpp_build.glob("**/kernels.dir/**/*.cpp.o")
    found = []
    for path in sorted(objects):
        code = subprocess.check_output(["objdump", "-d", "-C", "--no-show-raw-insn", path], text=True)
        parts = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            packed = re.findall(rf"v?({'|'.join(PACKED)})\s.*%([xyz]mm)", body)
            contracted = bool(re.search(r"vfn?m(?:add|sub)\w+", body))
            found.append((name, {register for register in OWNERS if f"%{register}" in body}, set(packed), contracted))
    assert len(found) > 300
    return found


@on_x86
def test_no_code_for_an_instruction_set_outside_its_namespace(functions):
    """The linker could pick it for everybody, and it would crash on a CPU without that instruction set."""
    strangers = [
        name
        for name, registers, _, _ in functions
        for register in registers
        if not any(f"optim_ext::cpu::{owner}::" in name for owner in OWNERS[register])
    ]
    assert strangers == []


@on_x86
@pytest.mark.parametrize(("isa", "register"), [("isa_baseline", "xmm"), ("isa_avx2", "ymm"), ("isa_avx512", "zmm")])
def test_rules_are_vectorised(functions, isa, register):
    found = {pair for name, _, packed, _ in functions if f"::{isa}::" in name for pair in packed}
    assert {(instruction, register) for instruction in PACKED} <= found


@on_x86
def test_nothing_is_contracted(functions):
    """A fused multiply-add rounds once where a*b+c rounds twice: the bits would depend on the instruction set. Only the
    sweeps of L-BFGS may have them, for products that are exact."""
    contracted = {name for name, _, _, contracted in functions if contracted}
    assert {name for name in contracted if not re.search("history_(dots|combine)", name)} == set()
