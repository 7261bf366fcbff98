"""Time of one update of an averaged model on the CPU: optim_ext.swa_utils against torch.optim.swa_utils.

    python benchmarks/averaging.py                     # everything, about a minute on two cores
    python benchmarks/averaging.py --case gpt2 --quick

Measured as step_time.py does, whose helpers this uses: modes in shuffled rounds in one process, on the same memory,
medians, ratios within a round. The mean (SWA) and the exponential moving average (EMA) are compared with torch's
``AveragedModel`` in its fastest form (for SWA the default, for EMA ``get_ema_multi_avg_fn``). "of limit" is the time of a
bare loop that reads the parameters and reads and writes the averages, divided by ours. "step" compares AdamW alone with
AdamW that averages in the same pass (``average_into``), with the two one after the other, and with torch's fused AdamW
followed by torch's EMA. Writes averaging.json to ``--output-dir``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report
import shapes
import torch
from places import Cpu
from step_time import LIMIT, OURS, environment, in_rounds, paired_ratios, times_together
from torch import nn
from torch.optim import swa_utils as torch_swa

import optim_ext
from optim_ext import swa_utils

TORCH = "torch"
IN_STEP, THEN = OURS, "step, then update"
PLAIN = "step alone"
DECAY = 0.999
CASES: dict[str, tuple[str, list[shapes.Shape], bool]] = {  # title, shapes, fits the caches
    "gpt2": ("GPT-2 124M", shapes.gpt2(), False),
    "resnet50": ("ResNet-50", shapes.resnet50(), False),
    "small-mixed": ("1000 tensors, 64 x 64 and 64", shapes.small_mixed(), True),
    "small-vectors": ("1000 tensors of 64", shapes.small_vectors(), True),
}
REQUIRED = {  # of the ratio to torch
    ("gpt2", "SWA"): 4.0,
    ("gpt2", "EMA"): 1.0,
    ("small-vectors", "SWA"): 20.0,
    ("small-vectors", "EMA"): 10.0,
}
REQUIRED_OF_LIMIT = 0.9
REQUIRED_OF_PLAIN_STEP = 1.3  # at most, on GPT-2


@dataclass
class Cell:
    """One row: times in ms by mode; ratio: torch's time / ours. For "step": the time of each mode / that of the step."""

    case: str
    title: str
    average: str
    rounds: int
    ms: dict[str, float]
    ratio: float
    required: float | None = None
    of_limit: float | None = None
    of_plain_step: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.of_plain_step:
            return self.of_plain_step[IN_STEP] <= REQUIRED_OF_PLAIN_STEP if self.case == "gpt2" else None
        if self.required is None:
            return None
        return self.ratio >= self.required and (self.of_limit is None or self.of_limit >= REQUIRED_OF_LIMIT)


def make_model(sizes: list[shapes.Shape]) -> nn.Module:
    """A tree of small modules with two parameters each, as layers have."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.empty(size).normal_(0, 0.02, generator=generator) for size in sizes]
    return nn.ModuleList(nn.ParameterList(values[i : i + 2]) for i in range(0, len(values), 2))


def share(averaged: nn.Module, with_: nn.Module) -> None:
    for mine, shared in zip(averaged.parameters(), with_.parameters(), strict=True):
        mine.data = shared.data


def measure_average(case: str, average: str, place: Cpu, repeats: int, seconds: float) -> Cell:
    title, sizes, small = CASES[case]
    model = make_model(sizes)
    arguments = [
        {} if average == "SWA" else {"multi_avg_fn": module.get_ema_multi_avg_fn(DECAY)}
        for module in (swa_utils, torch_swa)
    ]
    ours = swa_utils.AveragedModel(model, **arguments[0])
    theirs = torch_swa.AveragedModel(model, **arguments[1])
    for averaged in (ours, theirs):
        averaged.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    for averaged in (ours, theirs):
        averaged.update_parameters(model)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    share(theirs, ours)
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours.update_parameters(model),
        TORCH: lambda: theirs.update_parameters(model),
    }
    if not small:
        calls[LIMIT] = place.limit([p.data for p in model.parameters()], [[p.data for p in ours.parameters()]])
    samples = in_rounds(calls, lambda turn: None, repeats, seconds, lambda call: place.turn(call, small))
    return Cell(
        case,
        title,
        average,
        len(samples[OURS]),
        times_together(samples),
        statistics.median(paired_ratios(samples, TORCH)),
        REQUIRED.get((case, average)),
        None if small else statistics.median(paired_ratios(samples, LIMIT)),
    )


def measure_step(case: str, place: Cpu, repeats: int, seconds: float) -> Cell:
    title, sizes, small = CASES[case]
    model = make_model(sizes)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(0, 0.1, generator=generator)
    gradients = [p.grad for p in model.parameters()]
    ema = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}
    averaged = swa_utils.AveragedModel(model, **ema)
    plain, fused = (optim_ext.AdamW(model.parameters()) for _ in range(2))
    theirs = torch.optim.AdamW(model.parameters(), fused=True)
    their_average = torch_swa.AveragedModel(model, multi_avg_fn=torch_swa.get_ema_multi_avg_fn(DECAY))
    fused.average_into(averaged)
    for optimizer in (plain, fused, theirs):
        optimizer.step()
    for optimizer in (fused, theirs):
        for p in model.parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = plain.state[p][key]
    share(their_average, averaged)

    def step_then_update() -> None:
        plain.step()
        averaged.update_parameters(model)

    def torchs() -> None:
        theirs.step()
        their_average.update_parameters(model)

    def new_gradients(turn: int) -> None:
        for p, grad in zip(model.parameters(), gradients, strict=True):
            p.grad = grad.view_as(grad)

    calls = {PLAIN: plain.step, IN_STEP: fused.step, THEN: step_then_update, TORCH: torchs}
    samples = in_rounds(calls, new_gradients, repeats, seconds, lambda call: place.turn(call, small))
    of_plain = {
        mode: statistics.median(a / b for a, b in zip(times, samples[PLAIN], strict=True))
        for mode, times in samples.items()
    }
    ratio = statistics.median(paired_ratios(samples, TORCH))
    plain_ms = statistics.median(samples[PLAIN]) * 1e3
    ms = {mode: plain_ms * share for mode, share in of_plain.items()}
    return Cell(case, title, "step", len(samples[OURS]), ms, ratio, of_plain_step=of_plain)


def table(cells: list[Cell]) -> str:
    answer = {True: "yes", False: "**no**", None: "-"}
    lines = [
        "| case | average | torch | optim_ext | ratio | required | of limit | met |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in (c for c in cells if not c.of_plain_step):
        required = "-" if cell.required is None else f"{cell.required:.0f}x"
        limit = "-" if cell.of_limit is None else f"{cell.of_limit:.0%}"
        times = " | ".join(report.number(cell.ms[mode]) for mode in (TORCH, OURS))
        lines.append(
            f"| {cell.title} | {cell.average} | {times} | {cell.ratio:.2f}x | {required} | {limit} | {answer[cell.met]} |"
        )
    modes = (PLAIN, IN_STEP, THEN, TORCH)
    lines += [
        "",
        "| AdamW with EMA | step alone | averaged in the step | step, then update | torch fused, then update | met |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in (c for c in cells if c.of_plain_step):
        times = " | ".join(f"{report.number(cell.ms[mode])} ({cell.of_plain_step[mode]:.2f}x)" for mode in modes)
        lines.append(f"| {cell.title} | {times} | {answer[cell.met]} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="rounds at least; cheap cells take more (default 15)")
    parser.add_argument("--quick", action="store_true", help="three rounds and no more")
    parser.add_argument("--output-dir", type=Path, default=Path("bench_results"))
    options = parser.parse_args(arguments)
    repeats, seconds = (3, 0.0) if options.quick else (options.repeats, 2.0)
    if repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")

    place = Cpu(options.threads)
    started = environment(place)
    cells = []
    for case in options.case:
        cells += [measure_average(case, average, place, repeats, seconds) for average in ("SWA", "EMA")]
        cells.append(measure_step(case, place, repeats, seconds))
        print(f"{CASES[case][0]} done", file=sys.stderr, flush=True)
    started["load_average_after"] = os.getloadavg()[0]
    print(report.heading(started))
    print("Times in ms.\n")
    print(table(cells))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    document = {"environment": started, "cells": [asdict(cell) for cell in cells]}
    (options.output_dir / "averaging.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nWritten: {options.output_dir}/averaging.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
