"""The test of the tests: each fault that is planted in what brings kernels to torch (faults.cmake) makes a test of
tests/cuda fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHES = "tests/cuda/test_launches.py::"
# The fault, how the double behaves, and a test that finds it.
FAULTS = [
    ("no_record_event", "lazy", LAUNCHES + "test_runs_on_the_current_stream[many-SGD(lr=0.05,momentum=0,{})]"),
    ("default_stream", "lazy", LAUNCHES + "test_runs_on_the_current_stream[few-{}]"),
    ("table_on_the_default_stream", "lazy", LAUNCHES + "test_runs_on_the_current_stream[many-{}]"),
    ("capture_not_seen", "", LAUNCHES + "test_graph_replays_see_live_values[many-torch.float32-SGD]"),
    ("waiting_upload", "", LAUNCHES + "test_one_launch[1000 tensors-{}]"),
    ("table_too_short", "", "tests/cuda/test_numerics.py::test_same_bits_for_a_thousand_tensors[float32-{}]"),
    ("counter_not_cleared", "", "tests/cuda/test_grad_control.py::test_the_cpus_bits[2.0-torch.float32]"),
    ("device_not_chosen", "", "tests/cuda/test_lbfgs.py::test_on_a_device_that_is_not_current"),
]


def outcome_of(test, how, fault):
    folder = Path(os.environ["CUDA_DOUBLE_HOME"])
    modules = folder.parent / "planted/run"
    environment = {
        **os.environ,
        "CUDA_DOUBLE": how,
        "OPTIM_EXT_FAULT": fault,
        "PYTHONPATH": f"{modules}:{os.environ['PYTHONPATH']}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("fault", "how", "test"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_planted_fault_is_found(fault, how, test):
    sound = outcome_of(test, how, "")
    assert sound.returncode == 0 and " passed" in sound.stdout, sound.stdout + sound.stderr
    faulty = outcome_of(test, how, fault)
    assert faulty.returncode != 0 and " passed" not in faulty.stdout, faulty.stdout + faulty.stderr
