"""What would be a hang, a crash or wrong numbers on a GPU ends with a message on the double."""

import os
import subprocess
import sys

import pytest

MISUSES = {
    "memory that was freed": (
        "pointer = raw(0, 4096); tensor = tensor_at(pointer, 1024); runtime.cudaFree(pointer); step(tensor)",
        "",
        ["memory of device 0 is touched after it was freed", "4096 bytes"],
    ),
    "the host reads memory of a device": (
        "ctypes.string_at(torch.zeros(8, device='cuda').data_ptr(), 1)",
        "closed",
        ["memory of device 0 is touched by the host, or by work of another device"],
    ),
    "a kernel reads memory of another device": (
        "step(tensor_at(raw(1, 4096), 1024))",
        "closed",
        ["memory of device 1 is touched by the host, or by work of another device"],
    ),
    "beyond the end": (
        "step(tensor_at(raw(0, 4096), 1028))",
        "guard",
        ["memory of device 0 is touched beyond its end (4096 bytes, at byte 41"],
    ),
    "a stream that was destroyed": (
        "stream = ctypes.c_void_p(); runtime.cudaStreamCreate(ctypes.byref(stream)); runtime.cudaStreamDestroy(stream);"
        "runtime.cudaStreamSynchronize(stream)",
        "",
        ["the double refuses: a stream that was destroyed"],
    ),
    "a stream that nobody has made": (
        "runtime.cudaStreamSynchronize(ctypes.c_void_p(12345678))",
        "",
        ["the double refuses: a stream that nobody has made"],
    ),
    "a word that CUDA_DOUBLE does not have": ("step(torch.zeros(3, device='cuda'))", "quick", ["CUDA_DOUBLE=quick"]),
}


@pytest.mark.parametrize("name", MISUSES)
def test_is_refused_with_a_message(run_on_double, name):
    code, how, words = MISUSES[name]
    done = run_on_double(code, how)
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr


def test_a_kernel_of_torchs_own_is_named():
    """Where torch's operations are not taken over (cuda_double is not imported), the first of its launches ends it."""
    code = "import torch; torch.ones(3, device='cuda')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 70
    assert "the double refuses: a kernel that the double does not have" in done.stderr
    assert "FillFunctor<float>" in done.stderr
