"""What needs a GPU. Without one, or in a build without CUDA kernels, every module of this folder is skipped and says why."""

import sys
from pathlib import Path

import pytest
import torch
from absent import absent
from specs import SPECS, Case

import optim_ext

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # for device_trace


def missing():
    if optim_ext.build_info()["cuda"] is None:
        return "this build of optim_ext has no CUDA kernels"
    return None if torch.cuda.is_available() else "there is no GPU"


def pytest_pycollect_makemodule(module_path, parent):
    return absent(module_path, parent, missing())


def pytest_generate_tests(metafunc):
    """A test that takes `cuda_case` runs once per option set that torch has for a GPU, of each optimizer."""
    if "cuda_case" in metafunc.fixturenames:
        cases = [Case(spec, options) for spec in SPECS for options in spec.options_on("cuda")]
        metafunc.parametrize("cuda_case", cases, ids=[case.id for case in cases])


@pytest.fixture
def device():
    return torch.device("cuda", 0)


class NoSync:
    """Within it, whatever makes the host wait for the GPU is an error."""

    def __enter__(self):
        self.before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode(self.before)


@pytest.fixture
def no_sync():
    return NoSync()
