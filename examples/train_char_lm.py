"""Train a small GPT to continue Python code, letter by letter, with torch's chain and with one pass of optim_ext.

Both runs start from the same weights and see the same batches. Each does what training usually does: warm-up and cosine
schedule, autocast, clipping of the gradient norm, AdamW, a moving average of the weights. With torch these are three
passes over the parameters, ``clip_grad_norm_``, ``step`` and ``update_parameters``; with optim_ext ``clip_grad_norm``
arms the step, which clips and averages as it goes. In the middle our run writes a checkpoint, is thrown away and resumes
from it.

    python examples/train_char_lm.py
    python examples/train_char_lm.py --autocast float16        # with GradScaler, unscaling inside the step

Prints the losses, the norms and the median time of the three calls together; saves the curves as a picture. Exits with
status 1 if the curves differ by more than ``LARGEST_DIFFERENCE``, the average does not predict better than chance, or
optim_ext did not run its own kernels. The text is the source of Python's standard library; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

import optim_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Rounding differs in the last bit, and training amplifies that; a wrong formula shows as 0.1 and more.
LARGEST_DIFFERENCE = 0.05
CHANCE = math.log(128)
MAX_NORM, LEARNING_RATE, WARMUP = 0.5, 3e-3, 0.1
CONTEXT, BATCH_SIZE, WIDTH, LAYERS, HEADS = 64, 16, 64, 2, 4
SEED = 0
AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text(characters: int = 2_000_000) -> Tensor:
    """The first sources of the standard library as codes below 128, int64 of shape (characters,)."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= characters:
            break
    return torch.frombuffer(found[:characters], dtype=torch.uint8).clamp(max=127).long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        x = x + self.out(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Logits of the next letter, (batch, letters, 128), from codes (batch, letters)."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.blocks(self.letters(codes) + self.places.weight[: codes.shape[1]]))


class Run:
    """One model in training, by torch's three calls or by our one step."""

    def __init__(self, package: Any, steps: int, autocast: torch.dtype | None, device: torch.device):
        torch.manual_seed(SEED)
        self.ours, self.autocast, self.device = package is optim_ext, autocast, device
        self.model = GPT().to(device)
        self.optimizer = package.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        warmup = max(1, int(WARMUP * steps))
        self.scheduler = package.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / (steps - warmup))),
        )
        averages = package.swa_utils
        self.averaged = averages.AveragedModel(self.model, multi_avg_fn=averages.get_ema_multi_avg_fn(0.98))
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16, init_scale=1024.0)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        if self.ours:
            self.optimizer.average_into(self.averaged, self.model)

    def loss(self, model: nn.Module, codes: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = model(codes[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), codes[:, 1:].flatten())

    def train_on(self, codes: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, codes)
        self.scaler.scale(loss).backward()
        self._wait()
        start = time.perf_counter()
        norm = self._clip_step_average()
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.scaler.update()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.norms.append(norm.item())

    def _clip_step_average(self) -> Tensor:
        if self.ours:
            norm: Tensor = self.optimizer.clip_grad_norm(MAX_NORM)
            self.scaler.step(self.optimizer)
            return norm
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.scaler.step(self.optimizer)
        if math.isfinite(norm):  # the step was not skipped
            self.averaged.update_parameters(self.model)
        return norm

    def save(self, path: Path) -> None:
        parts = ("model", "optimizer", "scheduler", "averaged", "scaler")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, path)

    def resume(self, path: Path) -> None:
        for part, state in torch.load(path, weights_only=True, map_location=self.device).items():
            getattr(self, part).load_state_dict(state)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resumed(run: Run, steps: int) -> Run:
    """A new run that goes on from the old one's checkpoint, with its record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        run.save(path)
        again = Run(optim_ext, steps, run.autocast, run.device)
        again.resume(path)
    again.losses, again.norms, again.seconds = run.losses, run.norms, run.seconds
    return again


def plot(theirs: Run, ours: Run, path: Path) -> None:
    figure, (losses, norms, times) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for run, name, style in (
        (theirs, "torch", {"linewidth": 3.5, "alpha": 0.55}),
        (ours, "optim_ext", {"linewidth": 1}),
    ):
        colour = "tab:blue" if run is ours else "tab:orange"
        losses.plot(run.losses, color=colour, label=name, **style)
        norms.plot(run.norms, color=colour, label=name, **style)
        times.hist(
            [1e3 * s for s in sorted(run.seconds)[: int(0.95 * len(run.seconds))]],
            40,
            color=colour,
            alpha=0.6,
            label=name,
        )
    losses.axvline(len(ours.losses) // 2, color="gray", linestyle="--", linewidth=1, label="resumed here")
    norms.axhline(MAX_NORM, color="tab:red", linestyle="--", linewidth=1, label="clipped to")
    norms.set_yscale("log")
    for panel, title, label in (
        (losses, "loss", "training step"),
        (norms, "norm of the gradients", "training step"),
        (times, "clip, step and average", "ms per step"),
    ):
        panel.set(title=title, xlabel=label)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--autocast", choices=AUTOCAST, default="bfloat16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1")
    parser.add_argument("--output", type=Path, default=Path("char_lm.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error("--steps must be at least 4")

    codes = text()
    theirs, ours = (
        Run(package, options.steps, AUTOCAST[options.autocast], options.device) for package in (torch.optim, optim_ext)
    )
    parameters = sum(p.numel() for p in ours.model.parameters())
    print(
        f"torch {torch.__version__} on {options.device}, {torch.get_num_threads()} threads, autocast {options.autocast}; "
        f"{parameters} parameters, {len(codes)} letters"
    )
    picks = torch.Generator().manual_seed(SEED)
    with tqdm(total=options.steps, unit="step", mininterval=0.5) as progress:
        for step in range(options.steps):
            starts = torch.randint(len(codes) - CONTEXT - 1, (BATCH_SIZE, 1), generator=picks)
            batch = codes[starts + torch.arange(CONTEXT + 1)].to(options.device)
            if step == options.steps // 2:
                ours = resumed(ours, options.steps)
            for run in (theirs, ours) if step % 2 == 0 else (ours, theirs):
                run.train_on(batch)
            progress.update()
            progress.set_postfix(loss=f"{ours.losses[-1]:.3f}", norm=f"{ours.norms[-1]:.2f}")
    plot(theirs, ours, options.output)

    held_out = codes[-BATCH_SIZE * (CONTEXT + 1) :].view(BATCH_SIZE, -1).to(options.device)
    with torch.no_grad():
        averages = [run.loss(run.averaged, held_out).item() for run in (theirs, ours)]
    difference = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    native = all(group.native for group in optim_ext.explain(ours.optimizer))
    print()
    ratio = statistics.median(a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True))
    our_ms = 1e3 * statistics.median(ours.seconds)
    print("                                       torch  optim_ext")
    for name, values in (
        ("first loss", [run.losses[0] for run in (theirs, ours)]),
        ("last loss", [run.losses[-1] for run in (theirs, ours)]),
        ("loss of the moving average", averages),
        ("clip, step and average, ms (median)", [ratio * our_ms, our_ms]),
    ):
        print(f"{name:36s} {values[0]:8.3f}  {values[1]:9.3f}")
    print(f"time, torch / optim_ext, by pairs: {ratio:.2f}x; largest difference of the losses: {difference:.1e}")
    passed = difference <= LARGEST_DIFFERENCE and max(averages) < CHANCE and native
    print(f"{'passed' if passed else 'FAILED'}{'' if native else ' (not native)'}; curves: {options.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
