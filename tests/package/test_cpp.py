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


@pytest.fixture
def object_of(cpp_build, kernel_objects):
    def find(isa):
        (found,) = [kernel_objects / f"{isa}.o"] if kernel_objects else cpp_build.glob(f"**/kernels.dir/**/{isa}.cpp.o")
        return found

    return find


@on_x86
@pytest.mark.parametrize("isa", ["isa_baseline", "isa_avx2", "isa_avx512"])
def test_isa_objects_define_only_their_sweeps(object_of, isa):
    """Any other symbol could be picked by the linker for everybody, and crash on a CPU without that instruction set."""
    lines = subprocess.check_output(["nm", "-C", "--defined-only", "-g", object_of(isa)], text=True)
    names = [line.split(" ", 2)[2] for line in lines.splitlines()]
    assert names
    strangers = [
        name
        for name in names
        if not re.match(
            rf"((void|double) )?optim_ext::cpu::{isa}::(sweep<|reduce<|reduce_fibers<|history_\w+\(|norms_of_tiles\()",
            name,
        )
    ]
    assert strangers == []


@on_x86
@pytest.mark.parametrize(("isa", "register"), [("isa_baseline", "xmm"), ("isa_avx2", "ymm"), ("isa_avx512", "zmm")])
def test_rules_are_vectorised(object_of, isa, register):
    code = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", object_of(isa)], text=True)
    for instruction in ("sqrtps", "sqrtpd", "divps", "divpd"):
        packed = re.findall(rf"v?{instruction}\s.*%{register}", code)
        assert packed, f"no packed {instruction} in {isa}"


@on_x86
@pytest.mark.parametrize("isa", ["isa_baseline", "isa_avx2", "isa_avx512"])
def test_nothing_is_contracted(object_of, isa):
    """A fused multiply-add rounds once where a*b+c rounds twice: the bits would depend on the instruction set. Only the
    sweeps of L-BFGS may have them, for products that are exact."""
    code = subprocess.check_output(["objdump", "-d", "-C", "--no-show-raw-insn", object_of(isa)], text=True)
    functions = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)
    contracted = {
        name
        for name, body in zip(functions[1::2], functions[2::2], strict=True)
        if re.search(r"vfn?m(?:add|sub)\w+", body)
    }
    assert len(functions) > 20
    assert {name for name in contracted if not re.search("history_(dots|combine)", name)} == set()
