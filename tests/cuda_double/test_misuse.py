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
    "memory that torch gave back": (
        "tensor = torch.zeros(1024, device='cuda'); pointer = ctypes.c_void_p(tensor.data_ptr()); del tensor;"
        "step(tensor_at(pointer, 1024))",
        "guard",
        ["memory of device 0 is touched after it was freed", "4096 bytes"],
    ),
    "a copy from memory that was freed": (
        "pointer = raw(0, 4096); tensor = tensor_at(pointer, 1024); runtime.cudaFree(pointer); tensor.cpu()",
        "",
        ["memory of device 0 is touched after it was freed", "4096 bytes"],
    ),
    "pinned memory that was freed": (
        "pointer = ctypes.c_void_p(); runtime.cudaHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(4096), 0);"
        "runtime.cudaFreeHost(pointer); ctypes.string_at(pointer.value, 1)",
        "",
        ["pinned memory of the host is touched after it was freed", "4096 bytes"],
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
    "a kernel that nobody has registered": (
        "runtime.cudaLaunchKernel(ctypes.c_void_p(12345678), Dim3(1, 1, 1), Dim3(32, 1, 1), None, ctypes.c_size_t(0), None)",
        "",
        ["a kernel that the double does not have: a kernel that was never registered"],
    ),
    "a launch of ours on a stream of another device": (
        "param = torch.nn.Parameter(torch.zeros(3, device='cuda:0')); param.grad = torch.ones(3, device='cuda:0')\n"
        "optimizer = optim_ext.SGD([param], lr=1.0)\n"
        "with torch.cuda.stream(stream_of(1, taken_for=0)): optimizer.step()",
        "",
        ["a launch on a stream of device 1 while device 0 is current: ", "optim_ext"],
    ),
    "an operation of torch on a stream of another device": (
        "tensor = torch.zeros(3, device='cuda:0')\nwith torch.cuda.stream(stream_of(1, taken_for=0)): tensor.add_(1)",
        "",
        ["a launch on a stream of device 1 while device 0 is current: aten::add_"],
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
