"""Clipping, step and moving average together: torch's chain of three against one pass of optim_ext.

    python benchmarks/one_pass.py                # GPT-2 and a thousand small tensors, some two minutes on two cores
    python benchmarks/one_pass.py --quick

Torch's chain is ``clip_grad_norm_``, ``AdamW(fused=True).step()`` and ``AveragedModel(...).update_parameters()`` with
``get_ema_multi_avg_fn``. Ours is one ``step()`` with a standing policy and ``average_into``, which reads the gradients
once for their norm and then does everything else. Besides that: the parts of both chains one by one, what arming a step
and clipping in it adds to a plain step, and the norm alone against a bare loop that only reads the gradients. Rounds,
medians and paired ratios are those of step_time.py (docs/performance.md). Writes one_pass.json to ``--output-dir``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from places import Cpu, Gpu
from step_time import CASES, OURS, Tensors, environment, hand_out, in_rounds, paired_ratios, times_together
from torch import Tensor, nn

import optim_ext

MAX_NORM, DECAY = 1.0, 0.999
REQUIRED_CHAIN = {"gpt2": 1.8, "small-vectors": 8.0}
MOST_ADDED, LEAST_OF_READ = 1.15, 0.9


class Chain:
    """The three calls over parameters of their own, from torch or from optim_ext."""

    def __init__(self, package: Any, params: list[nn.Parameter], **options: Any):
        self.params = params
        self.optimizer = package.AdamW(params, lr=1e-3, **options)
        model = nn.ParameterList(params)
        swa = package.swa_utils
        self.averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(DECAY))
        self.model = model

    def one_by_one(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()
        self.averaged.update_parameters(self.model)


def check_equal(ours: Chain, theirs: Chain) -> None:
    """A speed counts only for the right result."""
    for mine, other in zip(
        (*ours.params, *ours.averaged.parameters()), (*theirs.params, *theirs.averaged.parameters()), strict=True
    ):
        torch.testing.assert_close(mine.data, other.data, rtol=1e-4, atol=1e-6)


def measure(case_key: str, place: Cpu | Gpu, repeats: int, seconds: float) -> dict[str, Any]:
    case = CASES[case_key]
    tensors = Tensors(case, place.device)
    theirs = Chain(torch.optim, tensors.parameters(), fused=True)
    ours = Chain(optim_ext, tensors.parameters(), fused=True)
    ours.optimizer.set_grad_policy(max_norm=MAX_NORM)
    ours.optimizer.average_into(ours.averaged, ours.model)

    def new_gradients(turn: int) -> None:
        hand_out([g.clone() for g in tensors.gradients[turn % 2]], theirs.optimizer)  # torch's clipping writes to them
        hand_out(tensors.gradients[turn % 2], ours.optimizer)

    def rounds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        return in_rounds(calls, new_gradients, repeats, seconds, lambda call: place.turn(call, case.small))

    for turn in range(2):
        new_gradients(turn)
        theirs.one_by_one()
        ours.optimizer.step()
    check_equal(ours, theirs)
    chain = rounds({"torch": theirs.one_by_one, OURS: ours.optimizer.step})

    gradients: list[Tensor] = tensors.gradients[0]
    ours.optimizer.set_grad_policy()
    state = [[entries[key] for entries in ours.optimizer.state.values()] for key in ("exp_avg", "exp_avg_sq")]
    parts = rounds(
        {
            "clip": lambda: torch.nn.utils.clip_grad_norm_(theirs.params, MAX_NORM),
            "step": theirs.optimizer.step,
            "average": lambda: theirs.averaged.update_parameters(theirs.model),
            "norm": lambda: torch.ops.optim_ext.grad_norm(gradients),
            "step and average": ours.optimizer.step,
            "its memory": place.limit(gradients, [ours.params, list(ours.averaged.parameters()), *state]),
        }
    )
    del theirs.averaged
    ours.optimizer.average_into(None)

    def armed() -> None:
        ours.optimizer.clip_grad_norm(MAX_NORM)
        ours.optimizer.step()

    step = rounds({OURS: ours.optimizer.step, "armed": armed})
    norm = rounds(
        {
            OURS: lambda: torch.ops.optim_ext.grad_norm(gradients),
            "read": place.limit(gradients, []),
            "torch": lambda: torch.nn.utils.get_total_norm(gradients),
        }
    )

    def ratio(samples: dict[str, list[float]], mode: str) -> float:
        return statistics.median(paired_ratios(samples, mode))

    return {
        "case": case_key,
        "title": case.title,
        "chain_ms": times_together(chain),
        "chain_ratio": ratio(chain, "torch"),
        "parts_ms": {part: statistics.median(times) * 1e3 for part, times in parts.items()},
        "step_ms": times_together(step),
        "added": ratio(step, "armed"),
        "norm_ms": times_together(norm),
        "norm_ratio": ratio(norm, "torch"),
        "of_read": None if case.small else ratio(norm, "read"),
    }


def table(cells: list[dict[str, Any]]) -> str:
    def verdict(good: bool) -> str:
        return "yes" if good else "**no**"

    rows = [
        "| case | what | torch ms | optim_ext ms | measured | required | met |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        chain, step, norm = cell["chain_ms"], cell["step_ms"], cell["norm_ms"]
        required = REQUIRED_CHAIN[cell["case"]]
        rows += [
            f"| {cell['title']} | clip + AdamW + EMA | {report.number(chain['torch'])} | {report.number(chain[OURS])} | "
            f"{cell['chain_ratio']:.2f}x | {required}x | {verdict(cell['chain_ratio'] >= required)} |",
            f"| | armed step, against a plain one | | {report.number(step['armed'])}, {report.number(step[OURS])} | "
            f"{cell['added']:.2f}x | {MOST_ADDED}x at most | {verdict(cell['added'] <= MOST_ADDED)} |",
        ]
        of_read = cell["of_read"]
        limit = (
            "| - | - | - |"
            if of_read is None
            else f"| {of_read:.0%} of reading alone | {LEAST_OF_READ:.0%} | {verdict(of_read >= LEAST_OF_READ)} |"
        )
        rows.append(f"| | the norm | {report.number(norm['torch'])} | {report.number(norm[OURS])} {limit}")
    for cell in cells:
        part = {name: report.number(value) for name, value in cell["parts_ms"].items()}
        rows += [
            "",
            f"{cell['title']}, the parts of the chain: torch clips in {part['clip']} ms, steps in {part['step']} and "
            f"averages in {part['average']}; ours takes the norm in {part['norm']}, steps and averages in "
            f"{part['step and average']}, which a bare loop over the same memory does in {part['its memory']}.",
        ]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=REQUIRED_CHAIN, default=list(REQUIRED_CHAIN))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at least; cheap cells take more (default 15)")
    parser.add_argument("--quick", action="store_true", help="three rounds and no more")
    parser.add_argument("--output-dir", type=Path, default=Path("bench_results"))
    options = parser.parse_args(arguments)
    place = Gpu() if options.device == "cuda" else Cpu(options.threads)
    repeats, seconds = (3, 0.0) if options.quick else (options.repeats, 2.0)
    started = environment(place)
    cells = [measure(case, place, repeats, seconds) for case in options.case]
    print(report.heading(started))
    print(table(cells))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    written = options.output_dir / "one_pass.json"
    written.write_text(json.dumps({"environment": started, "cells": cells}, indent=1) + "\n")
    print(f"Written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
