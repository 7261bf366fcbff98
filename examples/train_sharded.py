"""Train the small GPT of train_char_lm.py on several processes, sharded by FSDP2, with torch's chain and with one step of
optim_ext.

    torchrun --nproc-per-node 2 examples/train_sharded.py                  # trains, and leaves a checkpoint of half-way
    torchrun --nproc-per-node 4 examples/train_sharded.py --resume         # goes on from it on any number of processes
    torchrun --nproc-per-node 1 examples/train_sharded.py --resume --output sharded.png

Parameters, gradients, state and the moving average are DTensors. ``clip_grad_norm`` takes the norm of all processes' parts,
``step`` clips and averages as it goes, each process in its own part. The checkpoint is written and read by
torch.distributed.checkpoint. A resumed run has to continue the loss curve of the first one; it draws
both with ``--output``.

Prints the losses and the median time of clip, step and average together. Exits with status 1 if curves differ by more than
``LARGEST_DIFFERENCE``, or optim_ext did not run its own kernels. Nothing is downloaded; the engine is gloo on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from train_char_lm import CONTEXT, GPT, LARGEST_DIFFERENCE, LEARNING_RATE, MAX_NORM, SEED, text

import optim_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH_SIZE = 16  # of all processes together


def sharded(model: GPT) -> GPT:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Run:
    """One model in training, by torch's three calls or by our one step."""

    def __init__(self, package: Any):
        torch.manual_seed(SEED)
        self.ours = package is optim_ext
        whole = GPT()
        averages = package.swa_utils
        self.averaged = averages.AveragedModel(whole, multi_avg_fn=averages.get_ema_multi_avg_fn(0.98))
        self.model = sharded(whole)
        sharded(self.averaged.module)
        self.optimizer = package.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        if self.ours:
            self.optimizer.average_into(self.averaged, self.model)

    def train_on(self, batch: Tensor) -> None:
        """One step on this process's share of the batch, codes (letters, CONTEXT + 1)."""
        share = batch.chunk(dist.get_world_size())[dist.get_rank()]
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(share[:, :-1]).flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        dist.barrier()
        start = time.perf_counter()
        if self.ours:
            self.optimizer.clip_grad_norm(MAX_NORM)
            self.optimizer.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
        self.seconds.append(time.perf_counter() - start)
        mean = loss.detach()
        dist.all_reduce(mean)
        self.losses.append(mean.item() / dist.get_world_size())

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint has, by reference."""
        weights, state = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": state, "averaged": self.averaged.state_dict()}

    def save(self, folder: Path) -> None:
        checkpoint.save(self.state(), checkpoint_id=folder)

    def resume(self, folder: Path) -> None:
        found = self.state()
        checkpoint.load(found, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        self.averaged.load_state_dict(found["averaged"])


def batches(codes: Tensor, steps: range) -> Any:
    """(BATCH_SIZE, CONTEXT + 1) codes for each step, the same on every process and in every run."""
    for step in steps:
        picks = torch.Generator().manual_seed(step)
        starts = torch.randint(len(codes) - CONTEXT - 1, (BATCH_SIZE, 1), generator=picks)
        yield codes[starts + torch.arange(CONTEXT + 1)]


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def train(codes: Tensor, steps: int, folder: Path) -> bool:
    """Both packages side by side; ours leaves a checkpoint of half-way and its loss curve."""
    theirs, ours = Run(torch.optim), Run(optim_ext)
    for step, batch in enumerate(batches(codes, range(steps))):
        if step == steps // 2:
            ours.save(folder / "checkpoint")
        for run in (theirs, ours) if step % 2 == 0 else (ours, theirs):
            run.train_on(batch)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps({"torch": theirs.losses, "optim_ext": ours.losses}))
    difference = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    ratio = statistics.median(a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True))
    say(f"loss {ours.losses[0]:.3f} -> {ours.losses[-1]:.3f}; largest difference to torch's: {difference:.1e}")
    say(
        f"clip, step and average: {1e3 * statistics.median(ours.seconds):.2f} ms; torch takes {ratio:.1f} times as long"
    )
    reports = optim_ext.explain(ours.optimizer)
    for line in reports:
        say(str(line))
    return difference <= LARGEST_DIFFERENCE and all(line.native for line in reports)


def resume(codes: Tensor, folder: Path, picture: Path | None) -> bool:
    """Goes on from the checkpoint, on this many processes, as the first run went on."""
    before = json.loads((folder / "losses.json").read_text())
    expected = before["optim_ext"]
    half = len(expected) // 2
    run = Run(optim_ext)
    run.resume(folder / "checkpoint")
    for batch in batches(codes, range(half, len(expected))):
        run.train_on(batch)
    difference = max(abs(a - b) for a, b in zip(run.losses, expected[half:], strict=True))
    say(
        f"resumed at loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}; largest difference to the first run: {difference:.1e}"
    )
    if picture is not None and dist.get_rank() == 0:
        save_curves({**before, "resumed": [math.nan] * half + run.losses}, picture)
    return difference <= LARGEST_DIFFERENCE


def save_curves(losses: dict[str, list[float]], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = {"torch": ("tab:orange", "-", 4.0), "optim_ext": ("tab:blue", "-", 1.5), "resumed": ("black", ":", 2.5)}
    for name, values in losses.items():
        color, style, width = styles[name]
        panel.plot(values, style, color=color, linewidth=width, label=name)
    panel.set(title="A GPT sharded by FSDP2", xlabel="training step", ylabel="loss")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "train_sharded"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--output", type=Path, help="with --resume: where to save a picture of the loss curves")
    options = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        codes = text()
        say(f"torch {torch.__version__}, {dist.get_world_size()} processes")
        passed = (
            resume(codes, options.folder, options.output)
            if options.resume
            else train(codes, options.steps, options.folder)
        )
        say("passed" if passed else "FAILED")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
