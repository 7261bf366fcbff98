"""What the objects of the torch-free rooms are allowed to contain, and which files a rule recompiles. Their tests in C++ are
run by `make cpp-test`."""

import platform
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from optim_ext import _C

ROOT = Path(__file__).parents[2]
on_x86 = pytest.mark.only_where(platform.machine() == "x86_64", reason="one instruction set only")


# The widest registers of each namespace, and who else may use them.
WIDEST = {"isa_baseline": "xmm", "isa_avx2": "ymm", "isa_avx512": "zmm"}
OWNERS = {"ymm": ("isa_avx2", "isa_avx512"), "zmm": ("isa_avx512",)}
ARITHMETIC = re.compile(r"\bv?(add|sub|mul|div|sqrt|max|min)([ps])([sd])\s.*%([xyz]mm)")
SHIFT = re.compile(r"\bvpslld\s.*%([yz]mm)")
FUSED = re.compile(r"\bvfn?m(add|sub)")


@dataclass
class Function:
    """What the code of a function does: how often which arithmetic ("sqrt", packed or scalar, float or double, register),
    how often it shifts packed numbers, and whether it multiplies and adds in one instruction."""

    name: str
    arithmetic: Counter
    shifts: Counter
    registers: set
    contracted: bool

    @classmethod
    def of(cls, name, code):
        registers = {register for register in OWNERS if f"%{register}" in code}
        counts = Counter(ARITHMETIC.findall(code)), Counter(SHIFT.findall(code))
        return cls(name, *counts, registers, FUSED.search(code) is not None)

    def count(self, packed, kind, register=None):
        return sum(
            times
            for (_, how, of, where), times in self.arithmetic.items()
            if (how, of) == (packed, kind) and register in (None, where)
        )


@pytest.fixture(scope="module")
def functions(request, kernel_objects):
    """Every function of the kernels."""
    folder = kernel_objects or request.getfixturevalue("cpp_build") / "CMakeFiles/kernels.dir/csrc/kernels/cpu"
    found = []
    for path in sorted(folder.glob("*.o")):
        code = subprocess.check_output(["objdump", "-d", "-C", "--no-show-raw-insn", path], text=True)
        parts = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)
        found += [Function.of(*part) for part in zip(parts[1::2], parts[2::2], strict=True)]
    assert len(found) > 300
    return found


@on_x86
def test_no_code_for_an_instruction_set_outside_its_namespace(functions):
    """The linker could pick it for everybody, and it would crash on a CPU without that instruction set."""
    strangers = [
        function.name
        for function in functions
        for register in function.registers
        if not any(f"optim_ext::cpu::{owner}::" in function.name for owner in OWNERS[register])
    ]
    assert strangers == []


@on_x86
@pytest.mark.parametrize(("isa", "register"), WIDEST.items())
def test_roots_and_divisions_are_packed(functions, isa, register):
    found = {key for function in functions if f"::{isa}::" in function.name for key in function.arithmetic}
    assert {(word, "p", kind, register) for word in ("sqrt", "div") for kind in "sd"} <= found


@on_x86
@pytest.mark.parametrize("isa", ["isa_avx2", "isa_avx512"])
@pytest.mark.parametrize("rule", _C.rules())
def test_loops_are_vectorised(functions, rule, isa):
    """One condition in a form the compiler cannot turn into a select costs a factor of four and changes no result, so
    nothing else would show it. Then hardly anything packed is left of a sweep (an eightieth of its scalar instructions;
    with packed loops, whose ends are scalar and unrolled, at least a twentieth), and its loop for bf16, the only one in this
    function that shifts, does not shift vectors."""
    register = WIDEST[isa]
    for kind, element in (("s", "float"), ("d", "double")):
        name = f"optim_ext::cpu::{isa}::sweep<optim_ext::rules::{rule}, {element}>("
        (sweep,) = (function for function in functions if name in function.name)
        packed, scalar = sweep.count("p", kind, register), sweep.count("s", kind)
        assert packed > scalar / 32, f"{element}: one element at a time"
        assert sweep.shifts[register] > 0 or element == "double", "bf16: one element at a time"


@on_x86
def test_nothing_is_contracted(functions):
    """A fused multiply-add rounds once where a*b+c rounds twice: the bits would depend on the instruction set. Only the
    sweeps of L-BFGS may have them, for products that are exact."""
    contracted = {function.name for function in functions if function.contracted}
    assert {name for name in contracted if not re.search("history_(dots|combine)", name)} == set()


def included(path):
    """A file, and all that it includes of the project."""
    found, left = set(), [path.resolve()]
    while left:
        file = left.pop()
        if file not in found and file.is_file():
            found.add(file)
            left += [(file.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', file.read_text())]
    return found


# Headers that others include, too: the rule of all rules, and what is a part of other kernels.
SHARED = {"rule", "adafactor", "average", "norm", "lbfgs", "clip"}


def test_a_rule_is_included_by_its_own_files():
    """Touching it recompiles these and no others, its op with the unit of ops it is in; the list of names has all rules."""
    csrc = ROOT / "csrc"
    units = {path: included(path) for path in [*csrc.rglob("*.cpp"), *csrc.rglob("*.cu")]}
    rules = {path.stem for path in (csrc / "rules").glob("*.h") if (csrc / f"ops/{path.stem}_op.cpp").exists()} - SHARED
    assert {"lion", "adam", "sgd", "lamb"} <= rules
    for rule in sorted(rules):
        header = csrc / f"rules/{rule}.h"
        recompiled = {str(path.relative_to(csrc)) for path, headers in units.items() if header in headers}
        own = {f"ops/{rule}_op.cpp", f"kernels/cpu/{rule}.cpp", f"kernels/cuda/{rule}.cu"}
        assert recompiled == own | {"kernels/cpu/rule_names.cpp"}, rule
