"""The C++ tests, and optim_ext in torch, on emulated processors: which instruction set is chosen there, and that it gives the
bits that were recorded. Run by ``make old-cpu-check``; nothing else collects this folder.

QEMU emulates no AVX-512; that is chosen, and gives these bits, where the tests of tests/kernels run on such a processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp"

# The instruction sets that kernels were compiled for and that these processors have, the last one being the best.
CPUS = {"Nehalem": ["baseline"], "Haswell": ["baseline", "avx2"]}

PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch
import test_recorded_bits as bits
from optim_ext import _C
torch.set_num_threads(1)
recorded = json.loads(bits.RECORD.read_text())
different = [name for name, row in bits.recorded().items() if bits.digest(*row) != recorded[name]]
print(json.dumps([_C.isa(), len(recorded), different]))
"""


def emulated(cpu, *command, **environment):
    """What a program prints on a processor of that kind."""
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, *command], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("cpu", CPUS)
def test_torch_chooses_and_the_bits_are_those_recorded(root, cpu):
    out = emulated(cpu, sys.executable, "-c", PROGRAM, root, root / "tests", root / "tests/kernels")
    chosen, count, different = json.loads(out)
    assert chosen == CPUS[cpu][-1]
    assert count > 50 and different == []


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_have_the_bits_recorded(cpp_build, cpu):
    """And the instruction sets, which the C++ tests find by themselves, are those of the processor."""
    out = emulated(cpu, cpp_build / "test_digest", *CPUS[cpu])
    assert out.splitlines()[0].split() == CPUS[cpu]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", sorted({path.stem for path in CPP.glob("test_*.cpp")} - {"test_digest"}))
def test_cpp(cpp_build, name, cpu):
    assert ", 0 failed" in emulated(cpu, cpp_build / name)
