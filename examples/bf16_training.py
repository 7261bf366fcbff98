"""Train a small GPT in pure bfloat16, its parameters and state kept in several ways, beside float32.

    python examples/bf16_training.py
    python examples/bf16_training.py --steps 2000

All runs start from the same weights and see the same batches. Prints for each way the loss at the end, the bytes that one
parameter takes with its gradient and its state, and the median time of a step; saves a picture of the curves, and of how
far they are from that of float32, as most of them lie on each other. With
``native`` a bfloat16 parameter stands still as soon as its steps are smaller than half its last place.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train_char_lm import BATCH_SIZE, CONTEXT, GPT, SEED, text

import optim_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 native": (torch.bfloat16, {}),
    "bf16 remainder": (torch.bfloat16, {"param_precision": "remainder"}),
    "bf16 stochastic": (torch.bfloat16, {"param_precision": "stochastic"}),
    "bf16 remainder, q8 state": (torch.bfloat16, {"param_precision": "remainder", "state_precision": "q8"}),
}
SMOOTHED = 0.02  # share of the newest loss in the curves


class Run:
    def __init__(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        torch.manual_seed(SEED)
        self.model = GPT().to(dtype)
        self.optimizer = optim_ext.AdamW(self.model.named_parameters(), lr=1e-3, **options)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train_on(self, codes: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(codes[:, :-1]).float().flatten(0, 1), codes[:, 1:].flatten())
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        before = self.losses[-1] if self.losses else loss.item()
        self.losses.append(before + SMOOTHED * (loss.item() - before))

    def bytes_held(self) -> float:
        """For each parameter: its own, its gradient's and its state's."""
        params = list(self.model.parameters())
        held = sum(2 * p.numel() * p.element_size() for p in params)
        held += sum(v.numel() * v.element_size() for entry in self.optimizer.state.values() for v in entry.values())
        return held / sum(p.numel() for p in params)


def draw(losses: dict[str, list[float]], path: Path) -> None:
    figure, (curves, apart) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    baseline = losses["float32"]
    for way, of_run in losses.items():
        wide = of_run is baseline
        look = {"color": "lightgray", "lw": 6} if wide else {"lw": 1.3}
        curves.plot(of_run, label=way, zorder=1 if wide else 2, **look)
        apart.plot([loss - other for loss, other in zip(of_run, baseline, strict=True)], **look)
    curves.set(xlabel="step", ylabel="loss, smoothed", title="A small GPT")
    apart.set(xlabel="step", title="The same, less the loss in float32")
    apart.set_yscale("symlog", linthresh=1e-3)
    for panel in (curves, apart):
        panel.grid(alpha=0.3)
    curves.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("bf16_training.png"))
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    codes = text()
    draws = torch.Generator().manual_seed(SEED)
    runs = {way: Run(*how) for way, how in WAYS.items()}
    for _ in tqdm(range(arguments.steps)):
        starts = torch.randint(len(codes) - CONTEXT - 1, (BATCH_SIZE,), generator=draws)
        batch = torch.stack([codes[start : start + CONTEXT + 1] for start in starts.tolist()])
        for run in runs.values():
            run.train_on(batch)

    print(f"{'':26}{'last loss':>10}{'bytes':>8}{'ms a step':>11}")
    for way, run in runs.items():
        milliseconds = 1e3 * statistics.median(run.seconds)
        print(f"{way:26}{run.losses[-1]:10.4f}{run.bytes_held():8.2f}{milliseconds:11.3f}")
    draw({way: run.losses for way, run in runs.items()}, arguments.output)
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
