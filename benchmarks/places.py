"""Where the benchmark runs, and what measuring means there: the clock, the memory limit, the memory a step takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from device_trace import device_trace
from memory_limit import DeviceCopy, MemoryLoop
from torch import Tensor

Call = Callable[[], Any]


class Cpu:
    device = torch.device("cpu")
    required_of_limit = 0.9
    TURN_LARGE, TURN_SMALL = 1, 10  # steps in a row

    def __init__(self, threads: int):
        self.threads = threads
        torch.set_num_threads(threads)

    def limit(self, gradients: Sequence[Tensor], updated: Sequence[Sequence[Tensor]]) -> MemoryLoop:
        return MemoryLoop(gradients, updated)

    def turn(self, call: Call, small: bool, before_each: Call | None = None) -> float:
        """Seconds per call, the median of several calls in a row where the tensors are small."""
        times = []
        for _ in range(self.TURN_SMALL if small else self.TURN_LARGE):
            if before_each is not None:
                before_each()
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
        return statistics.median(times)

    def extra_mib(self, step: Call) -> float | None:
        """How far one call raises the resident memory of the process at its highest, in MiB; None where Linux cannot
        say. Free memory is given back to the system first, so that every page the call needs is counted."""

        def resident(field_name: str) -> int:
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field_name + ":"))

        try:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            step()
            return max(0, resident("VmHWM") - before) / 1024
        except (OSError, AttributeError, StopIteration):
            step()  # every mode takes the same number of steps, measured or not
            return None

    def machine(self) -> str:
        name = platform.processor() or platform.machine()
        with suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{name} ({capability}), {self.threads} of {os.cpu_count()} cores"


class Gpu:
    device = torch.device("cuda")
    required_of_limit = 0.85
    TURN_LARGE, TURN_SMALL = 10, 20
    HEAD_START = 4_000_000  # cycles the GPU sleeps, some two milliseconds, while the host queues the first steps
    SAMPLES = 50

    def limit(self, gradients: Sequence[Tensor], updated: Sequence[Sequence[Tensor]]) -> DeviceCopy:
        return DeviceCopy(gradients, updated)

    def turn(self, call: Call, small: bool) -> float:
        """Seconds per call of several in a row, by the GPU's clock: with large tensors from the first one's work to the
        last one's, with small ones, where the host may be the slower, from the first call on."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        steps = self.TURN_SMALL if small else self.TURN_LARGE
        if not small:
            torch.cuda._sleep(self.HEAD_START)
        begin.record()
        for _ in range(steps):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    def extra_mib(self, step: Call) -> float | None:
        """How far one call raises the memory that torch's allocator has given out at its highest, in MiB."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def host_us(self, calls: dict[str, Call]) -> dict[str, float]:
        """Median microseconds until a call returns, with the GPU idle before it; all calls in turn."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.SAMPLES):
            for name, call in calls.items():
                torch.cuda.synchronize()
                before = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - before) * 1e6)
        torch.cuda.synchronize()
        return {name: statistics.median(values) for name, values in times.items()}

    def launches(self, call: Call) -> int:
        return len(device_trace(call).kernels)

    def machine(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"
