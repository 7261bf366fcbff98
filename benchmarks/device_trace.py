"""What one call made a GPU and the CUDA runtime do, as torch.profiler saw it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "traced call"


@dataclass(frozen=True)
class DeviceTrace:
    """Names, in order of time: the kernels and copies that ran on the GPU, and the calls into the CUDA runtime."""

    kernels: list[str]
    copies: list[str]
    runtime: list[str]


def device_trace(call: Callable[[], Any]) -> DeviceTrace:
    """Run ``call`` once under the profiler. It should have run before, so that nothing is made for the first time."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function(RANGE):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    events.sort(key=lambda event: event["ts"])
    (within,) = (event for event in events if event["name"] == RANGE and event.get("cat") == "user_annotation")
    begin, end = within["ts"], within["ts"] + within["dur"]

    def named(*categories: str) -> list[str]:
        return [event["name"] for event in events if event.get("cat") in categories]

    runtime = [
        event["name"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= event["ts"] <= end
    ]
    # Nothing else was running: all that the GPU did, it did for this call, however long after it.
    return DeviceTrace(named("kernel"), named("gpu_memcpy", "gpu_memset"), runtime)
