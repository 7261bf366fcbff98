"""Time of the parts of a training step on DTensor parameters: optim_ext against torch.optim, and against its own plain step.

    python benchmarks/sharded.py                       # one, two and four gloo processes on this machine, minutes
    python benchmarks/sharded.py --worlds 1 --rounds 15

Parameters are sharded along their first dimension. In every round each candidate runs once, in an order that turns, and a
ratio is that of one round; what is printed are medians on the first process: milliseconds of ours, and how many times as
long the others take. ``plain`` is our own step on ordinary tensors of the size that a process has of each parameter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import optim_ext

Candidates = dict[str, Callable[[], object]]

# What is measured on which parameters: how many tensors of which sizes (elements that one process has), rounds at most.
SIZES = {
    "800 small": ([64 * 2**i for i in range(7)] * 115)[:800],
    "100 MB": [1024 * 1024, 1024 * 256, 1024, 1024] * 20,
}


def tensors(sizes: list[int], mesh: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with gradients: ordinary ones, and DTensors that have as much on each process."""
    torch.manual_seed(dist.get_rank())
    plain, sharded = [], []
    for size in sizes:
        p = nn.Parameter(torch.randn(size))
        p.grad = torch.randn(size)
        whole = nn.Parameter(DTensor.from_local(torch.randn(size), mesh, [Shard(0)], run_check=False))
        whole.grad = DTensor(torch.randn(size), whole._spec, requires_grad=False)
        plain.append(p)
        sharded.append(whole)
    return plain, sharded


def measure(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate, round by round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for run in candidates.values():
        for _ in range(4):
            run()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            begin = time.perf_counter()
            candidates[name]()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def report(what: str, times: dict[str, list[float]]) -> None:
    if dist.get_rank() != 0:
        return
    ours = times["ours"]
    others = [
        f"{name} {statistics.median(b / a for a, b in zip(ours, each, strict=True)):.2f}x"
        for name, each in times.items()
        if name != "ours"
    ]
    print(
        f"{dist.get_world_size()} processes, {what:28} {statistics.median(ours):8.2f} ms;  {', '.join(others)}",
        flush=True,
    )


def steps(rule: str, options: dict[str, Any], plain: list[nn.Parameter], sharded: list[nn.Parameter]) -> Candidates:
    candidates: Candidates = {
        "ours": getattr(optim_ext, rule)(sharded, **options).step,
        "plain": getattr(optim_ext, rule)(plain, **options).step,
    }
    for how in ("fused", "foreach") if hasattr(torch.optim, rule) else ():
        copies = [nn.Parameter(p.detach().clone()) for p in sharded]
        for copy, p in zip(copies, sharded, strict=True):
            copy.grad = p.grad
        try:
            optimizer = getattr(torch.optim, rule)(copies, **options, **{how: True})
            optimizer.step()
        except (RuntimeError, NotImplementedError, TypeError):  # no fused code, or none that takes DTensors
            continue
        candidates[f"torch {how}"] = optimizer.step
    return candidates


def clips(plain: list[nn.Parameter], sharded: list[nn.Parameter]) -> Candidates:
    ours, single = (optim_ext.AdamW(params) for params in (sharded, plain))
    number = torch.zeros((), dtype=torch.float64)
    return {
        "ours": lambda: ours.clip_grad_norm(1.0),
        "plain": lambda: single.clip_grad_norm(1.0),
        "one all_reduce": lambda: dist.all_reduce(number),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(sharded, 1e9),
    }


class Holder(nn.Module):
    def __init__(self, params: list[nn.Parameter]):
        super().__init__()
        self.params = nn.ParameterList(params)


def averages(plain: list[nn.Parameter], sharded: list[nn.Parameter]) -> Candidates:
    candidates: Candidates = {}
    for name, package, params in (
        ("ours", optim_ext.swa_utils, sharded),
        ("plain", optim_ext.swa_utils, plain),
        ("torch", torch.optim.swa_utils, sharded),
    ):
        model = Holder(params)
        averaged = package.AveragedModel(model, multi_avg_fn=package.get_ema_multi_avg_fn(0.999))
        candidates[name] = lambda averaged=averaged, model=model: averaged.update_parameters(model)
    return candidates


def averaged_steps(plain: list[nn.Parameter], sharded: list[nn.Parameter]) -> Candidates:
    candidates: Candidates = {}
    for name, params in (("ours", sharded), ("plain", plain)):
        model, optimizer = Holder(params), optim_ext.AdamW(params)
        ema = optim_ext.swa_utils.get_ema_multi_avg_fn(0.999)
        averaged = optim_ext.swa_utils.AveragedModel(model, multi_avg_fn=ema)
        optimizer.average_into(averaged, model)
        candidates[name] = lambda optimizer=optimizer, averaged=averaged: optimizer.step()
    return candidates


def run(rank: int, world: int, meeting: str, rounds: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    for what, sizes in SIZES.items():
        plain, sharded = tensors(sizes, mesh)
        rules = [("AdamW", {}), ("LAMB", {}), ("SGD", {"lr": 1e-3, "momentum": 0.9}), ("RMSprop", {}), ("Adagrad", {})]
        for rule, options in rules if what == "800 small" else rules[:2]:
            report(f"{what}, {rule}", measure(steps(rule, options, plain, sharded), rounds))
        report(f"{what}, clip_grad_norm", measure(clips(plain, sharded), rounds))
        report(f"{what}, EMA", measure(averages(plain, sharded), rounds))
        report(f"{what}, AdamW with EMA", measure(averaged_steps(plain, sharded), rounds))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for world in arguments.worlds:
        with tempfile.TemporaryDirectory() as folder:
            given = (world, f"{folder}/meet", arguments.rounds)
            torch.multiprocessing.spawn(run, args=given, nprocs=world)


if __name__ == "__main__":
    sys.exit(main())
