"""Torch's CUDA on the double of the CUDA runtime, which is a pytest plugin, too, for tests that run there.

Importing this takes over torch's own operations on CUDA tensors (torch_ops.cpp). Only for a Python that was started by the
script ``python`` beside the libraries, which loads the double in the first place."""

import ctypes
import os
import sys
from pathlib import Path

import torch

HOME = os.environ.get("CUDA_DOUBLE_HOME")
if HOME is None:
    raise ImportError("the double of the CUDA runtime is not loaded; run: make double")
torch.set_num_threads(1)  # work runs in whatever thread waits for it, and must not need others
_runtime = ctypes.CDLL(str(Path(HOME, "libcudart_double.so")))
_runtime.cuda_double_end_trace.restype = ctypes.c_char_p
torch.ops.load_library(str(Path(HOME, "libtorch_on_double.so")))

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import device_trace as profiled  # noqa: E402


def device_trace(call):
    """What the double was asked to do: no profiler can see its launches."""
    torch.cuda.synchronize()
    _runtime.cuda_double_begin_trace()
    call()
    record = [line.split("\t") for line in _runtime.cuda_double_end_trace().decode().splitlines()]
    torch.cuda.synchronize()

    def named(*kinds):
        return [name for kind, name in record if kind in kinds]

    return profiled.DeviceTrace(named("kernel"), named("copy", "memset"), named("runtime"))


profiled.device_trace = device_trace
