"""Time of one update of the average of a sharded model: optim_ext.swa_utils against torch.optim.swa_utils.

    python benchmarks/sharded_averaging.py              # two gloo processes on this machine, some seconds

The model and both averages are sharded by ``fully_shard``, so parameters are DTensors. In every round each package updates
once, in an order that alternates, and the ratio is that of the round; what is printed are medians on the first process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optim_ext import swa_utils

DECAY, WORLD = 0.999, 2
PACKAGES = [torch.optim.swa_utils, swa_utils]


def averages(package: Any, model: nn.Module) -> dict[str, Any]:
    ema = package.AveragedModel(model, multi_avg_fn=package.get_ema_multi_avg_fn(DECAY))
    return {"mean": package.AveragedModel(model), "EMA": ema}


def measure(layers: int, width: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    theirs, ours = (averages(package, model) for package in PACKAGES)
    for each in (model, *(a.module for kind in (theirs, ours) for a in kind.values())):
        fully_shard(each, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for kind in theirs:
        both = theirs[kind], ours[kind]
        for average in both * 2:
            average.update_parameters(model)
        times: list[list[float]] = [[], []]
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                dist.barrier()
                begin = time.perf_counter()
                both[which].update_parameters(model)
                times[which].append(time.perf_counter() - begin)
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        if dist.get_rank() == 0:
            mine = 1e3 * statistics.median(times[1])
            print(
                f"{2 * layers:4} tensors, width {width:5}, {kind:4}: {mine:8.3f} ms, {ratio:6.2f} times torch's speed"
            )


def run(rank: int, meeting: str, rounds: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD))
    for layers, width in ((100, 16), (16, 512)):
        measure(layers, width, rounds)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, args=(f"{folder}/meet", arguments.rounds), nprocs=WORLD)


if __name__ == "__main__":
    sys.exit(main())
