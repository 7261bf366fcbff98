"""Tests of the double itself. They run where it is loaded (``make double``); elsewhere they are skipped and say why."""

import os

import pytest
from absent import absent
from forked import Forked

MISSING = None if "CUDA_DOUBLE_HOME" in os.environ else "the double of the CUDA runtime is not loaded (make double)"


def pytest_pycollect_makemodule(module_path, parent):
    return absent(module_path, parent, MISSING)


@pytest.fixture(scope="session")
def run_on_double():
    """Runs code on the double, which may behave in some way (CUDA_DOUBLE)."""
    forked = Forked("torch", "cuda_double")

    def run(code, how=""):
        guarded = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "guard" in how else {}
        return forked.run(
            code=PROLOGUE + code, environment={**forked.environment, "CUDA_DOUBLE": how, **guarded}, timeout=60
        )

    yield run
    forked.stop()


PROLOGUE = """
import ctypes
import torch
import optim_ext
runtime = ctypes.CDLL(None)

def raw(device, size):
    "Memory straight from the runtime."
    pointer = ctypes.c_void_p()
    runtime.cudaSetDevice(device)
    assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
    runtime.cudaSetDevice(0)
    return pointer

def tensor_at(pointer, numel, device=0):
    "A tensor that torch takes for one of this length on this device."
    storage = torch._C._construct_storage_from_data_pointer(pointer.value, torch.device("cuda", device), 4 * numel)
    return torch.empty(0, device=f"cuda:{device}").set_(storage, 0, (numel,))

class Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

def stream_of(device, taken_for):
    "A stream of one device that torch takes for another's."
    stream = ctypes.c_void_p()
    runtime.cudaSetDevice(device)
    runtime.cudaStreamCreate(ctypes.byref(stream))
    runtime.cudaSetDevice(0)
    return torch.cuda.ExternalStream(stream.value, device=taken_for)

def step(param):
    param = torch.nn.Parameter(param)
    param.grad = torch.ones(param.shape, device=param.device)
    optim_ext.SGD([param], lr=1.0).step()
    torch.cuda.synchronize()
"""
