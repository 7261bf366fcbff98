"""What measures the memory limit of a step: on the CPU a bare loop (memory_limit.cpp, compiled for the
instruction set that the kernels have chosen), on a GPU a copy within its memory."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from optim_ext import _C

SOURCE = Path(__file__).with_suffix(".cpp")
# The loop moves memory in the registers that the kernels use on this processor.
REGISTERS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2"], "baseline": []}


def _load() -> ctypes.CDLL:
    # Linked without -fopenmp: the OpenMP runtime is then the one torch has loaded, so the loop runs on the same threads
    # as the optimizers. A second pool of threads would keep spinning for a while after each call, and be measured too.
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as folder:
        objects, library = str(Path(folder, "loop.o")), str(Path(folder, "loop.so"))
        flags = ["-std=c++17", "-O3", *REGISTERS[_C.isa()], "-fPIC", "-fopenmp"]
        subprocess.run([*compiler, *flags, "-c", str(SOURCE), "-o", objects], check=True)
        subprocess.run([*compiler, "-shared", objects, "-o", library], check=True)
        return ctypes.CDLL(library)


class MemoryLoop:
    """Reads ``gradients`` and reads and writes back every list of ``updated``, computing nothing.

    ``updated`` holds one list of tensors per stream, each as long as ``gradients``; all tensors are contiguous, on the
    CPU, and tensor i has the same number of bytes in every stream. Calling the object walks them once, on
    ``torch.get_num_threads()`` threads; ``bytes`` is what one call moves (reads plus writes).
    """

    _library: ctypes.CDLL | None = None

    def __init__(self, gradients: Sequence[Tensor], updated: Sequence[Sequence[Tensor]]):
        if MemoryLoop._library is None:
            MemoryLoop._library = _load()
        streams = list(zip(gradients, *updated, strict=True))
        for operands in streams:
            if any(t.nbytes != operands[0].nbytes or not t.is_contiguous() for t in operands):
                raise ValueError("the operands of one parameter must be contiguous and equally large")
        self._keep_alive = streams
        self._updated = len(updated)
        addresses = [t.data_ptr() for operands in streams for t in operands]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._sizes = (ctypes.c_int64 * len(streams))(*(operands[0].nbytes for operands in streams))
        self.bytes = sum(self._sizes) * (1 + 2 * self._updated)

    def __call__(self) -> None:
        assert MemoryLoop._library is not None
        threads = torch.get_num_threads()
        count = ctypes.c_int64(len(self._sizes))
        if MemoryLoop._library.walk_memory(count, self._updated, self._addresses, self._sizes, threads) != 0:
            raise ValueError(f"no loop for {self._updated} updated streams")


class DeviceCopy:
    """Moves as many bytes as a step over these tensors reads and writes, by copying a buffer in GPU memory, several times
    where that is much."""

    MOST_BYTES = 2**30

    def __init__(self, gradients: Sequence[Tensor], updated: Sequence[Sequence[Tensor]]):
        moved = sum(t.nbytes for t in gradients) + 2 * sum(t.nbytes for stream in updated for t in stream)
        self._times = -(-moved // (2 * self.MOST_BYTES))
        self._source, self._target = (
            torch.ones(moved // 2 // self._times, dtype=torch.uint8, device=gradients[0].device) for _ in range(2)
        )
        self.bytes = 2 * self._source.nbytes * self._times

    def __call__(self) -> None:
        for _ in range(self._times):
            self._target.copy_(self._source)


class ReadLoop:
    """Reads contiguous tensors, one after the other, each on ``torch.get_num_threads()`` threads, computing nothing."""

    def __init__(self, tensors: Sequence[Tensor]):
        if MemoryLoop._library is None:
            MemoryLoop._library = _load()
        self._keep_alive = list(tensors)
        self._addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        self._sizes = (ctypes.c_int64 * len(tensors))(*(t.nbytes for t in tensors))
        self.bytes = sum(self._sizes)

    def __call__(self) -> None:
        assert MemoryLoop._library is not None
        count = ctypes.c_int64(len(self._sizes))
        MemoryLoop._library.read_memory(count, self._addresses, self._sizes, torch.get_num_threads())
