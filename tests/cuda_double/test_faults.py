"""The test of the tests: each fault that is planted in what brings kernels to torch (faults.cmake) makes a test fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SGD = "SGD and not ASGD"
FEW_SGD = f"{SGD} and tensor[1"
# The fault, how the double behaves, and a test that finds it: its name, and which of its cases.
FAULTS = [
    ("no_record_event", "lazy", "cuda/test_launches.py::test_two_streams_at_once", SGD),
    ("default_stream", "lazy", "cuda/test_launches.py::test_runs_on_the_current_stream", f"few and {FEW_SGD}"),
    (
        "table_on_the_default_stream",
        "lazy",
        "cuda/test_launches.py::test_runs_on_the_current_stream",
        f"many and {FEW_SGD}",
    ),
    ("capture_not_seen", "", "cuda_double/test_double.py::test_a_captured_step_takes_its_tables_along", ""),
    ("waiting_upload", "", "cuda/test_launches.py::test_one_launch", f"1000 and {FEW_SGD}"),
    ("table_too_short", "", "cuda/test_numerics.py::test_same_bits_for_a_thousand_tensors", f"float32 and {FEW_SGD}"),
    ("counter_not_cleared", "", "cuda/test_grad_control.py::test_the_cpus_bits", "2.0-torch.float32"),
    ("device_not_chosen", "closed", "cuda/test_lbfgs.py::test_on_a_device_that_is_not_current", ""),
]


def outcome_of(test, cases, how, fault):
    planted = Path(os.environ["CUDA_DOUBLE_HOME"]).parent / "planted/run"
    environment = os.environ | {
        "CUDA_DOUBLE": how,
        "OPTIM_EXT_FAULT": fault,
        "PYTHONPATH": f"{planted}:{os.environ['PYTHONPATH']}",
    }
    environment.pop("OPTIM_EXT_SHARD", None)  # of the tests this one is among
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{test}", "-k", cases]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("fault", "how", "test", "cases"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_planted_fault_is_found(fault, how, test, cases):
    """Without a fault the same tests pass, in this run or in that of tests/cuda."""
    faulty = outcome_of(test, cases, how, fault)
    said = faulty.stdout + faulty.stderr
    # A pointer that was left out of a table leads anywhere.
    found = r"^1 failed|the double refuses|^Fatal Python error: Segmentation fault"
    assert re.search(found, said, re.MULTILINE) and " passed" not in said, said
